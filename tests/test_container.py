"""Files of all stems of a track."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import demucs.htdemucs
import mutagen
import numpy as np
import pytest
import soundfile
import torch
from mutagen import mp4

from demucs_infer.api import Separator
from demucs_infer.audio import AudioFile, save_audio
from demucs_infer.errors import OptionError
from demucs_infer.write.encode import encoder
from demucs_infer.write.formats import MIX, find_format
from demucs_infer.write.metadata import EVERY_COVER, read_cover

from .helpers import (
    SOURCES,
    TINY,
    Command,
    ffmpeg,
    lag,
    noise,
    probe,
    save_package,
    shake,
    sound,
    stem_box,
)

RATE = 8000  # of the tiny model
COVER = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00\x1f"
    b"\x15\xc4\x89\x00\x00\x00\rIDATx\x9cc\xf8\xff\xff?\x00\x05\xfe\x02\xfe\xa7\x9a\xa2\x9f\x00"
    b"\x00\x00\x00IEND\xaeB`\x82"
)


def enabled(path: Path) -> list[bool]:
    """Return for each track of an MP4 file if players play it by default."""
    data, flags, at = path.read_bytes(), [], 0
    while (at := data.find(b"tkhd", at)) >= 0:
        flags.append(bool(data[at + 7] & 1))
        at += 4
    return flags


def falcon() -> Path:
    """Return a stem file that another program has made, with a cover."""
    spec = find_spec("stempeg")
    if spec is None or spec.origin is None:
        pytest.skip("needs stempeg")
    return next(Path(spec.origin).parent.glob("data/*.stem.mp4"))


@pytest.fixture
def song(tmp_path: Path) -> Path:
    """A second of sound with tags and a cover. Its length is no multiple of a codec's frames."""
    path = tmp_path / "song.m4a"
    save_audio(0.3 * noise(2, RATE + 7), path, RATE)
    song = mutagen.File(path)
    song.update({"\xa9nam": ["A song"], "\xa9ART": ["Somebody"], "trkn": [(3, 0)]})
    song["covr"] = [mp4.MP4Cover(COVER, mp4.MP4Cover.FORMAT_PNG)]
    song.save()
    return path


@pytest.mark.parametrize(
    "cover",
    [COVER[:16] + b"\x7f\xff\xff\xff" * 2 + COVER[24:], b"\xff\xd8\xff\xe0" + bytes(100)],
    ids=["png of exapixels", "jpeg"],
)
def test_cover_is_copied_and_never_decoded(cover: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.stem.mp4"
    with path.open("w+b") as file:
        target = encoder(file, find_format("stem.mp4"), RATE, 2, ["mix", "a"], cover=cover)
        target.write([noise(2, RATE)] * 2)
        target.close()
    assert read_cover(AudioFile(path), EVERY_COVER) == cover


@pytest.mark.parametrize("codec", ["aac", "alac"])
def test_stem_file_equals_one_of_native_instruments(
    codec: str, command: Command, separator: Separator, song: Path, tmp_path: Path
) -> None:
    """The same box field by field, and the streams, tags and cover that players look for."""
    lossless = ["--codec", "alac", "--int24"] if codec == "alac" else []
    assert command("--shifts", 0, "--format", "stem.mp4", *lossless, song).returncode == 0
    path = tmp_path / "separated/tiny/song.stem.mp4"
    theirs, ours = stem_box(falcon()), stem_box(path)
    assert {**ours, "stems": 0, "mastering_dsp": 0} == {**theirs, "stems": 0, "mastering_dsp": 0}
    for part, values in theirs["mastering_dsp"].items():
        assert ours["mastering_dsp"][part] == pytest.approx({**values, "enabled": False}, abs=1e-6)
    assert [stem["color"] for stem in ours["stems"]] == [s["color"] for s in theirs["stems"]]
    assert [stem["name"] for stem in ours["stems"]] == SOURCES
    assert enabled(falcon()) == enabled(path) == [True, False, False, False, False]

    found = probe(path, "-show_streams", "-show_format")
    streams = [stream for stream in found["streams"] if stream["codec_type"] == "audio"]
    for stream in streams:
        assert stream["codec_name"] == codec
        assert (stream["start_pts"], stream["duration_ts"]) == (
            0,
            len(AudioFile(song).read()[0][0]),
        )
        assert (stream["sample_rate"], stream["channels"]) == (str(RATE), 2)
    assert [stream["tags"]["handler_name"] for stream in streams] == [MIX, *SOURCES]
    assert found["format"]["tags"]["title"] == "A song"
    assert found["format"]["tags"]["artist"] == "Somebody"
    assert ffmpeg("-i", path, "-map", "0:v", "-c", "copy", "-f", "image2pipe", "-") == COVER

    mixture, stems = separator.separate_audio_file(song)
    parts = [mixture.numpy(), *(stem.numpy() for stem in stems.values())]
    gain = 1 / max(1.01 * max(np.abs(part).max() for part in parts), 1)
    for index, part in enumerate(parts):
        heard = sound(path, index, part.shape[-1])
        assert heard.shape == part.shape
        assert lag(heard[0], part[0]) == 0
        error = np.abs(heard - gain * part)
        assert error.max() <= 2**-22 if codec == "alac" else error.std() < 0.1 * part.std()
    assert len(AudioFile(path)) == 5
    again, _ = separator.separate_audio_file(path)  # its first stream
    assert torch.allclose(again[:, : mixture.shape[-1]], mixture * gain, atol=0.05)


def test_matroska_file_holds_stems_of_all_kinds(
    command: Command, song: Path, tmp_path: Path
) -> None:
    assert command("--format", "mka", "--stems", "all,rest=drums+bass", song).returncode == 0
    path = tmp_path / "separated/tiny/song.mka"
    streams = probe(path, "-show_streams")["streams"]
    titles = [s["tags"]["title"] for s in streams if s["codec_name"] == "flac"]
    assert titles == [MIX, *SOURCES, "rest"]
    assert [s["tags"]["mimetype"] for s in streams if s["codec_type"] == "video"] == ["image/png"]
    waves = [sound(path, index) for index in range(6)]
    assert {wave.shape for wave in waves} == {(2, AudioFile(song).read().shape[-1])}
    assert np.abs(waves[1] + waves[2] - waves[5]).max() <= 3 * 2**-15


def test_stem_file_of_fewer_stems_with_longer_names(
    command: Command, song: Path, tmp_path: Path
) -> None:
    stems = f"vocals,{'n' * 40}=drums+bass"
    assert command("--format", "stem.mp4", "--stems", stems, song).returncode == 0
    path = tmp_path / "separated/tiny/song.stem.mp4"
    assert [stem["name"] for stem in stem_box(path)["stems"]] == ["vocals", "n" * 32]
    assert len(AudioFile(path)) == 3


@pytest.mark.slow
def test_six_stems_become_four(command: Command, song: Path, tmp_path: Path) -> None:
    sources = ["vocals", "guitar", "drums", "piano", "bass", "other"]
    torch.manual_seed(0)
    model = demucs.htdemucs.HTDemucs(**{**TINY, "sources": sources})
    save_package(tmp_path / "tiny.th", shake(model))
    options = ["--format", "stem.mp4", "--codec", "alac", "--int24", "--shifts", 0]
    warning = command("--repo", tmp_path, *options, song).stderr
    assert all(word in warning for word in ("guitar", "piano", "'other'"))
    path = tmp_path / "separated/tiny/song.stem.mp4"
    assert [stem["name"] for stem in stem_box(path)["stems"]] == SOURCES
    mixture, stems = Separator("tiny", tmp_path, shifts=0).separate_audio_file(song)
    folded = stems["other"] + stems["guitar"] + stems["piano"]
    highest = max(part.abs().max().item() for part in (mixture, *stems.values(), folded))
    gain = 1 / max(1.01 * highest, 1)
    assert np.abs(sound(path, 3) - gain * folded.numpy()).max() < 1e-3 * highest
    with pytest.raises(OptionError, match="not 5"):
        Separator("tiny", tmp_path, shifts=0, stems=sources[:5]).separate_to_files(
            song, tmp_path, format="stem.mp4"
        )


def test_mix_of_a_track_at_48_khz_is_not_resampled(
    command: Command, track: Path, tmp_path: Path
) -> None:
    options = ["--format", "mka", "--keep-rate", "--clip-mode", "none"]
    assert command(*options, track).returncode == 0
    path = tmp_path / "separated/tiny/track.mka"
    given, rate = soundfile.read(track, dtype="float32", always_2d=True)
    assert {s["sample_rate"] for s in probe(path, "-show_streams")["streams"]} == {str(rate)}
    assert np.abs(sound(path, 0) - given.T).max() <= 2**-14
    assert sound(path, 1).shape == given.T.shape


def test_matroska_file_goes_through_pipes(command: Command, song: Path, tmp_path: Path) -> None:
    result = command("--format", "mka", "-o", "-", "-", input=song.read_bytes())
    assert result.returncode == 0, result.stderr
    (tmp_path / "out.mka").write_bytes(result.stdout.encode("utf-8", "surrogateescape"))
    assert len(AudioFile(tmp_path / "out.mka")) == 5
