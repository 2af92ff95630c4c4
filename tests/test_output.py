"""Names and targets of stems, which appear together or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from demucs_infer.api import Output, Separator
from demucs_infer.audio import save_audio
from demucs_infer.errors import SaveAudioError
from demucs_infer.write.formats import FORMATS

from .helpers import SOURCES, Command, noise, stems_of, write_track


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.skipif(sys.platform == "win32", reason="needs names of POSIX")
@pytest.mark.parametrize(
    ("template", "in_the_way", "reason"),
    [
        ("{track}-" + "x" * 243 + "-{stem}", None, "too long"),  # for "vocals" alone
        ("{track}/{stem}.{ext}", "vocals.wav", "folder"),
    ],
)
def test_targets_are_checked_before_the_work(
    template: str, in_the_way: str | None, reason: str, command: Command, tmp_path: Path
) -> None:
    write_track(tmp_path / "abcde.wav", 0.1)
    write_track(tmp_path / "b.wav", 0.1)
    if in_the_way:
        (tmp_path / "separated/tiny/abcde" / in_the_way).mkdir(parents=True)
    before = tree(tmp_path)
    result = command("--filename", template, "abcde.wav", "b.wav")
    assert result.returncode == 1
    (error,) = (line for line in result.stderr.splitlines() if "error: " in line)
    assert reason in error
    made = {name for name in tree(tmp_path) - before if Path(name).suffix or "-" in name}
    assert len(made) == len(SOURCES)  # those of b.wav
    assert not any("abcde" in name for name in made)


@pytest.mark.parametrize("replaced", [False, True])
def test_failing_stem_takes_back_the_others(
    replaced: bool, fast_repo: Path, tmp_path: Path
) -> None:
    """A folder takes the name of the last stem while the track is separated."""
    write_track(tmp_path / "a.wav", 0.1)
    folder = tmp_path / "out/a"
    last = folder / f"{SOURCES[-1]}.wav"
    if replaced:
        folder.mkdir(parents=True)
        for name in SOURCES:
            (folder / f"{name}.wav").write_text(name)

    def get_in_the_way(info: dict[str, Any]) -> None:
        if not last.is_dir():
            last.unlink(missing_ok=True)
            (last / "inside").mkdir(parents=True)

    separator = Separator("tiny", fast_repo, device="cpu", shifts=0, callback=get_in_the_way)
    with pytest.raises(SaveAudioError, match=last.name):
        separator.separate_to_files(tmp_path / "a.wav", tmp_path / "out")
    left = {f"{name}.wav" for name in SOURCES if replaced} | {last.name, f"{last.name}/inside"}
    assert tree(folder) == left
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    for name in SOURCES[:-1] if replaced else []:
        assert (folder / f"{name}.wav").read_text() == name
    (last / "inside").rmdir()
    last.rmdir()
    separator.update_parameter(callback=None)
    separator.separate_to_files(tmp_path / "a.wav", tmp_path / "out")
    assert stems_of(tmp_path / "out") == {f"a/{name}.wav" for name in SOURCES}


def test_failing_stem_takes_back_the_others_in_a_store(
    separator: Separator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    write_track(tmp_path / "a.wav", 0.1)
    usual, written = MemoryFileSystem.cp_file, []

    def cp_file(store: MemoryFileSystem, source: str, target: str, **options: Any) -> None:
        if SOURCES[-1] in target:
            raise OSError("quota is exceeded")
        written.append(target)
        usual(store, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "cp_file", cp_file)
    with pytest.raises(SaveAudioError, match=r"^memory://[^ ]+: cannot be written \(quota is exc"):
        separator.separate_to_files(tmp_path / "a.wav", "memory://taken-back")
    assert len(written) == 3
    assert not memory.find("/taken-back")


@pytest.mark.parametrize("format", FORMATS)
def test_only_whole_files_of_the_format_are_written(format: str, tmp_path: Path) -> None:
    output, path = Output(tmp_path, format=format), tmp_path / f"a.{format}"
    assert not output.is_written(path)
    save_audio(noise(2, 20_000), path, 44_100)
    assert output.is_written(path)
    assert not Output(tmp_path, format="wav" if format != "wav" else "mp3").is_written(path)
    for content in (b"", path.read_bytes()[:40], b"no audio" * 1000):
        path.write_bytes(content)
        assert not output.is_written(path)


def test_other_files_of_a_track_are_mentioned_once(command: Command, tmp_path: Path) -> None:
    tracks = [write_track(tmp_path / f"{name}.wav") for name in "ab"]
    assert "bass.wav" not in command("--shifts", 0, *tracks).stderr
    result = command("--shifts", 0, "--skip-existing", "--two-stems", "vocals", *tracks)
    assert result.stderr.count("bass.wav, drums.wav, other.wav") == 1
