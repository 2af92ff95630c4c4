"""MP4 files as trees of boxes: read them, and add those that FFmpeg does not write.

    ftyp  mdat ──────────  moov ─┬─ mvhd          a box is its size (4 bytes, or 1 and then 8 bytes
                                 ├─ trak …        behind the name), its name (4 bytes), and its
                                 └─ udta ── stem  content

In files that we write, `moov` comes last, and so it may grow: no offset of a sample changes.
ISO/IEC 14496-12 defines the boxes; Native Instruments defines `stem`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

HEADER, LONG_HEADER = 8, 16  # bytes
MOST_BOXES = 10_000  # side by side: more would only keep us busy
EMPTY = -1  # media time of an edit in which nothing is presented


class Box(NamedTuple):
    """A box: its name, and where it starts, its content starts, and it stops."""

    name: bytes
    start: int
    content: int
    stop: int


def walk(file: IO[bytes], start: int = 0, stop: int | None = None) -> Iterator[Box]:
    """Yield the boxes side by side in `file`. Raises `ValueError` for sizes that make no sense."""
    stop = file.seek(0, os.SEEK_END) if stop is None else stop
    for _ in range(MOST_BOXES):
        if start + HEADER > stop:
            return
        file.seek(start)
        header = file.read(LONG_HEADER).ljust(LONG_HEADER, b"\0")
        size, name, long_size = struct.unpack(">I4sQ", header)
        content = start + (LONG_HEADER if size == 1 else HEADER)
        size = {0: stop - start, 1: long_size}.get(size, size)
        if not content - start <= size <= stop - start:
            raise ValueError(f"the box {name!r} is damaged")
        # `meta` of ISO files, not of QuickTime, has four bytes of version and flags.
        content += 4 if name == b"meta" and header[12:] != b"hdlr" else 0
        yield Box(name, start, content, start + size)
        start += size
    raise ValueError(f"there are more than {MOST_BOXES} boxes")


def find(file: IO[bytes], *names: bytes, inside: Box | None = None) -> list[Box]:
    """Return the boxes along the path `names`, as far as there are any, the first of each name."""
    found: list[Box] = []
    start, stop = (inside.content, inside.stop) if inside else (0, None)
    for name in names:
        box = next((box for box in walk(file, start, stop) if box.name == name), None)
        if box is None:
            break
        found.append(box)
        start, stop = box.content, box.stop
    return found


def box(name: bytes, content: bytes) -> bytes:
    """Return a box as bytes."""
    return struct.pack(">I4s", HEADER + len(content), name) + content


def add(file: IO[bytes], path: tuple[bytes, ...], content: bytes) -> None:
    """Append `content` to the box at `path`, which is made if it is missing.

    Raises `ValueError` if the first box of the path does not come last in `file`.
    """
    found = find(file, *path)
    if not found or found[0].stop != file.seek(0, os.SEEK_END):
        raise ValueError(f"{path[0]!r} is not at the end of the file")
    for name in reversed(path[len(found) :]):
        content = box(name, content)
    file.seek(found[-1].stop)
    tail = file.read()
    file.seek(found[-1].stop)
    file.write(content + tail)
    for parent in found:
        file.seek(parent.start)
        file.write(struct.pack(">I", parent.stop - parent.start + len(content)))


def read_tempo(file: IO[bytes]) -> int | None:
    """Return the beats per minute that an MP4 file states, which FFmpeg does not read."""
    path = (b"moov", b"udta", b"meta", b"ilst", b"tmpo", b"data")
    try:
        found = find(file, *path)
    except ValueError:
        return None
    if len(found) < len(path):
        return None
    file.seek(found[-1].content + 8)  # behind type and language
    return int.from_bytes(file.read(min(4, max(0, found[-1].stop - file.tell()))), "big") or None


def set_languages(file: IO[bytes], languages: Sequence[str]) -> None:
    """Set the languages of the tracks, three letters each; others are left alone.

    FFmpeg writes those that had a number on the first Macintosh, and no others, into QuickTime.
    """
    (moov,) = find(file, b"moov")
    tracks = (box for box in walk(file, moov.content, moov.stop) if box.name == b"trak")
    for track, language in zip(tracks, languages):
        _, header = find(file, b"mdia", b"mdhd", inside=track)
        file.seek(header.content)
        version = file.read(1)[0]
        if re.fullmatch("[a-z]{3}", language):
            first, second, third = (ord(letter) - 0x60 for letter in language)
            file.seek(header.content + (32 if version else 20))
            file.write(struct.pack(">H", first << 10 | second << 5 | third))


def skip_priming(file: IO[bytes], samples: int) -> None:
    """Leave out the encoder's delay before the first sample, in tracks of sound that start late.

    FFmpeg lets such a track start `samples` earlier, with the decoded delay. Two edits of a track,
    in units that are samples:

        nothing, for n               nothing, for n + samples
        the media from 0 on    ──▶   the media from `samples` on
    """
    (moov,) = find(file, b"moov")
    for track in walk(file, moov.content, moov.stop):
        if track.name != b"trak":
            continue
        handler = find(file, b"mdia", b"hdlr", inside=track)
        edits = find(file, b"edts", b"elst", inside=track)
        if len(handler) == len(edits) == 2:
            file.seek(handler[-1].content + 8)
            if file.read(4) == b"soun":
                _shift_edits(file, edits[-1].content, samples)


def _shift_edits(file: IO[bytes], at: int, samples: int) -> None:
    file.seek(at)
    version, count = struct.unpack(">B3xI", file.read(8))
    entry = struct.Struct(">QqI" if version else ">IiI")
    if count != 2:
        return
    (gap, first, rate), (length, media, same) = entry.iter_unpack(file.read(2 * entry.size))
    if first == EMPTY:
        file.seek(at + 8)
        file.write(entry.pack(gap + samples, EMPTY, rate))
        file.write(entry.pack(length - samples, media + samples, same))
