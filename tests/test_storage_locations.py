"""Tracks and stems by URL: a real S3 server on loopback, fsspec's memory, the web."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import s3fs

from demucs_infer.api import Separator
from demucs_infer.batch.tracks import find_tracks, read_list
from demucs_infer.errors import LoadAudioError, SaveAudioError
from demucs_infer.storage.locations import Url, location, parent_name, publish

from .helpers import SOURCES, Command, assert_one_line, environment, run, stems_of, wav
from .tools.web import serving


@pytest.mark.parametrize(
    ("text", "name", "folder", "suffix"),
    [
        ("s3://bucket/in/song.mp3", "song.mp3", "in", ".mp3"),
        ("s3://bucket/in/100%25 ?#.Wav", "100%25 ?#.Wav", "in", ".Wav"),
        ("gs://bucket/song", "song", "bucket", ""),
        ("memory://a.b/c/", "c", "a.b", ""),
        ("https://host/a%20b/s%C3%B6ng%2F1.mp3?key=a/b.c#d", "söng_1.mp3", "a b", ".mp3"),
    ],
)
def test_names_of_urls(text: str, name: str, folder: str, suffix: str) -> None:
    url = location(text)
    assert isinstance(url, Url)
    assert (url.name, parent_name(url), Path(url.name).suffix) == (name, folder, suffix)


CREDENTIALS = """https://user:secret@host/in/a.wav?secret#secret https://user:se?secret@host/in/a.wav
    http://user:#secret@[::1]:80/in/a.wav sftp://user:se/secret@host/in/a.wav az://in/a?sig=secret
    sftp://user:secret@in/a.wav s3://in/a.wav::https://user:secret@host/a.wav?secret
    zip://a.wav::sftp://user:secret@in/a.wav ftp://user:secret@host/in/a.wav?secret"""


@pytest.mark.parametrize("text", CREDENTIALS.split())
def test_no_text_of_a_url_has_credentials(text: str) -> None:
    url = location(text)
    assert "secret" not in f"{url} {url!r} {parent_name(url)}"
    assert "in" in str(url)


@pytest.mark.parametrize("text", ["a.wav", "C://a.wav", "c:\\a.wav", "a/s3:/b", "/s3://b", "1://a"])
def test_what_is_a_path(text: str) -> None:
    assert location(text) == Path(text)


@pytest.mark.slow
def test_separation_of_a_file_imports_no_store_and_no_compiler(repo: Path, track: Path) -> None:
    """The compiler needs a temporary folder."""
    code = "import sys; from demucs_infer.separate import command; command(sys.argv[1:]);"
    code += "assert not {'fsspec', 'ray', 'torch._dynamo'} & set(sys.modules)"
    result = run("-c", code, "--repo", repo, "-n", "tiny", "-o", track.parent / "out", track)
    assert result.returncode == 0, result.stderr


def test_patterns_and_lists_of_urls(
    bucket: s3fs.S3FileSystem, memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    names = ("x/a.wav", "x/b.wav", "y/c.wav", "y/d [1].wav", "y/notes.txt", "y/song", "y/.e/f.wav")
    for name in names:
        bucket.pipe(f"bucket/{name}", b"x")
        memory.pipe(f"/bucket/{name}", b"x")
    (tmp_path / "list.txt").write_bytes(
        "\ufeff# two\r\n\r\n  s3://bucket/x/*.wav \r\nmemory://bucket/y\n"
        "s3://bucket/y/d [1].wav\n/local/é.wav\ns3://bucket/y/song\ns3://bucket/none/*".encode()
    )
    listed = read_list(tmp_path / "list.txt")
    missing: list[str] = []
    found = find_tracks(listed, report=lambda name, error: missing.append(str(name)))
    assert list(map(str, found)) == [
        "s3://bucket/x/a.wav",
        "s3://bucket/x/b.wav",
        "memory://bucket/y/c.wav",
        "memory://bucket/y/d [1].wav",
        "s3://bucket/y/d [1].wav",
        "s3://bucket/y/song",
        "s3://bucket/none/*",
    ]
    assert missing == [str(Path("/local/é.wav"))]
    memory.pipe("/list.txt", b"a.wav")
    assert list(read_list(Url("memory://list.txt"))) == [Path("a.wav")]
    with pytest.raises(LoadAudioError, match="no such file"):
        next(read_list(Url("memory://none.txt")))
    memory.pipe("/docs/notes.txt", b"x")
    with pytest.raises(LoadAudioError, match="no audio files in memory://docs"):
        list(find_tracks([Url("memory://docs")]))
    assert list(find_tracks([Url("s3://bucket")], leave_out=Url("s3://bucket/x"))) == [
        Url("s3://bucket/y/c.wav"),
        Url("s3://bucket/y/d [1].wav"),
    ]


def test_a_list_on_standard_input(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    result = command("--from-file", "-", input="# one\n\na.wav\nnone.wav\n")
    assert result.returncode == 1
    assert "none.wav: no such file" in result.stderr
    assert len(stems_of(tmp_path / "separated/tiny/a")) == 4
    assert_one_line(command("--from-file", "-", input="# none\n"), "lists no track")
    assert_one_line(command("--from-file", "-", "-", input="a.wav"), "standard input")
    assert_one_line(command("--from-file", "none.txt"), "none.txt: cannot be read")


def test_from_the_web(command: Command, tmp_path: Path) -> None:
    with serving() as web:
        web.others["söng.wav"] = web.others["s%C3%B6ng.wav"] = wav()
        command(f"{web.url}/in/s%C3%B6ng.wav", "-o", tmp_path / "out")
    expected = {f"tiny/söng/{name}.wav" for name in SOURCES}
    assert stems_of(tmp_path / "out") == expected
    assert not list((tmp_path / "out/tiny").glob(".*"))


def test_credentials_are_not_shown(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(0.1))
    tracks = "a.wav", "http://user:secret@127.0.0.1:1/b.wav?secret", "az://c/c.wav?sig=secret"
    result = command(*tracks, "-v", "-o", "memory://user:secret@out")
    assert result.stderr.count("failed: ") == 2
    assert "Stems in memory://out/tiny/a/" in result.stderr
    assert "secret" not in result.stdout + result.stderr


def test_in_python(separator: Separator, memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/in/a.wav", wav())
    (tmp_path / "a.wav").write_bytes(wav())
    here = separator.separate_to_files(tmp_path / "a.wav", tmp_path / "out")
    there = separator.separate_to_files("memory://in/a.wav", "memory://out [x]/*")
    for name, stem in there.stems.items():
        assert str(stem.path) == f"memory://out [x]/*/a/{name}.wav"
        local: Path = here.stems[name].path
        assert memory.cat_file(f"/out [x]/*/a/{name}.wav") == local.read_bytes()
    _, stems = separator.separate_audio_file("memory://in/a.wav")
    assert stems.keys() == there.stems.keys()
    with pytest.raises(LoadAudioError, match=r"memory://in/none\.wav: no such file"):
        separator.separate_audio_file("memory://in/none.wav")


def test_a_stem_appears_whole_or_not_at_all(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload that breaks off leaves the previous file, and nothing beside it."""
    memory.pipe("/out/a.wav", b"before")
    (tmp_path / "stem").write_bytes(b"whole")
    put = type(memory).put_file

    def broken(store: fsspec.AbstractFileSystem, source: str, path: str, **options: object) -> None:
        put(store, source, path, **options)
        raise OSError("broken pipe")

    monkeypatch.setattr(type(memory), "put_file", broken)
    with pytest.raises(SaveAudioError, match=r"a\.wav: cannot be written \(broken pipe\)"):
        publish(tmp_path / "stem", Url("memory://out/a.wav"))
    assert memory.find("/out") == ["/out/a.wav"]
    assert memory.cat_file("/out/a.wav") == b"before"
    monkeypatch.setattr(type(memory), "put_file", put)
    publish(tmp_path / "stem", Url("memory://out/a.wav"))
    assert memory.find("/out") == ["/out/a.wav"]
    assert memory.cat_file("/out/a.wav") == b"whole"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of POSIX")
def test_killed_and_begun_again(bucket: s3fs.S3FileSystem, repo: Path) -> None:
    """A written file is whole, and is not made again."""
    names = "abcd"
    for name in names:
        bucket.pipe(f"bucket/in/{name}.wav", wav(20, ord(name)))
    options = ["--repo", str(repo), "-n", "tiny", "--seed", "1", "--skip-existing"]
    command = [sys.executable, "-m", "demucs_infer", *options, "-o", "s3://bucket/out"]
    process = subprocess.Popen(
        [*command, "s3://bucket/in"], stderr=subprocess.DEVNULL, env=environment()
    )
    while process.poll() is None and len(bucket.find("bucket/out")) < 5:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = bucket.find("bucket/out", detail=True)
    result = subprocess.run([*command, "s3://bucket/in/*.wav"], env=environment(), check=False)
    assert result.returncode == 0
    after = bucket.find("bucket/out", detail=True)
    stems = {f"bucket/out/tiny/{track}/{stem}.wav" for track in names for stem in SOURCES}
    assert after.keys() == stems
    # The content is the same, as the seed is.
    files = {key: info for key, info in made.items() if info["type"] == "file"}
    assert all(after[key]["ETag"] == info["ETag"] for key, info in files.items())
    assert [after[key] == made[key] for key in made if "/a/" in key] == [True] * 4


@pytest.mark.parametrize(
    ("track", "options", "words"),
    [
        ("s3://nobucket/a.wav", [], ["s3://nobucket/a.wav: no such file"]),
        ("s3://nobucket", [], ["nobucket"]),
        ("s3://nobucket/*.wav", [], ["s3://nobucket"]),
        ("s3://bucket/none.wav", [], ["no such file"]),
        ("a.wav", ["-o", "s3://nobucket/out"], ["s3://nobucket/out/tiny", "no such bucket"]),
        ("a.wav", ["-o", "https://host/out"], ["can only be read"]),
        ("nothing://bucket/a.wav", [], ["nothing"]),
        ("a.wav", ["-o", "nothing://bucket"], ["nothing"]),
        ("a.wav", ["-o", "s3://bucket", "--filename", "../../{stem}"], ["outside"]),
        ("a.wav", ["-o", "s3://bucket", "--filename", "/{stem}"], ["outside"]),
        ("s3://bucket/tiny/a/bass.wav", ["-o", "s3://bucket", "a.wav"], ["would replace"]),
    ],
    ids=str,
)
def test_one_line_says_what_is_wrong(
    track: str,
    options: list,
    words: list,
    bucket: s3fs.S3FileSystem,
    command: Command,
    tmp_path: Path,
) -> None:
    (tmp_path / "a.wav").write_bytes(wav(0.1))
    assert_one_line(command(track, *options, "-q"), *words)
    assert not bucket.find("bucket")


def test_no_credentials(
    bucket: s3fs.S3FileSystem, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path / "a.wav").write_bytes(wav(0.1))
    result = command("a.wav", "-o", "s3://bucket/out", "-q")
    assert_one_line(result, "s3://bucket/", "credentials")


def test_a_back_end_that_is_not_installed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    result = command("gs://bucket/a.wav")
    assert_one_line(result, "gs://bucket/a.wav needs gcsfs: pip install gcsfs")
