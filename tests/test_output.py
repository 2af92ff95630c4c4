"""Where stems go: names, targets, and that they appear together or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import soundfile

from demucs_infer.api import Output, Separator
from demucs_infer.errors import OptionError, SaveAudioError
from demucs_infer.io import writer
from demucs_infer.separate import main
from demucs_infer.storage.locations import Url, publish

from .helpers import SOURCES, assert_one_line, noise, run, stems_of


@pytest.mark.parametrize(
    "template",
    [
        "{track:1000000000}/{stem}",
        "{track:{stem}}/{stem}",
        "{stem.__class__}",
        "{stem.__class__.__mro__[1]}",
        "{track[x]}{stem}",
        "{stem:d}",
        "{stem}\0",
    ],
)
def test_templates_reach_into_nothing(template: str) -> None:
    with pytest.raises(OptionError, match="template"):
        Output("out", template)


def test_templates_cut_and_align() -> None:
    (path,) = (
        Output("out", "{track[0]}/{track:.3}-{stem:>6}.{ext}")
        .paths(Path("abcdef.wav"), "m", ["bass"])
        .values()
    )
    assert path == Path("out/a/abc-  bass.wav")


@pytest.mark.parametrize(
    "folder", ["", "out\0", "zip://a::memory://b", "reference://x", "http://h"]
)
def test_folders_that_are_refused(folder: str) -> None:
    with pytest.raises(OptionError):
        Output(folder)


@pytest.fixture
def command(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command line with the tiny model in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    options = ["--repo", str(repo), "-n", "tiny", "--seed", "1"]
    return lambda *more: main([*options, *map(str, more)])


def write(path: Path, seconds: float = 0.1) -> Path:
    soundfile.write(path, noise(2, int(8000 * seconds)).T.numpy(), 8000, format="WAV")
    return path


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.skipif(sys.platform == "win32", reason="needs names of POSIX")
@pytest.mark.parametrize(
    ("template", "in_the_way", "message"),
    [
        ("{track}-" + "x" * 243 + "-{stem}", None, "too long"),  # for "vocals" alone
        ("{track}/{stem}.{ext}", "vocals.wav", "a folder has this name"),
    ],
)
def test_targets_are_checked_before_the_work(
    template: str,
    in_the_way: str | None,
    message: str,
    command: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "abcde.wav")
    write(tmp_path / "b.wav")
    if in_the_way:
        (tmp_path / "separated/tiny/abcde" / in_the_way).mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command("--filename", template, "abcde.wav", "b.wav")
    assert caught.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]
    made = {name for name in tree(tmp_path) - before if Path(name).suffix or "-" in name}
    assert len(made) == len(SOURCES)  # those of b.wav
    assert not any("abcde" in name for name in made)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_stem_that_fails_takes_back_the_others(
    replaced: bool, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    write(tmp_path / "a.wav")
    if replaced:
        (tmp_path / "out/a").mkdir(parents=True)
        for name in SOURCES:
            (tmp_path / "out/a" / f"{name}.wav").write_text(name)
    before = tree(tmp_path)

    def failing(file: Path, path: Path) -> object:
        if path.stem == SOURCES[-1]:
            raise OSError("disk on fire")
        return publish(file, path)

    monkeypatch.setattr(writer, "publish", failing)
    with pytest.raises(SaveAudioError, match="disk on fire"):
        separator.separate_to_files(tmp_path / "a.wav", tmp_path / "out")
    assert tree(tmp_path) - {"out"} == before - {"out"}
    for name in SOURCES if replaced else []:
        assert (tmp_path / "out/a" / f"{name}.wav").read_text() == name
    monkeypatch.setattr(writer, "publish", publish)
    separator.separate_to_files(tmp_path / "a.wav", tmp_path / "out")
    assert stems_of(tmp_path / "out") == {f"a/{name}.wav" for name in SOURCES}


def test_a_stem_that_fails_takes_back_the_others_in_a_store(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    write(tmp_path / "a.wav")

    def failing(file: Path, path: Url) -> object:
        if SOURCES[-1] in path.name:
            raise SaveAudioError("no more")
        return publish(file, path)

    monkeypatch.setattr(writer, "publish", failing)
    with pytest.raises(SaveAudioError, match="no more"):
        separator.separate_to_files(tmp_path / "a.wav", "memory://taken-back")
    assert not memory.find("/taken-back")


def test_no_temporary_folder_is_needed(repo: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    code = "import sys, tempfile; from demucs_infer.separate import main\n"
    code += "def none(*_): raise FileNotFoundError('no usable temporary directory')\n"
    code += "tempfile._get_default_tempdir = tempfile.gettempdir = none\nmain(sys.argv[1:])"
    options = ["--repo", repo, "-n", "tiny", "-o", "out", "a.wav"]
    result = run("-c", code, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(stems_of(tmp_path / "out/tiny")) == len(SOURCES)


def test_an_output_that_is_a_file(repo: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    (tmp_path / "out").touch()
    options = ["--repo", repo, "-n", "tiny", "-o", "out", "a.wav"]
    assert_one_line(run("-m", "demucs_infer", *options, cwd=tmp_path), "cannot be written")
