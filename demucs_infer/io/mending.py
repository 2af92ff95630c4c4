"""What FFmpeg misreads, each in one place, with the versions that do.

`parts` gives a file as FFmpeg has to see it; `late_samples` what it forgets to drop.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, BinaryIO

ID3_SIZE = 10  # bytes of the header of an ID3v2 tag
CONTAINERS = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"riff", b"FORM", b"caff", b"OggS", b"DSD ")
PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")
HEAD = 2**16  # bytes in which the format chunk of a WAV file is looked for
PAGE = struct.Struct("<4sBBqIIIB")  # of Ogg: capture, version, flags, granule, …, segments
BEGINS = 2  # flag of the first page of a stream
UNKNOWN = 0x7FFFF000  # bytes: the length of samples that nobody has counted
SEARCH = 2**16  # bytes that are searched at once for the next page


class Part(io.RawIOBase):
    """The bytes from `start` to `stop` of a file, with those at `patches` replaced."""

    def __init__(
        self, file: BinaryIO, start: int, stop: int, patches: dict[int, bytes] | None = None
    ) -> None:
        self._file, self._start, self._size = file, start, stop - start
        self._patches = patches or {}
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        data = patched(data, self._at, self._patches)
        self._at += len(data)
        return data


def patched(data: bytes, start: int, patches: Mapping[int, bytes]) -> bytes:
    """`data`, which lies at `start` of a file, with what `patches` have for places in the file."""
    for place, patch in patches.items():
        at = place - start
        if -len(patch) < at < len(data):
            before, skip = max(0, at), max(0, -at)
            piece = patch[skip : skip + len(data) - before]
            data = data[:before] + piece + data[before + len(piece) :]
    return data


def parts(file: BinaryIO) -> list[BinaryIO]:
    """`file` as FFmpeg has to see it: the links of a chained Ogg stream one by one, else one."""
    size = file.seek(0, io.SEEK_END)
    start = _after_id3(file)
    head = _bytes_at(file, start, HEAD)
    if head[:4] == b"OggS":
        edges = [*_links(file, start, size), size]
        return [Part(file, *edge) for edge in pairwise(edges)]  # type: ignore[misc]
    return [Part(file, start, size, _patches(head))]  # type: ignore[list-item]


def _bytes_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _after_id3(file: BinaryIO) -> int:
    """The start of a container behind ID3v2 tags, else 0.

    FFmpeg (all versions up to 9) skips the tags when it guesses the format, and WAV, AIFF and the
    like are then refused by their own readers, which do not.
    """
    start = 0
    while (head := _bytes_at(file, start, ID3_SIZE))[:3] == b"ID3" and len(head) == ID3_SIZE:
        length = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0)))
        start += ID3_SIZE + length + (ID3_SIZE if head[5] & 0x10 else 0)
    head = _bytes_at(file, start, 12)
    return start if head[:4] in CONTAINERS or head[4:8] == b"ftyp" else 0


def _patches(head: bytes) -> dict[int, bytes]:
    """Of a WAV file with 24 valid bits in 32: all 32 are valid, since the others are zero.

    FFmpeg (all versions up to 9) takes it for an old kind of 24-bit float.
    """
    if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:12] != b"WAVE":
        return {}
    for name, at, length in _chunks(head):
        if name == b"fmt " and length >= 40:
            return _patch_of(head[at : at + 40], at)
    return {}


def missing_bytes(part: BinaryIO) -> int:
    """How many bytes of samples a WAV file says it has and does not.

    FFmpeg (all versions up to 9) takes the rest of the file without a word.
    """
    size = part.seek(0, io.SEEK_END)
    head = _bytes_at(part, 0, HEAD)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return 0
    for name, at, length in _chunks(head):
        if name == b"data":  # those who write to a pipe put the largest numbers there
            return max(0, at + length - size) if length < UNKNOWN else 0
    return 0


def _chunks(head: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and length of each chunk of a WAV file that begins in `head`."""
    at = 12
    while at + 8 <= len(head):
        length = int.from_bytes(head[at + 4 : at + 8], "little")
        yield head[at : at + 4], at + 8, length
        at += 8 + length + length % 2


def _patch_of(chunk: bytes, at: int) -> dict[int, bytes]:
    if len(chunk) < 40:
        return {}
    tag, channels, _, _, block, bits, _, valid = struct.unpack_from("<HHIIHHHH", chunk)
    extensible = tag == 0xFFFE and chunk[24:40] == PCM_GUID
    if extensible and bits == 32 and valid == 24 and block == 4 * channels:
        return {at + 18: struct.pack("<H", bits)}
    return {}


def _links(file: BinaryIO, start: int, size: int) -> Iterator[int]:
    """Where the links of a chained Ogg stream begin: first pages that come after other ones.

    FFmpeg 8 and 9 stop at a link with another rate or layout.
    """
    yield start
    began = False  # the first pages of this link are over
    at: int | None = start
    while at is not None and at + PAGE.size <= size:
        head = _bytes_at(file, at, PAGE.size + 255)
        capture, version, flags, *_, segments = PAGE.unpack_from(head.ljust(PAGE.size, b"\0"))
        if capture != b"OggS" or version:
            at = _find(file, at + 1, b"OggS")
            continue
        if flags & BEGINS and began:
            yield at
        began = not flags & BEGINS
        at += PAGE.size + segments + sum(head[PAGE.size : PAGE.size + segments])


def _find(file: BinaryIO, start: int, what: bytes) -> int | None:
    while data := _bytes_at(file, start, SEARCH):
        found = data.find(what)
        if found >= 0:
            return start + found
        start += max(1, len(data) - len(what) + 1)
    return None


def late_samples(container: Any, frame: Any) -> int:
    """How many samples too few were dropped before `frame`, the first of its stream.

    FFmpeg 7 to 8.1 (not 5.1, and not 9.0) drop what an `iTunSMPB` tag says in samples of HE-AAC's
    output, although it counts those of its core, which are half as many a second.
    """
    padding = _itunes_padding(container.metadata)
    if not padding or "mp4" not in container.format.name or frame.pts is None:
        return 0
    halved = frame.rate * frame.time_base == 2
    return padding if halved and abs(2 * frame.pts - padding) <= 2 else 0


def _itunes_padding(tags: dict[str, str]) -> int:
    fields = tags.get("iTunSMPB", "").split()
    try:
        return int(fields[1], 16)
    except (IndexError, ValueError):
        return 0
