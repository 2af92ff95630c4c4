"""Attacks through URLs, names and lists of tracks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs
import soundfile

from demucs_infer.api import Output, Separator
from demucs_infer.batch.tracks import find_tracks
from demucs_infer.cluster import SeparateTracks
from demucs_infer.errors import DemucsInferError, LoadAudioError
from demucs_infer.storage.locations import Location, Url, exists, location, reading

from .helpers import SOURCES, Command, environment, json_lines, stems_of, wav

REFUSED = [
    "reference://x.wav::data:application/json;base64,e30=",
    "reference://x.wav::file:///etc/hostname",
    "simplecache::memory://in/a.wav",
    "zip://a.wav::memory://in/a.zip",
    "memory://in/a.wav::file:///etc/hostname",
    "memory://in/a.wav::memory",
    "file://::zip",
    "local:///etc/hostname",
    "github://user:repo@/a.wav",
    "data://a",
    "dir://a::memory://b",
    "ftp://127.0.0.1/a.wav",
    "REFERENCE://x.wav",
    "smb://127.0.0.1/a.wav",
    "s3://bucket/a.wav?versionId=1",
    "https://[/a.wav",
    "http://",
    "memory://a\0.wav",
]


@pytest.fixture
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*_: object, **__: object) -> None:
        raise AssertionError("a file system was built")

    monkeypatch.setattr(fsspec.core, "url_to_fs", built)
    monkeypatch.setattr(fsspec.AbstractFileSystem, "__init__", built)


@pytest.fixture
def command(command: Command, tmp_path: Path) -> Command:
    """The command line, in a folder with the track `a.wav`."""
    (tmp_path / "a.wav").write_bytes(wav(0.1))
    return command


def test_refused_addresses_open_nothing_on_the_command_line(
    no_store: None, command: Command, tmp_path: Path
) -> None:
    """As tracks, in a list, or as the output. The other track is separated."""
    (tmp_path / "list.txt").write_text("\n".join([*REFUSED, "a.wav"]))
    for folder, words in ("0", [*REFUSED, "a.wav"]), ("1", ["--from-file", "list.txt"]):
        result = command("-o", folder, "-q", *words)
        assert result.stderr.count("demucs-infer: error") == len(REFUSED)
        assert len(stems_of(tmp_path / folder)) == len(SOURCES)
    for url in REFUSED:
        assert command("-o", url, "a.wav").stderr.count("demucs-infer: error") == 1


def test_refused_addresses_open_nothing_in_python_and_in_a_cluster(
    no_store: None, separator: Separator, fast_repo: Path, tmp_path: Path
) -> None:
    options = {"model": "tiny", "repo": fast_repo, "device": "cpu", "shifts": 0, "progress": False}
    worker = SeparateTracks(str(tmp_path), **options)
    for url in [*REFUSED, "", "a\0b"]:
        for door in (separator.separate_audio_file, separator.separate_to_files):
            with pytest.raises(DemucsInferError):
                door(url)
        with pytest.raises(DemucsInferError):
            separator.separate_to_files(tmp_path / "a.wav", url)
        with pytest.raises(DemucsInferError):
            SeparateTracks(url, **options)
        assert worker({"input": url})["error"]


def test_an_operator_allows_more(
    monkeypatch: pytest.MonkeyPatch, separator: Separator, tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_bytes(wav(0.1))
    url = f"local://{tmp_path}/a.wav"
    with pytest.raises(LoadAudioError, match="DEMUCS_INFER_PROTOCOLS"):
        separator.separate_audio_file(url)
    monkeypatch.setenv("DEMUCS_INFER_PROTOCOLS", "ftp, local")
    separator.separate_audio_file(url)


NAMES = [
    "a :: b.wav",
    "x.wav",
    "x.wav::y.wav",
    "x?y.wav",
    "x#y.wav",
    "100%25.wav",
    "x[1]*.wav",
    "http:..x.wav",
]


def test_letters_that_mean_something_in_addresses(
    separator: Separator,
    memory: fsspec.AbstractFileSystem,
    bucket: s3fs.S3FileSystem,
    tmp_path: Path,
) -> None:
    """Each track has stems of its own, under its own name, in every store."""
    for number, name in enumerate(NAMES):
        content = wav(0.1, number)
        (tmp_path / name).write_bytes(content)
        memory.pipe_file(f"/in/{name}", content)
        bucket.pipe_file(f"bucket/in/{name}", content)
    tracks = {
        "local": list(find_tracks([tmp_path])),
        "memory": list(find_tracks([Url("memory://in")])),
        "s3": list(find_tracks([Url("s3://bucket/in")])),
    }
    outputs = {"local": "memory://out", "memory": "s3://bucket/out", "s3": f"file://{tmp_path}/out"}
    for kind, found in tracks.items():
        assert {track.name for track in found} == set(NAMES)
        stems = {
            str(stem.path): stem.path
            for track in found
            for stem in separator.separate_to_files(track, outputs[kind]).stems.values()
        }
        assert len(stems) == len(SOURCES) * len(NAMES)
        assert all(map(exists, stems.values()))


def test_double_slashes(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/in//a.wav", b"x")
    memory.pipe_file("/in/a.wav", b"y")
    read = []
    for url in ("memory://in//a.wav", "memory://in/a.wav"):
        with reading(location(url)) as file:
            read.append(file.read())
    assert read == [b"x", b"y"]
    stems = Output("memory://out", "{track}//{stem}").paths(
        Url("memory://in//a.wav"), "m", ["bass"]
    )
    assert list(map(str, stems.values())) == ["memory://out/a/bass"]


def test_lists_of_every_encoding(command: Command, tmp_path: Path) -> None:
    (tmp_path / "söng.wav").write_bytes(wav(0.1))
    for number, encoding in enumerate(("utf-8", "utf-8-sig", "utf-16", "utf-32")):
        (tmp_path / "list.txt").write_bytes("# ä\r\nsöng.wav\r\n".encode(encoding))
        command("--from-file", "list.txt", "-o", number)
        assert stems_of(tmp_path / str(number)) == {f"tiny/söng/{name}.wav" for name in SOURCES}


def test_wrong_lines_of_a_list_and_wrong_names_stop_no_other_track(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "none.txt").touch()
    lines = {
        b"a\0b.wav": "NUL",
        b"x" * 304 + b".wav": "name too long",
        b"x" * 100_000: "too long",
        b"a/" * 3000 + b"b.wav": "too long",
        "söng.wav\n".encode("utf-16-le"): "NUL",
        b"caf\xe9.wav": "no such file",
    }
    for line, words in lines.items():
        (tmp_path / "list.txt").write_bytes(line + b"\na.wav\n")
        result = command("--from-file", "list.txt", "--json", "-q")
        assert words in result.stderr.lower() or words in result.stderr
        assert all(said.startswith("demucs-infer: error") for said in result.stderr.splitlines())
        assert {found["error"] is None for found in json_lines(result)} == {True, False}
        assert result.returncode == 1
    names = ("x" * 304 + ".wav", "none.txt/b.wav", "nothing://a", "--from-file lost.txt")
    for number, name in enumerate(names):
        result = command(*name.split(), "a.wav", "-q", "-o", number)
        assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
        assert len(stems_of(tmp_path / str(number))) == len(SOURCES)


@pytest.mark.parametrize("words", [[""], ["a.wav", ""], ["a.wav", "-o", ""], ["--from-file", ""]])
def test_empty_names_are_one_error(words: list[str], command: Command, tmp_path: Path) -> None:
    result = command(*words)
    assert result.returncode
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "separated").exists()


@pytest.fixture
def anyone() -> Iterator[Path]:
    """A folder for a user that is not the superuser, who may enter everything."""
    root = not os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the rights of POSIX")
@pytest.mark.parametrize("rights", [0o000, 0o311])
def test_a_folder_that_cannot_be_read_is_told(rights: int, anyone: Path) -> None:
    for name in ("open", "shut", "shut/inner"):
        (anyone / name).mkdir()
    for name in ("open/a.wav", "shut/b.wav", "shut/inner/c.wav"):
        (anyone / name).touch()
    (anyone / "shut").chmod(rights)
    for names in ([anyone], [anyone / "shut/inner", anyone / "shut", anyone / "open"]):
        faults: dict[Location, DemucsInferError] = {}
        found = find_tracks(names, report=faults.__setitem__)
        assert anyone / "open/a.wav" in list(found)
        assert any("shut: cannot be read" in str(fault) for fault in faults.values())
    (anyone / "shut").chmod(0o700)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    (tmp_path / "album/disc").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("album/disc/a.wav", "other/b.TS", "other/c.flv"):
        (tmp_path / name).touch()
    (tmp_path / "album/loop").symlink_to(tmp_path / "album")
    (tmp_path / "other/back").symlink_to(tmp_path / "album/disc")
    (tmp_path / "album/link").symlink_to(tmp_path / "other")
    (tmp_path / "album/link2").symlink_to(tmp_path / "other")
    found = [path.relative_to(tmp_path).as_posix() for path in find_tracks([tmp_path])]
    assert found == ["album/disc/a.wav", "other/b.TS", "other/c.flv"]
    apart = find_tracks([tmp_path], leave_out=tmp_path / "other")
    assert [path.name for path in apart] == ["a.wav"]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs devices and named pipes")
def test_folders_have_only_regular_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Named pipes, devices and links out of the folder are left out."""
    (tmp_path / "music/deep").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for name in ("music/a.wav", "music/deep/b.wav", "secret/c.wav", "secret/d.wav"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "music/x.wav")
    links = {
        "zero.wav": "/dev/zero",
        "fifo.wav": "x.wav",
        "lost.wav": "nowhere.wav",
        "out.wav": tmp_path / "secret/c.wav",
        "up.wav": "../secret/d.wav",
        "folder": tmp_path / "secret",
        "within.wav": "deep/b.wav",
        "all": "/",
    }
    for name, target in links.items():
        (tmp_path / "music" / name).symlink_to(target)
    for number in range(1500):  # more links than a recursive reader can follow
        suffix = "" if number else ".wav"
        (tmp_path / f"music/chain{number}{suffix}").symlink_to(f"chain{number + 1}")
    for folder in (tmp_path / "music", Url(f"file://{tmp_path}/music")):
        caplog.clear()
        found = {track.name for track in find_tracks([folder])}
        # The link within and its target are one file, which may be found under either name.
        assert {"a.wav"} < found - {"chain0.wav"} <= {"a.wav", "b.wav", "within.wav"}
        for name in ("out.wav", "up.wav", "folder", "all"):
            assert f"music/{name}" in caplog.text
    found = {track.name for track in find_tracks([Url(f"file://{tmp_path}/music/[axz]*.wav")])}
    assert found == {"a.wav"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs short names of folders")
def test_folders_in_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a recursive search can enter."""
    monkeypatch.chdir(tmp_path)
    Path("a.wav").touch()
    for _ in range(1200):
        Path("x").mkdir()
        os.chdir("x")
    assert [*find_tracks([tmp_path])] == [tmp_path / "a.wav"]
    # pytest could not remove them.
    for _ in range(1200):
        os.chdir("..")
        Path("x").rmdir()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs pipes that have names")
def test_named_pipes(repo: Path, tmp_path: Path) -> None:
    """A FIFO, the device of standard input, and a shell's process substitution."""
    (tmp_path / "a.wav").write_bytes(wav(0.5))
    os.mkfifo(tmp_path / "fifo.wav")
    writer = threading.Thread(
        target=lambda: (tmp_path / "fifo.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    )
    writer.start()
    options = f"--repo {repo} -n tiny --seed 1 -o out"
    script = f"cat a.wav | {sys.executable} -m demucs_infer {options} a.wav fifo.wav"
    script += " /dev/stdin <(cat a.wav)"
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    writer.join()
    assert result.returncode == 0, result.stderr
    stems = [soundfile.info(path).frames for path in (tmp_path / "out").rglob("bass.wav")]
    assert stems == [4000] * 4
