"""What a file claims without having the bytes for it, corrected before FFmpeg believes it.

FFmpeg (all versions up to 9) unpacks a compressed tag of 200 kB to 200 MB, and makes an entry in
memory for each sample that an MP4 file says it has, with a few bytes for a billion of them.

    ID3v2    compressed frames get a name that nobody asks for
    MP4      samples of one size are counted no further than the file's bytes go; an index that is
             compressed may become as long as the file is a few times
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from .boxes import walk
from .mending import ID3_SIZE, patched

TAGS = (b"ID3", b"ea3")  # what tags begin with
# Looking ahead, as one may begin within another: AIFF has its tags behind a chunk's name, "ID3 ".
ID3 = re.compile(rb"(?=(?:ID3|ea3)[\0-\xfe][\0-\xfe].[\0-\x7f]{4})", re.DOTALL)
FRAME = 10  # bytes of a frame's header
LARGEST_FRAME = 2**28  # bytes: FFmpeg reads none that is larger
COMPRESSED = 8  # in a frame's second byte of flags
HIDDEN = b"X"  # in place of a frame's first letter
MOST_FRAMES = 100_000  # of all tags of a file
BLOCK = 2**20  # bytes that are searched at once
TABLES = re.compile(  # of samples that are all alike, or of one movie header that is packed
    rb"stsz.{4}(?P<size>.{4})(?P<samples>.{4})|trun.(?P<flags>.{3})(?P<run>.{4})"
    rb"|cmvd(?P<length>.{4})|(?P<elsewhere>sidx|tfra)",
    re.DOTALL,
)
LONGEST_TABLE = 16  # bytes of what `TABLES` finds
EACH = 0x0F00  # flags of a run whose samples each have bytes there
SHARED = 4  # tracks of full length
PACKING = 16  # an index is packed by less
SMALL_INDEX = 2**20  # bytes


MOVIES = (b"moov", b"hoov", b"free")  # boxes, of which FFmpeg needs one
HANDLER = re.compile(rb"hdlr.{8}(.{4})", re.DOTALL)
HANDLERS = {b"soun", b"alis", b"url ", b"mdir", b"mdta"}  # of sound, of where it is, of tags
EVEN = re.compile(rb"stts.{4}\x00{3}\x01.{4}\x00{3}\x01", re.DOTALL)  # each takes one unit


class Honest(io.RawIOBase):
    """A file in which claims that it cannot keep are corrected while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        self._frames = 0
        file.seek(0)
        self._patches = Movie(file, self._size).patches()
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        at = self._file.tell()
        # A tag's header may end here that began in what was read before.
        start = max(0, at - ID3_SIZE + 1)
        self._file.seek(start)
        data = self._file.read(size if size < 0 else size + at - start)
        for found in ID3.finditer(data) if any(map(data.__contains__, TAGS)) else ():
            self._hide_compressed(start + found.start())
        data = data[at - start :]
        self._file.seek(at + len(data))
        return patched(data, at, self._patches)

    def _hide_compressed(self, tag: int) -> None:
        """Rename the frames of a tag that are compressed, wherever FFmpeg may look for frames."""
        head = bytes_at(self._file, tag, ID3_SIZE + 4)
        starts = [tag + ID3_SIZE]
        if head[5] & 0x40:  # a further header, whose length has two readings
            starts += [starts[0] + length for length in (_syncsafe(head[10:]) + n for n in (0, 4))]
        seen = set[int]()
        while starts:
            at = starts.pop()
            if at not in seen and at + FRAME <= self._size:
                seen.add(at)
                starts += self._following(at)

    def _following(self, at: int) -> list[int]:
        """Where the next frame may be: there are two ways to write a length."""
        self._frames += 1
        if self._frames > MOST_FRAMES:
            raise ValueError(f"its tags have more than {MOST_FRAMES} frames")
        head = bytes_at(self._file, at, FRAME)
        length, flags = int.from_bytes(head[4:8], "big"), head[9]
        if length == 0:
            return [at + self._padding(at)]
        if head[0] == 0:
            return []
        if flags & COMPRESSED:
            self._patches[at] = HIDDEN
        lengths = {length, _folded(length)}
        return [at + FRAME + n for n in lengths if 0 < n <= LARGEST_FRAME]

    def _padding(self, at: int) -> int:
        """Bytes of empty frames from `at` on."""
        data = bytes_at(self._file, at + FRAME, BLOCK)
        return FRAME + (len(data) - len(data.lstrip(b"\0"))) // FRAME * FRAME


def _is_plain_sound(track: bytes) -> bool:
    """Tell whether a track is of sound whose samples take one unit of time each, without doubt."""
    once = all(track.count(name) == 1 for name in (b"trak", b"stsz", b"stts"))
    handlers = set(HANDLER.findall(track))
    return once and b"soun" in handlers and handlers <= HANDLERS and bool(EVEN.search(track))


def bytes_at(file: BinaryIO, start: int, size: int) -> bytes:
    """What is there of so many bytes from `start` on."""
    file.seek(start)
    return file.read(size)


def _syncsafe(data: bytes) -> int:
    return sum((byte & 0x7F) << shift for byte, shift in zip(data, (21, 14, 7, 0)))


def _folded(length: int) -> int:
    """A length that was read as four bytes, of which each has only seven bits."""
    return _syncsafe(length.to_bytes(4, "big"))


class Movie:
    """The boxes of an MP4 or QuickTime file, if `file` is one."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._left = SHARED * size  # samples, each of a byte at least

    def patches(self) -> dict[int, bytes]:
        """What is to be written where. Raises `ValueError` for what no patch can mend."""
        found, elsewhere = dict[int, bytes](), False
        boxes = list(self._boxes())
        if not any(name in MOVIES for name, _, _ in boxes):
            return found
        for name, start, stop in boxes:
            if name == b"mdat":
                continue
            plain = self._plain_sound(start, stop) if name == b"moov" else []
            for at, table in self._tables(start, stop):
                if not any(at + table.start() in track for track in plain):
                    found.update(self._corrected(at, table))
                elsewhere |= table["elsewhere"] is not None
        # An index of fragments may say that one of them lies amidst the samples.
        for _, start, stop in (box for box in boxes if elsewhere and box[0] == b"mdat"):
            for at, table in self._fragments(start, stop):
                found.update(self._corrected(at, table))
        return found

    def _boxes(self) -> Iterator[tuple[bytes, int, int]]:
        """Name, start and stop of those that are in no other, as far as there are boxes."""
        start = 0
        while ID3.match(head := bytes_at(self._file, start, ID3_SIZE)):
            start += ID3_SIZE + _syncsafe(head[6:])
        while start < self._size:
            head = bytes_at(self._file, start, 16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            length = length or self._size - start
            if length < 8:
                return
            yield head[4:8], start, min(start + length, self._size)
            start += length

    def _plain_sound(self, start: int, stop: int) -> list[range]:
        """The tracks of a `moov` whose samples FFmpeg counts by chunks, so that any number will do.

        Old kinds of sound have more samples than bytes.
        """
        moov = bytes_at(self._file, start, stop - start)
        try:
            tracks = [box for box in walk(moov, 8) if box.name == b"trak"]
        except (ValueError, struct.error):
            return []
        return [
            range(start + track.start, start + track.stop)
            for track in tracks
            if _is_plain_sound(moov[track.start : track.stop])
        ]

    def _tables(self, start: int, stop: int) -> Iterator[tuple[int, re.Match[bytes]]]:
        """Places and matches of `TABLES` in a part of the file."""
        for at in range(start, stop, BLOCK):
            data = bytes_at(self._file, at, min(BLOCK + LONGEST_TABLE - 1, stop - at))
            for table in TABLES.finditer(data):
                if table.start() < BLOCK:
                    yield at, table

    def _fragments(self, start: int, stop: int) -> Iterator[tuple[int, re.Match[bytes]]]:
        """As `_tables`, from the first thing on that may be a fragment."""
        for at in range(start, stop, BLOCK):
            data = bytes_at(self._file, at, min(BLOCK + 3, stop - at))
            if b"moof" in data:
                yield from self._tables(at, stop)
                return

    def _corrected(self, at: int, table: re.Match[bytes]) -> Iterator[tuple[int, bytes]]:
        """The patches of a table that was found in what lies at `at`."""
        if table["length"]:
            yield self._index(at + table.end(), at + table.start("length"), table["length"])
        for name in ("samples", "run"):
            if table[name] and (count := self._too_many(table, name)) is not None:
                yield at + table.start(name), count.to_bytes(4, "big")

    def _too_many(self, table: re.Match[bytes], name: str) -> int | None:
        """How many samples there may be, if a table has more and has no bytes for them."""
        count = int.from_bytes(table[name], "big")
        size = int.from_bytes(table["size"] or b"\1", "big")
        if not size or (table["flags"] and int.from_bytes(table["flags"], "big") & EACH):
            return None
        possible = min(self._size, self._left) // size
        self._left -= min(count, possible) * size
        return possible if count > possible else None

    def _index(self, start: int, place: int, length: bytes) -> tuple[int, bytes]:
        """The length to which a compressed index is unpacked, no more than it may be.

        Raises `ValueError` if what comes out makes claims of its own.
        """
        longest = min(int.from_bytes(length, "big"), max(SMALL_INDEX, PACKING * self._size))
        packed = bytes_at(self._file, start, self._size - start)
        unpacked = zlib.decompressobj().decompress(packed, longest + 1)
        inner = Movie(io.BytesIO(unpacked), self._size)
        inner._size, inner._left = self._size, self._left
        for table in TABLES.finditer(unpacked):
            if table["length"] or dict(inner._corrected(0, table)):
                raise ValueError("its index is longer than the file")
        return place, longest.to_bytes(4, "big")
