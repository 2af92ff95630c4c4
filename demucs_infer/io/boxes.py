"""MP4 files as trees of boxes: what FFmpeg does not write is added to the end of a file.

    ftyp  mdat ──────────  moov ─┬─ mvhd          a box is its size (4 bytes, or 1 and then 8 bytes
                                 ├─ trak …        behind the name), its name (4 bytes), and what is
                                 └─ udta ── stem  in it

`moov` comes last, and so it may grow: no offset of a sample changes. ISO/IEC 14496-12 has the
boxes; that of stems is by Native Instruments.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

HEADER, LONG_HEADER = 8, 16  # bytes
LARGEST_MOOV = 2**30  # bytes, of what is read into memory
EMPTY = -1  # media time of an edit in which nothing is presented


class Box(NamedTuple):
    """A box: its name, and where it and what is in it lie."""

    name: bytes
    start: int
    content: int
    stop: int


def walk(data: bytes | bytearray, start: int = 0, stop: int | None = None) -> Iterator[Box]:
    """The boxes side by side in `data`. Raises `ValueError` where they make no sense."""
    stop = len(data) if stop is None else stop
    while start < stop:
        size, name = struct.unpack_from(">I4s", data, start)
        content = start + HEADER
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, content)
            content = start + LONG_HEADER
        if not content - start <= size <= stop - start:
            raise ValueError(f"the box {name!r} is damaged")
        yield Box(name, start, content, start + size)
        start += size


def find(data: bytes | bytearray, *names: bytes) -> Box | None:
    """The first box that lies at the path `names`, if there is one."""
    start, stop, found = 0, len(data), None
    for name in names:
        found = next((box for box in walk(data, start, stop) if box.name == name), None)
        if found is None:
            return None
        start, stop = found.content, found.stop
    return found


def add_to_user_data(moov: bytes, name: bytes, content: bytes) -> bytes:
    """`moov` with one more box in its `udta`, which is made if it is not there."""
    added = _box(name, content)
    udta = find(moov, b"moov", b"udta")
    if udta is None:
        return _box(b"moov", moov[HEADER:] + _box(b"udta", added))
    grown = _box(b"udta", moov[udta.content : udta.stop] + added)
    return _box(b"moov", moov[HEADER : udta.start] + grown + moov[udta.stop :])


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", HEADER + len(content), name) + content


def read_moov(file: IO[bytes]) -> tuple[int, bytes]:
    """The box `moov` of an MP4 file and its place. Raises `ValueError` if it does not come last."""
    end, start = file.seek(0, os.SEEK_END), 0
    while start + HEADER <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(HEADER))
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(LONG_HEADER - HEADER))
        if name == b"moov" and start + size == end and size <= LARGEST_MOOV:
            file.seek(start)
            return start, file.read(size)
        start += max(size, HEADER)
    raise ValueError("no index at the end of the file")


def replace_moov(file: IO[bytes], start: int, moov: bytes) -> None:
    """Write `moov` where the old one, which is not longer, begins."""
    file.seek(start)
    file.write(moov)
    file.flush()


def skip_priming(moov: bytes, samples: int) -> bytes:
    """`moov` in which tracks of sound that start late leave out what their encoder put before.

    FFmpeg lets such a track start `samples` earlier, with what a decoder makes of the encoder's
    delay. Two edits of a track, in units that are samples:

        nothing, for n               nothing, for n + samples
        the media from 0 on    ──▶   the media from `samples` on
    """
    patched = bytearray(moov)
    for track in walk(moov, HEADER, len(moov)):
        part = moov[track.start : track.stop]
        handler = find(part, b"trak", b"mdia", b"hdlr")
        edits = find(part, b"trak", b"edts", b"elst")
        if handler and edits and part[handler.content + 8 : handler.content + 12] == b"soun":
            _shift_edits(patched, track.start + edits.content, samples)
    return bytes(patched)


def _shift_edits(moov: bytearray, at: int, samples: int) -> None:
    version, count = moov[at], struct.unpack_from(">I", moov, at + 4)[0]
    entry = struct.Struct(">QqI" if version else ">IiI")
    at += 8  # version and flags, count
    if count != 2 or entry.unpack_from(moov, at)[1] != EMPTY:
        return
    gap, _, rate = entry.unpack_from(moov, at)
    length, media, same = entry.unpack_from(moov, at + entry.size)
    entry.pack_into(moov, at, gap + samples, EMPTY, rate)
    entry.pack_into(moov, at + entry.size, length - samples, media + samples, same)
