from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from demucs_infer.batch.tracks import find_tracks, plan_jobs
from demucs_infer.errors import OptionError
from demucs_infer.io.folders import Folders
from demucs_infer.storage.locations import Url
from demucs_infer.write.output import Output


@pytest.mark.parametrize(
    ("named", "track", "folder"),
    [
        ("A", "A/Hits/01.mp3", "Hits"),
        ("A", "A/01.mp3", ""),
        ("A/", "A/x/y/01.mp3", "x/y"),
        (".", "x/y.mp3", "x"),
        ("/music", "/music/x/y.mp3", "x"),
        ("song.mp3", "song.mp3", ""),
        ("A/song.mp3", "A/song.mp3", ""),
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
