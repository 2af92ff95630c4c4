"""Files of a few kilobytes that say they are gigabytes: nothing is believed that is not there."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import av
import pytest

from demucs_infer.audio import AudioFile
from demucs_infer.errors import LoadAudioError
from demucs_infer.io import claims
from demucs_infer.io.claims import Honest

from .helpers import noise

LONG = 10**6  # characters of a title that is packed into some of them
MANY = 10**6  # samples of a file of some kilobytes


def sound(format: str, codec: str, channels: int = 2, **options: str) -> bytes:
    """A tenth of a second of noise."""
    buffer = io.BytesIO()
    layout = {1: "mono", 2: "stereo"}[channels]
    wav = noise(channels, 4410).T.reshape(1, -1).contiguous().numpy()
    frame = av.AudioFrame.from_ndarray(wav, "flt", layout)
    frame.sample_rate = 44100
    with av.open(buffer, "w", format=format, options=options) as container:
        container.metadata["title"] = "noise"
        stream = container.add_stream(codec, rate=44100)
        stream.layout = layout
        for part in (frame, None):
            container.mux(stream.encode(part))
    return buffer.getvalue()


def read(data: bytes, step: int = 1000) -> bytes:
    """What FFmpeg is given of a file, in pieces."""
    file = Honest(io.BytesIO(data))
    return b"".join(iter(lambda: file.read(step), b""))


KINDS = [
    *[("wav", "pcm_s16le", 2), ("mp3", "mp3", 2), ("flac", "flac", 2), ("aiff", "pcm_s16be", 2)],
    *[("mp4", "aac", 2), ("ipod", "alac", 1), ("mov", "pcm_s24le", 2), ("ogg", "flac", 2)],
    *[("mov", "adpcm_ima_qt", 1), ("mov", "pcm_mulaw", 1), ("matroska", "flac", 2)],
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_files_that_claim_what_they_have(kind: tuple[str, str, int]) -> None:
    data = sound(*kind)
    for step in (7, 1000, 10**6):
        assert read(data, step) == data
    cut = data[: len(data) // 2]
    assert read(cut) == cut
    file = Honest(io.BytesIO(data))
    assert file.seek(-10, io.SEEK_END) == len(data) - 10
    assert (file.read(), file.tell()) == (data[-10:], len(data))


def syncsafe(number: int) -> bytes:
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def packed_tag(before: bytes = b"", after: bytes = b"") -> bytes:
    """An ID3v2 tag of some kilobytes with a frame of `LONG` letters."""
    body = syncsafe(LONG) + zlib.compress(b"\3" + b"A" * LONG, 9)
    frames = before + b"TIT2" + syncsafe(len(body)) + b"\0\x09" + body + after
    return b"ID3\4\0\0" + syncsafe(len(frames)) + frames


FRAME = b"TALB" + syncsafe(5) + b"\0\0" + b"\0four"
FURTHER = bytearray(packed_tag(syncsafe(10) + bytes(6)))  # a header behind the header
FURTHER[5] |= 0x40
TAGS = {
    "alone": packed_tag(),
    "before another frame": packed_tag(after=FRAME),
    "behind another frame": packed_tag(FRAME),
    "behind padding": packed_tag(bytes(100)),
    "twice": packed_tag() + packed_tag(),
    "behind a further header": bytes(FURTHER),
}


def longest_tag(file: object) -> int:
    with av.open(file, metadata_errors="replace") as container:
        return max(map(len, [*container.metadata.values(), ""]))


@pytest.mark.parametrize("kind", ["mp3", "aiff"])
@pytest.mark.parametrize("name", TAGS)
def test_a_tag_that_is_packed(name: str, kind: str, tmp_path: Path) -> None:
    tag, data = TAGS[name], sound(kind, {"mp3": "mp3", "aiff": "pcm_s16be"}[kind])
    if kind == "aiff":  # where tags are in a chunk
        data += b"ID3 " + struct.pack(">I", len(tag)) + tag + bytes(len(tag) % 2)
        data = b"FORM" + struct.pack(">I", len(data) - 8) + data[8:]
    else:
        data = tag + data
    path = tmp_path / "a"
    path.write_bytes(data)
    assert longest_tag(str(path)) >= LONG  # so it is an attack
    assert len(data) < LONG / 50
    file = AudioFile(path)
    assert max(map(len, file.info["format"]["tags"].values()), default=0) < 100
    assert file.read(streams=0).shape[-1] >= 4410


@pytest.mark.parametrize("step", [1, 3, 10, 64])
def test_a_tag_that_comes_in_pieces(step: int) -> None:
    tag = packed_tag()
    assert read(b"1234567" + tag, step) == b"1234567" + tag.replace(b"TIT2", b"XIT2")


def test_tags_without_end() -> None:
    frame = b"TIT2" + syncsafe(1) + b"\0\0A"
    data = packed_tag(frame * claims.MOST_FRAMES)
    with pytest.raises(ValueError, match="frames"):
        read(data)
    data = (b"ID3\4\0\0" + syncsafe(2**20)) * 1000 + bytes(10**5)
    assert read(data, 2**16) == data


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def swapped(movie: bytes, name: bytes, content: bytes) -> bytes:
    """`movie` with other content in the first box of a name, and nothing behind it moved."""
    start = movie.index(name) - 4
    (length,) = struct.unpack_from(">I", movie, start)
    new = box(name, content)
    left = length - len(new)
    new += box(b"free", bytes(left - 8)) if left else b""
    return movie[:start] + new + movie[start + length :]


def many_samples(samples: int = MANY) -> bytes:
    """Samples of one byte each, which nothing is there for."""
    movie = sound("mp4", "aac")
    movie = swapped(movie, b"stsc", struct.pack(">5I", 0, 1, 1, samples, 1))
    movie = swapped(movie, b"stts", struct.pack(">4I", 0, 1, samples, 1024))
    return swapped(movie, b"stsz", struct.pack(">3I", 0, 1, samples))


def many_in_fragments() -> bytes:
    movie = sound("mp4", "aac", movflags="empty_moov+default_base_moof+frag_keyframe")
    return swapped(movie, b"trun", struct.pack(">3I", 1, MANY, 100))


def packed_index() -> bytes:
    movie = sound("mov", "pcm_s16le")
    start = movie.rindex(b"moov") - 4
    moov = box(b"moov", movie[start + 8 :] + box(b"free", bytes(5 * LONG)))
    packed = box(b"cmvd", struct.pack(">I", len(moov)) + zlib.compress(moov, 9))
    return movie[:start] + box(b"moov", box(b"cmov", box(b"dcom", b"zlib") + packed))


def samples_of(movie: bytes) -> int:
    return struct.unpack_from(">I", movie, movie.index(b"stsz") + 12)[0]


def test_samples_that_are_not_there(tmp_path: Path) -> None:
    movie = many_samples()
    assert samples_of(movie) == MANY
    assert samples_of(read(movie)) == len(movie)
    (tmp_path / "a").write_bytes(movie)
    with pytest.raises(LoadAudioError):
        AudioFile(tmp_path / "a").read()


@pytest.mark.parametrize("other", [b"hdlr", b"stts", b"trak"])
def test_samples_that_are_not_there_and_look_plain(other: bytes) -> None:
    """A track of which it is not sure that its samples are counted by chunks."""
    plain = many_samples().replace(
        struct.pack(">4I", 0, 1, MANY, 1024), struct.pack(">4I", 0, 1, MANY, 1)
    )
    assert read(plain) == plain
    fake = box(other, bytes(8) + b"vide")
    start = plain.index(b"trak") - 4
    (length,) = struct.unpack_from(">I", plain, start)
    track = struct.pack(">I", length + len(fake)) + plain[start + 4 : start + length] + fake
    movie = box(b"ftyp", b"M4A ") + box(b"moov", track)
    assert read(movie) != movie


def test_fragments_that_are_not_there(tmp_path: Path) -> None:
    movie = many_in_fragments()
    mended = read(movie)
    at = movie.index(b"trun") + 8
    assert struct.unpack_from(">I", movie, at)[0] == MANY
    assert struct.unpack_from(">I", mended, at)[0] <= len(movie)
    assert mended[:at] + mended[at + 4 :] == movie[:at] + movie[at + 4 :]
    start = movie.index(b"moof") - 4
    amidst = movie[:start] + box(b"sidx", b"") + box(b"mdat", movie[start:])
    at = amidst.index(b"trun") + 8
    assert struct.unpack_from(">I", read(amidst), at)[0] <= len(amidst)


def test_tracks_that_share_what_is_there() -> None:
    table = box(b"stsz", struct.pack(">3I", 0, 1, 10_000))
    movie = box(b"moov", table * 100)
    counts = [struct.unpack_from(">I", read(movie), 8 + 20 * n + 16)[0] for n in range(100)]
    assert sum(counts) == claims.SHARED * len(movie)


def test_an_index_that_is_packed(tmp_path: Path) -> None:
    movie = packed_index()
    assert len(movie) < LONG / 20
    with av.open(io.BytesIO(movie)) as container:  # so FFmpeg unpacks it
        assert len(container.streams) == 1
    (tmp_path / "a").write_bytes(movie)
    with pytest.raises(LoadAudioError):
        AudioFile(tmp_path / "a").read()
    small = packed_small()
    assert read(small) == small
    with pytest.raises(ValueError, match="index"):
        read(packed_small(box(b"stsz", struct.pack(">3I", 0, 1, MANY))))


def packed_small(more: bytes = b"") -> bytes:
    movie = sound("mov", "pcm_s16le")
    start = movie.rindex(b"moov") - 4
    moov = box(b"moov", movie[start + 8 :] + more)
    packed = box(b"cmvd", struct.pack(">I", len(moov)) + zlib.compress(moov, 9))
    return movie[:start] + box(b"moov", box(b"cmov", box(b"dcom", b"zlib") + packed))
