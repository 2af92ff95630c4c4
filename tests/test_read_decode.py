"""Files as FFmpeg's command reads them: healthy ones to the sample, damaged ones in step.

The inputs are made by that command when the tests run; without it they are skipped.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from demucs_infer.audio import AudioFile
from demucs_infer.errors import LoadAudioError
from demucs_infer.read.packets import Damage

from .helpers import FFMPEG_MAJOR, lag, probe

FFMPEG = shutil.which("ffmpeg")
pytestmark = pytest.mark.skipif(FFMPEG is None, reason="needs the command ffmpeg")
SECONDS = 4

# Name and options of FFmpeg; formats that this build cannot write are skipped.
HEALTHY = {
    "a.wav": "",
    "double.wav": "-c:a pcm_f64le -ac 6",
    "u8.wav": "-c:a pcm_u8 -ac 1 -ar 8000",
    "s24.wav": "-c:a pcm_s24le -ar 96000",
    "ima.wav": "-c:a adpcm_ima_wav",
    "alaw.wav": "-c:a pcm_alaw",
    "rf64.wav": "-rf64 always",
    "twenty-four.wav": "-af pan=24c|c0=c0|c23=c1",
    "768k.wav": "-ar 768000 -t 0.3",
    "a.w64": "-c:a pcm_s24le",
    "a.caf": "",
    "a.aiff": "",
    "a.au": "",
    "a.voc": "-c:a pcm_s16le",
    "a.flac": "",
    "24.flac": "-sample_fmt s32 -bits_per_raw_sample 24",
    "a.wv": "",
    "a.tta": "",
    "a.mp3": "",
    "bare.mp3": "-write_xing 0 -id3v2_version 0",
    "a.mp2": "",
    "a.aac": "",
    "a.ac3": "",
    "a.eac3": "",
    "a.dts": "-c:a dca -strict -2",
    "a.thd": "-c:a truehd -strict -2",
    "a.m4a": "",
    "alac.m4a": "-c:a alac -ac 8",
    "edit.m4a": "-c:a aac -ss 0.5 -t 2",
    "fragments.mp4": "-c:a aac -movflags frag_keyframe+empty_moov -frag_duration 500000",
    "pcm.mov": "-c:a pcm_s24le",
    "a.ogg": "-c:a libvorbis -page_duration 200000",
    "a.opus": "-c:a libopus -page_duration 200000",
    "a.oga": "-c:a flac",
    "a.spx": "-c:a libspeex -ar 32000",
    "a.mka": "-c:a flac",
    "aac.mkv": "-c:a aac -cluster_time_limit 500",
    "a.webm": "-c:a libopus",
    "a.ts": "-c:a aac",
    "mp2.ts": "-c:a mp2",
    "a.m2ts": "-c:a ac3",
    "a.mpg": "-c:a mp2",
    "a.avi": "-c:a mp3",
    "a.flv": "-c:a mp3",
    "a.wma": "",
    "a.nut": "-c:a mp3",
    "a.rm": "-c:a ac3",
    "a.wtv": "-c:a mp2",
}
HARMLESS = 1e-6  # between builds of FFmpeg
ROUNDED = {"ima.wav": 0.002}  # where its releases round differently
# Where damage leaves sound out, FFmpeg's command closes the gap: so do we without a clock.
CLOCKLESS = ["a.mp3", "a.mp2", "a.aac", "a.ac3", "a.eac3", "a.flac", "bare.mp3", "a.dts"]
TIMESTAMPED = "a.m4a a.ts mp2.ts a.m2ts aac.mkv a.mka a.opus a.oga a.ogg a.mpg a.flv a.wma".split()
# PyAV before 18 loses up to three good frames of a packet of FLAC if its fourth is damaged.
LOST = {"a.flac": 3 * 4608} if int(av.__version__.split(".")[0]) < 18 else {}
IN_PACKETS = "a.m4a a.ts mp2.ts a.m2ts a.mpg a.flv".split()  # and not in pages of a second
PLACES = {"first": [0], "middle": [0.5], "last": [1], "three": [0.25, 0.5, 0.75]}
HEADER = {".mkv": 900, ".mka": 900, ".opus": 2500, ".oga": 900, ".ogg": 6000, ".flac": 8300}


def ffmpeg(*words: object) -> bytes:
    command = [FFMPEG, "-v", "quiet", "-y", *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=60).stdout


def reference(path: Path, channels: int) -> torch.Tensor:
    """The first audio stream as FFmpeg's command decodes it, `[C, T]`."""
    samples = np.frombuffer(ffmpeg("-i", path, "-map", "0:a:0", "-f", "f32le", "-"), np.float32)
    whole = len(samples) // channels * channels
    return torch.from_numpy(samples[:whole].copy()).reshape(-1, channels).T


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise whose loudness changes, so that every part of it can be told from every other."""
    folder = tmp_path_factory.mktemp("sound")
    loud = "volume=0.1+0.8*mod(floor(t*7)\\,3)/3:eval=frame"
    noise = f"anoisesrc=d={SECONDS}:r=44100:a=0.3:seed=7,aformat=channel_layouts=stereo,{loud}"
    ffmpeg("-f", "lavfi", "-i", noise, "-c:a", "pcm_f32le", folder / "source.wav")
    return folder


def made(folder: Path, name: str) -> Path:
    """The healthy file of this name."""
    path = folder / name
    if not path.exists():
        ffmpeg("-i", folder / "source.wav", *HEALTHY[name].split(), path)
    if not path.exists() or not path.stat().st_size:
        path.touch()
        pytest.skip(f"this FFmpeg cannot write {name}")
    return path


def decoded(path: Path) -> tuple[torch.Tensor, Damage]:
    damage = Damage()
    return torch.cat(list(AudioFile(path).chunks(damage=damage)), dim=-1), damage


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_files_are_read_as_by_ffmpeg(name: str, folder: Path) -> None:
    path = made(folder, name)
    ours, damage = decoded(path)
    theirs = reference(path, ours.shape[0])
    file, about = AudioFile(path), probe(path, "-show_format", "-show_streams")
    (stream,) = about["streams"]
    rate = int(stream["sample_rate"])
    assert (file.channels(), file.samplerate(), len(file)) == (stream["channels"], rate, 1)
    assert file.duration == pytest.approx(float(about["format"].get("duration", 0)), rel=0.1)
    if name in ("a.m4a", "edit.m4a") and FFMPEG_MAJOR >= 9:
        # It also drops the padding at the end.
        assert 0 < theirs.shape[-1] - ours.shape[-1] < 1024
        theirs = theirs[:, : ours.shape[-1]]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= ROUNDED.get(name, HARMLESS)
    assert not damage


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "edit.m4a", "a.opus", "a.ts", "ima.wav"])
def test_an_excerpt_equals_that_of_the_whole_file(name: str, folder: Path) -> None:
    file = AudioFile(made(folder, name))
    whole, rate = torch.cat(list(file.chunks()), dim=-1), file.samplerate()
    length = whole.shape[1]
    for first in (rate // 10, length // 2, length - rate // 7, length - 1):
        for last in (None, first + rate // 20):
            excerpt = torch.cat(list(file.chunks(first=first, last=last)), dim=-1)
            assert torch.equal(excerpt, whole[:, first:last])
    for first in (length, 10**25):
        with pytest.raises(LoadAudioError, match="ends after"):
            list(file.chunks(first=first))


def damaged(folder: Path, name: str, places: list[float], target: Path, size: int = 300) -> Path:
    """A copy with `size` bytes of noise at each of the places, which are parts of its length."""
    data = bytearray(made(folder, name).read_bytes())
    first = HEADER.get(Path(name).suffix, 1200)
    for place in places:
        at = first + int(place * (len(data) - first - size - 600 * (name == "a.m4a")))
        data[at : at + size] = random.Random(1).randbytes(size)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("places", ["middle", "first", "last", "three"])
@pytest.mark.parametrize("name", CLOCKLESS)
def test_damage_in_a_raw_stream_shortens_it_as_by_ffmpeg(
    name: str, places: str, folder: Path, tmp_path: Path
) -> None:
    path = damaged(folder, name, PLACES[places], tmp_path / name)
    ours, _ = decoded(path)
    theirs = reference(path, ours.shape[0])
    assert abs(ours.shape[1] - theirs.shape[1]) <= LOST.get(name, 1536) * len(PLACES[places])
    assert lag(ours[0, -44100:], theirs[0, -44100:]) == 0


@pytest.mark.parametrize(
    ("name", "places"),
    [*((name, "middle") for name in TIMESTAMPED), *((name, "three") for name in IN_PACKETS)],
)
def test_damage_in_a_timestamped_stream_becomes_silence(
    name: str, places: str, folder: Path, tmp_path: Path
) -> None:
    path = damaged(folder, name, PLACES[places], tmp_path / name, 1500)
    ours, damage = decoded(path)
    healthy, _ = decoded(made(folder, name))
    rate = AudioFile(path).samplerate()
    assert abs(ours.shape[1] - healthy.shape[1]) <= 0.002 * rate
    assert lag(ours[0, : rate // 2], healthy[0, : rate // 2]) == 0
    assert abs(lag(ours[0, -rate // 2 :], healthy[0, -rate // 2 :])) <= 0.002 * rate
    assert damage.seconds > 0
    assert not damage.end_missing


def test_damage_is_counted_within_the_excerpt(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = AudioFile(damaged(folder, "a.m4a", PLACES["three"], tmp_path / "a.m4a"))
    rate = file.samplerate()
    for start, stop, places in ((0, 0.5, 0), (1.5, 2.5, 1), (0, SECONDS, 3), (3.5, SECONDS, 0)):
        caplog.clear()
        damage = Damage()
        chunks = file.chunks(0, round(start * rate), round(stop * rate), damage)
        assert sum(chunk.shape[1] for chunk in chunks) == pytest.approx(
            (stop - start) * rate, abs=3000
        )
        assert damage.places == places
        assert len(caplog.messages) == (places > 0)
        if places:
            assert f"{file.path}: " in caplog.text and f"{damage.seconds:.2f} s" in caplog.text


def test_zeroed_packets_become_silence_or_an_error_if_they_are_most(
    folder: Path, tmp_path: Path
) -> None:
    data = made(folder, "a.m4a").read_bytes()
    start, stop = data.index(b"mdat") + 4, data.index(b"moov") - 4
    path = tmp_path / "a.m4a"
    path.write_bytes(data[:start] + bytes(700) + data[start + 700 :])
    ours, damage = decoded(path)
    healthy, _ = decoded(made(folder, "a.m4a"))
    assert ours.shape == healthy.shape
    assert lag(ours[0], healthy[0]) == 0
    assert damage.places == 1
    middle = start + int(0.4 * (stop - start))
    path.write_bytes(data[:middle] + bytes(stop - middle) + data[stop:])
    with pytest.raises(LoadAudioError, match=r"\d+ of its \d+ packets are damaged"):
        decoded(path)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.aiff", "a.tta", "a.mka"])
def test_missing_end_is_reported(name: str, folder: Path, tmp_path: Path) -> None:
    data = made(folder, name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * 0.6)])
    ours, damage = decoded(path)
    assert ours.shape[1] / AudioFile(path).samplerate() == pytest.approx(0.6 * SECONDS, rel=0.5)
    assert damage.end_missing
    assert damage.seconds == pytest.approx(SECONDS - ours.shape[1] / 44100, abs=0.1)


def concatenated(folder: Path, path: Path, *options: str) -> list[Path]:
    """Encode the source with each of the options, write all files after another, and name them."""
    pieces = [path.with_name(f"{number}{path.suffix}") for number in range(len(options))]
    for piece, words in zip(pieces, options):
        ffmpeg("-i", folder / "source.wav", *words.split(), piece)
        if not piece.exists() or not piece.stat().st_size:
            pytest.skip("this FFmpeg lacks the encoder")
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return pieces


@pytest.mark.parametrize("name", ["a.mp3", "a.ac3"])
@pytest.mark.parametrize(
    "options",
    [
        ("-ar 44100", "-ar 48000"),
        ("-ac 2", "-ac 1"),
        ("-ac 1", "-ac 2"),
        ("-ar 48000", "-ar 32000"),
    ],
)
def test_change_of_rate_or_channels_in_mid_stream(
    options: tuple[str, str], name: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    bare = "-write_xing 0 -id3v2_version 0" if name == "a.mp3" else ""
    concatenated(folder, path, *(f"{words} {bare}" for words in options))
    ours, damage = decoded(path)
    theirs = reference(path, ours.shape[0])
    assert ours.shape[1] == pytest.approx(2 * SECONDS * AudioFile(path).samplerate(), rel=0.05)
    assert abs(ours.shape[1] - theirs.shape[1]) <= 1536
    assert lag(ours[0], theirs[0]) == 0
    assert not damage


@pytest.mark.parametrize(
    ("codec", "change"),
    [("libvorbis", "-ar 48000"), ("flac", "-ac 1"), ("flac", "-ar 48000"), ("libopus", "-ac 1")],
)
def test_all_links_of_a_chained_ogg_file_are_read(
    codec: str, change: str, folder: Path, tmp_path: Path
) -> None:
    path, plain = tmp_path / "a.ogg", f"-c:a {codec}"
    first, *_ = concatenated(folder, path, plain, f"{plain} {change}", plain)
    ours, damage = decoded(path)
    link, _ = decoded(first)
    assert ours.shape[1] == pytest.approx(3 * link.shape[1], abs=100)
    assert torch.equal(ours[:, : link.shape[1]], link)
    assert lag(ours[0, -link.shape[1] :], link[0]) == 0
    assert not damage
    assert AudioFile(path).duration == pytest.approx(3 * SECONDS, abs=0.1)


@pytest.mark.parametrize(("total", "missing"), [(0, False), (1000, False), (10**6, True)])
def test_wrong_length_in_a_flac_header_loses_no_samples(
    total: int, missing: bool, folder: Path, tmp_path: Path
) -> None:
    data = bytearray(made(folder, "a.flac").read_bytes())
    kept = int.from_bytes(data[18:26], "big") >> 36 << 36  # all but the number of samples
    data[18:26] = (kept | total).to_bytes(8, "big")
    path = tmp_path / "a.flac"
    path.write_bytes(data)
    ours, damage = decoded(path)
    assert torch.equal(ours, decoded(made(folder, "a.flac"))[0])
    assert damage.end_missing == missing  # nothing tells it from a file that breaks off


def test_dsf_is_decoded_as_by_ffmpeg(tmp_path: Path) -> None:
    channels, samples = 2, 4096 * 8 * 20
    sound = b"\x69" * (samples // 8 * channels)
    form = struct.pack(
        "<4sQIIIIIIQII", b"fmt ", 52, 1, 0, 2, channels, 2_822_400, 1, samples, 4096, 0
    )
    body = form + struct.pack("<4sQ", b"data", 12 + len(sound)) + sound
    path = tmp_path / "a.dsf"
    path.write_bytes(struct.pack("<4sQQQ", b"DSD ", 28, 28 + len(body), 0) + body)
    ours, damage = decoded(path)
    assert ours.shape == reference(path, channels).shape == (2, samples // 8)
    assert not damage


def test_opus_file_of_one_short_packet_is_decoded(folder: Path, tmp_path: Path) -> None:
    """The decoder returns its only frame when it is flushed, without a time base."""
    path = tmp_path / "a.opus"
    sine = "sine=d=0.02:r=48000"
    ffmpeg("-f", "lavfi", "-i", sine, "-c:a", "libopus", "-b:a", "6k", path)
    if not path.exists():
        pytest.skip("this FFmpeg has no libopus")
    ours, damage = decoded(path)
    assert ours.shape == (1, 960)
    assert not damage
