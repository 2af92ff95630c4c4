from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from demucs_infer.batch.folders import Folders
from demucs_infer.batch.tracks import find_tracks, plan_jobs
from demucs_infer.errors import LoadAudioError, OptionError
from demucs_infer.storage.locations import Url, location
from demucs_infer.write.output import PIPE, Output

from .helpers import SOURCES


@pytest.fixture
def music(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tracks, other files, hidden ones and stems, in the current folder."""
    for name in (
        "music/b.mp3",
        "music/a.WAV",
        "music/cover.jpg",
        "music/._a.WAV",
        "music/.trash/c.wav",
        "music/disc 2/a.WAV",
        "music/separated/htdemucs/a/vocals.wav",
        "music/empty/readme.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return Path("music")


def test_folders_are_searched(music: Path) -> None:
    names = ["music/a.WAV", "music/b.mp3", "music/disc 2/a.WAV"]
    stems = ["music/separated/htdemucs/a/vocals.wav"]
    assert [path.as_posix() for path in find_tracks([music])] == names + stems
    found = find_tracks([music], leave_out=Path("music/separated"))
    assert [path.as_posix() for path in found] == names


def test_a_file_that_is_named_comes_once_whatever_it_is(music: Path) -> None:
    named = [music / "cover.jpg", music / "a.WAV", Path("music/../music/a.WAV")]
    assert list(find_tracks([*named, PIPE, PIPE])) == [named[0], named[1], PIPE]


def test_patterns_for_shells_that_do_not_expand_them(music: Path) -> None:
    pattern = music / "*.[wW]*"
    assert list(find_tracks([pattern], expand=True)) == [music / "a.WAV"]
    with pytest.raises(LoadAudioError, match="no such file"):
        list(find_tracks([pattern], expand=False))
    (music / "song [1].wav").touch()
    assert list(find_tracks([music / "song [1].wav"], expand=True)) == [music / "song [1].wav"]


def stems_of(track: str, **options: str) -> list[str]:
    (job,) = plan_jobs([Path(track)], Output("out", **options), "model", SOURCES[:1])
    return [path.relative_to("out").as_posix() for path in job.paths.values()]


def test_templates() -> None:
    template = "{parent}/{model}-{track}.{trackext}/{stem}.{ext}"
    assert stems_of("x/y/a.b.mp3", filename=template, format="flac") == [
        "y/model-a.b.mp3/drums.flac"
    ]
    assert stems_of("a.wav", filename="{stem}{{}}.{ext}") == ["drums{}.wav"]
    aligned = stems_of("abcde.wav", filename="{track[0]}/{track:.3}-{stem:>6}.{ext}")
    assert aligned == ["a/abc- drums.wav"]


@pytest.mark.parametrize(
    ("filename", "message"),
    [
        ("{song}/{stem}.{ext}", "template"),
        ("{stem", "template"),
        ("../{stem}.{ext}", "outside"),
        ("/etc/{stem}", "outside"),
        ("..", "outside"),
        ("", "outside"),
        ("{track:1000000000}/{stem}", "template"),
        ("{track:{stem}}/{stem}", "template"),
        ("{stem.__class__.__mro__[1]}", "template"),
        ("{track[x]}{stem}", "template"),
        ("{stem:d}", "template"),
        ("{stem}\0", "template"),
    ],
)
def test_templates_that_are_refused(filename: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Output("out", filename)


def test_stems_stay_below_their_folder_or_url(tmp_path: Path) -> None:
    url = Output("s3://bucket/out", "{parent}/{track}/{stem}")
    (job,) = plan_jobs([Url("s3://in/../..wav")], url, "m", ["bass"])
    assert job.paths["bass"] == Url("s3://bucket/out/_/..wav/bass")
    for parent in ("..", "x/.."):
        paths = Output(tmp_path, "{parent}/{track}/{stem}").paths(
            Path(parent, "..wav"), "model", ["drums"]
        )
        assert tmp_path in paths["drums"].parents


@pytest.mark.parametrize(
    ("tracks", "options", "message"),
    [
        (["a.mp3", "a.wav"], {}, "would both become"),
        (["x/a.mp3", "y/a.mp3"], {}, "{parent}"),
        (["a.mp3", "b.mp3"], {"filename": "{stem}.{ext}"}, "would both become"),
        (["a.mp3"], {"filename": "{track}.{ext}"}, "lacks {stem}"),
        (["out/a/drums.wav", "a.mp3"], {}, "would replace a track"),
        (["s3://x/a.wav", "s3://y/a.wav"], {"folder": "s3://o"}, "become s3://o/a/drums.wav"),
    ],
)
def test_stems_in_the_way_are_refused(tracks: list, options: dict, message: str) -> None:
    output = Output(**{"folder": "out", **options})
    with pytest.raises(OptionError, match=message):
        plan_jobs(map(location, tracks), output, "model", SOURCES)


def test_links_and_capitals_are_seen_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if sys.platform != "win32":
        (tmp_path / "link").symlink_to("out")
        with pytest.raises(OptionError, match="would replace"):
            plan_jobs([Path("link/a/drums.wav"), Path("a.mp3")], Output("out"), "m", SOURCES)
    both = [Path("Song.wav"), Path("song.mp3")]
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OptionError, match="would both become"):
        plan_jobs(both, Output("out"), "m", SOURCES)


def test_standard_output_takes_one_stem() -> None:
    assert Output("-").paths(PIPE, "m", ["drums"]) == {"drums": PIPE}
    with pytest.raises(OptionError, match="takes one stem, not 4"):
        plan_jobs([PIPE], Output("-"), "m", SOURCES)


@pytest.mark.parametrize(
    ("named", "track", "folder"),
    [
        ("A", "A/Hits/01.mp3", "Hits"),
        ("A", "A/01.mp3", ""),
        (".", "x/y.mp3", "x"),
        ("/music", "/music/x/y.mp3", "x"),
        ("song.mp3", "song.mp3", ""),
        ("music/*", "music/A/B/1.mp3", "A/B"),
        ("s3://b/in", "s3://b/in/A/1.mp3", "A"),
        ("s3://b", "s3://b/A/1.mp3", "A"),
        ("s3://b/in/*.mp3", "s3://b/in/A/1.mp3", "A"),
        ("other", "A/B/1.mp3", ""),
    ],
)
def test_folders_below_what_was_named(named: str, track: str, folder: str) -> None:
    folders = Folders()
    assert list(folders.noting([named.rstrip("/")])) == [named.rstrip("/")]
    assert pickle.loads(pickle.dumps(folders)).of(track) == folder


def test_a_tree_keeps_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("music/A/Hits/01.mp3", "music/B/Hits/01.mp3", "single.mp3"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    names = [Path("music"), Path("single.mp3")]
    with pytest.raises(OptionError, match=r"tell them apart with \{folder\}"):
        plan_jobs(find_tracks(names), Output("out"), "m", ["a"])
    folders = Folders()
    output = Output("out", "{folder}/{track}/{stem}.{ext}", player=True)
    jobs = plan_jobs(find_tracks(folders.noting(names)), output, "m", ["a"], folders)
    assert [Path(str(path)).as_posix() for job in jobs for path in job.files] == [
        "out/A/Hits/01/a.wav",
        "out/A/Hits/01/player.html",
        "out/B/Hits/01/a.wav",
        "out/B/Hits/01/player.html",
        "out/single/a.wav",
        "out/single/player.html",
    ]
    urls = plan_jobs([Url("s3://b/x/1.mp3")], Output("s3://o", "{folder}/{stem}.{ext}"), "m", ["a"])
    assert [str(path) for job in urls for path in job.files] == ["s3://o/a.wav"]
