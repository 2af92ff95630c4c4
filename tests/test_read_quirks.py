"""Files that FFmpeg misreads. If FFmpeg itself is right here, remove the work-around."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.audio import AudioFile
from demucs_infer.errors import LoadAudioError
from demucs_infer.read.quirks import Link

from .helpers import FFMPEG_MAJOR, noise

ID3 = b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)
PCM = bytes.fromhex("0100000000001000800000aa00389b71")
HE_AAC = Path(__file__).parent / "data" / "he_aac.m4a"  # whose encoder FFmpeg does not have


def wav_of_24_in_32(samples: np.ndarray) -> bytes:
    """int32 samples `[T, C]` whose lowest byte is zero, as an extensible WAV file."""
    channels = samples.shape[1]
    block = 4 * channels
    fmt = struct.pack("<HHIIHH", 0xFFFE, channels, 44100, 44100 * block, block, 32)
    fmt += struct.pack("<HHI", 22, 24, 0) + PCM
    data = samples.astype("<i4").tobytes()
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + len(data)) + b"WAVE" + chunks + data


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_wav_of_24_bits_in_32_is_decoded(channels: int, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-(2**23), 2**23, (1000, channels)) * 256
    path = tmp_path / "a.wav"
    path.write_bytes(wav_of_24_in_32(samples))
    wav = AudioFile(path).read(streams=0)
    assert torch.equal(wav, torch.from_numpy((samples.T / 2**31).astype(np.float32)))
    with av.open(str(path)) as container:  # FFmpeg takes them for floats
        assert container.streams.audio[0].codec_context.name == "pcm_f24le"


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "CAF", "W64", "RF64"])
def test_id3_tags_before_a_container_are_skipped(kind: str, tmp_path: Path) -> None:
    path, plain = tmp_path / f"a.{kind.lower()}", tmp_path / f"plain.{kind.lower()}"
    soundfile.write(plain, noise(2, 1000).T.numpy(), 44100, format=kind, subtype="PCM_16")
    path.write_bytes(ID3 + ID3 + plain.read_bytes())
    assert torch.equal(AudioFile(path).read(), AudioFile(plain).read())
    if kind == "WAV":
        with pytest.raises(av.FFmpegError):
            av.open(str(path)).close()


@pytest.mark.parametrize("padding", [2529, 3553, 2048])
def test_he_aac_starts_on_time(padding: int, tmp_path: Path) -> None:
    data = HE_AAC.read_bytes()
    path = tmp_path / "a.m4a"
    path.write_bytes(data.replace(b" 000009E1 ", b" %08X " % padding))
    plain = tmp_path / "plain.m4a"
    plain.write_bytes(data.replace(b"iTunSMPB", b"iTunSMPX"))
    ours, whole = AudioFile(path).read(streams=0), AudioFile(plain).read(streams=0)
    expected = whole[:, 2 * padding :]
    # FFmpeg 9 also drops the padding at the end.
    assert 0 <= expected.shape[-1] - ours.shape[-1] < 2 * 2048
    assert torch.equal(ours, expected[:, : ours.shape[-1]])
    path.write_bytes(data.replace(b" 000009E1 ", b" nonsense "))
    assert torch.equal(AudioFile(path).read(streams=0), whole)
    if FFMPEG_MAJOR < 9:  # it drops half of the padding of 2529 samples
        with av.open(str(HE_AAC)) as container:
            assert next(container.decode(audio=0)).pts == 1265


def test_links_of_an_ogg_file_are_found_behind_junk_up_to_a_number() -> None:
    soundfile.write(first := io.BytesIO(), noise(2, 5000).T.numpy(), 44100, format="OGG")
    once = first.getvalue()
    expected = AudioFile(first).read()
    twice = AudioFile(io.BytesIO(once + bytes(70_000) + once)).read()
    assert torch.equal(twice, torch.cat([expected, expected], -1))
    pages = [b"OggS\0" + bytes([flags, *bytes(20), 1, 0]) for flags in (2, 0)]
    with pytest.raises(LoadAudioError, match="more than 10000 streams"):
        AudioFile(io.BytesIO(b"".join(pages) * 10_001)).read()


@pytest.mark.parametrize("start", [0, 3, 8, 10])
@pytest.mark.parametrize("size", [1, 4, -1])
def test_link_reads_a_patched_range_of_a_file(start: int, size: int) -> None:
    link = Link(io.BytesIO(bytes(range(20))), 2, 16, "a.wav")
    link.patch = 4, 255
    whole = bytes([2, 3, 4, 5, 255, *range(7, 16)])
    link.seek(start)
    assert link.read(size) == whole[start : None if size < 0 else start + size]
    assert link.seek(0, 2) == 14
    assert link.read(5) == b""
    assert link.seek(-1) < 0  # an error, for FFmpeg
