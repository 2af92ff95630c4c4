from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import pytest
import soundfile
import torch

from demucs_infer.api import Separator
from demucs_infer.audio import AudioFile
from demucs_infer.engine.options import SeparationOptions, parse_time
from demucs_infer.errors import LoadAudioError, OptionError
from demucs_infer.read.packets import Damage
from demucs_infer.separate import main

from .helpers import noise

RATE = 44_100


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("1:30", 90),
        ("1:02:03.5", 3723.5),
        ("0", 0),
        (".5", 0.5),
        ("100:00", 6000),
        ("00:00:01", 1),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1:75", "1:60:00", "a", "1:", ":5", "1h", "nan", "1e3"])
def test_what_is_no_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        parse_time(text)
    with pytest.raises(SystemExit) as caught:
        main([f"--start={text}", "song.wav"])
    assert caught.value.code == 2
    assert "is not a time such as" in capsys.readouterr().err


@pytest.mark.parametrize("part", [{"start": -1}, {"duration": 0}, {"start": float("nan")}])
def test_parts_that_there_are_not(part: dict[str, Any], repo: Path, track: Path) -> None:
    with pytest.raises(OptionError, match=next(iter(part))):
        SeparationOptions(**part)
    with pytest.raises(OptionError):
        Separator("tiny", repo, device="cpu").separate_audio_file(track, **part)


def encoded(path: Path) -> Path:
    """Two seconds of noise in the format of the suffix."""
    wav = noise(2, 2 * RATE)
    codec = {"m4a": "aac", "mp3": "libmp3lame", "ogg": "libopus"}.get(path.suffix[1:])
    if codec is None:
        soundfile.write(path, wav.T.numpy(), RATE)
        return path
    with av.open(str(path), "w") as file:
        rate = 48_000 if codec == "libopus" else RATE
        stream = file.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(wav.T.reshape(1, -1).numpy(), "flt", "stereo")
        frame.sample_rate = rate
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a", "ogg"])
@pytest.mark.parametrize(("start", "duration"), [(0.5, 0.7), (1.23456, None), (None, 0.3), (0, 9)])
def test_a_part_is_what_a_file_cut_there_would_be(
    suffix: str, start: float | None, duration: float | None, tmp_path: Path
) -> None:
    """To the sample, whether the format can be sought in or not."""
    file = AudioFile(encoded(tmp_path / f"a.{suffix}"))
    whole, rate = torch.cat(list(file.chunks()), dim=-1), file.samplerate()
    first = round((start or 0) * rate)
    last = None if duration is None else first + round(duration * rate)
    part = torch.cat(
        list(file.chunks(0, *SeparationOptions(start=start, duration=duration).excerpt(rate))),
        dim=-1,
    )
    assert torch.equal(part, whole[:, first:last])


def test_damage_counts_within_a_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also in a format that is decoded from its beginning, and if the part ends before the file."""
    path = tmp_path / "a.m4a"
    data = bytearray(encoded(path).read_bytes())
    at = data.index(b"mdat") + len(data) // 2
    data[at : at + 2000] = bytes(2000)
    path.write_bytes(data)
    file = AudioFile(path)
    for start, stop, places in ((0, 0.3, 0), (0.5, 1.5, 1), (1.7, None, 0)):
        caplog.clear()
        options = SeparationOptions(start=start, duration=stop and stop - start)
        first, last = options.excerpt(RATE)
        damage = Damage()
        assert sum(block.shape[1] for block in file.chunks(0, first, last, damage)) > RATE / 4
        assert (damage.places, len(caplog.messages)) == (places, places)


def test_the_stems_of_a_part(
    repo: Path, track: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wav, rate = soundfile.read(track, dtype="float32", always_2d=True)
    cut = tmp_path / "cut.wav"
    soundfile.write(cut, wav[24_000:72_000], rate, subtype="FLOAT")
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    expected = separator.separate_audio_file(cut).stems
    stems = separator.separate_audio_file(track, start=0.5, duration=1).stems
    assert all(torch.equal(stems[name], expected[name]) for name in expected)
    assert separator.options.start is None
    common = ["-n", "tiny", "--repo", str(repo), "-d", "cpu", "--shifts", "0", "--float32"]
    options = ["--clip-mode", "none", "--start", "0:00.5", "--duration", "1", "--json"]
    main([*common, *options, "-o", str(tmp_path), str(track)])
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["seconds"] == 1
    for name, stem in result["stems"].items():
        samples, _ = soundfile.read(stem["path"], dtype="float32")
        assert (torch.from_numpy(samples.T) - expected[name]).abs().max() < 1e-6
    late = Separator("tiny", repo, device="cpu", start=5)
    with pytest.raises(LoadAudioError, match="ends after 2"):
        late.separate_audio_file(track)
