"""Tags and covers in the formats: the parts that FFmpeg's muxers leave out, or get wrong.

FFmpeg writes no comment, lyrics and compilation into MP3, no key, label and ISRC into MP4 and WAV,
calls a comment of Vorbis DESCRIPTION, and wants to decode a cover before it copies it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import IO, TYPE_CHECKING, Any

from .. import boxes
from ..log import logger
from ..tags import TAGS

if TYPE_CHECKING:
    from ..read.decode import AudioFile

# Media types of covers, by the first bytes of their files.
COVERS = {
    rb"\x89PNG": "image/png",
    rb"\xff\xd8\xff": "image/jpeg",
    rb"GIF8": "image/gif",
    rb"BM": "image/bmp",
    rb"RIFF....WEBP": "image/webp",
}
EVERY_COVER = tuple(COVERS.values())
LARGEST_COVER = 2**24  # bytes
ATTACHED_PICTURE = 0x400  # a flag of FFmpeg's
FRONT = 3  # type of a picture, in ID3 and FLAC
# Frames of ID3v2.4 that hold text and are not in the table of tags.
FRAMES = (
    "TCAT TDOR TDRL TFLT TIPL TKWD TMCL TOAL TOFN TOLY TOPE TOWN TPRO TRSN TRSO TSO2 TSOC TSST"
).split()
PADDING, LARGEST_BLOCK = 2**13, 2**24 - 1  # bytes, of FLAC
LONGEST_NAME = 32  # characters of a stem's name in a stem file
COLOURS = ("#009E73", "#D55E00", "#CC79A7", "#56B4E9")
# Of the player that mixes the stems: switched off, with the values of a new file.
MASTERING = json.loads("""{
    "compressor": {"enabled": false, "ratio": 3, "output_gain": 0.5, "input_gain": 0.5,
        "release": 0.3, "attack": 0.003, "threshold": 0, "hp_cutoff": 300, "dry_wet": 50},
    "limiter": {"enabled": false, "release": 0.05, "threshold": 0, "ceiling": -0.35}
}""")


def cover_type(cover: bytes | None) -> str | None:
    """Return the media type of a picture's file, or None if it is of another kind."""
    found = (kind for magic, kind in COVERS.items() if re.match(magic, cover or b"", re.DOTALL))
    return next(found, None)


def read_cover(audio: AudioFile, kinds: Sequence[str]) -> bytes | None:
    """Return the cover of a track, undecoded: the front one if it says which one that is.

    A warning names a cover that is not of one of the media types `kinds`, or too large.
    """
    if not kinds:
        return None
    found: list[tuple[bool, bytes]] = []
    with audio._open() as container:
        for stream in container.streams:
            name, data = stream.metadata.get("filename", ""), b""
            if stream.type == "video" and disposition(stream) & ATTACHED_PICTURE:
                data = bytes(next(container.demux(stream), b""))
            elif stream.metadata.get("mimetype", "").startswith("image/"):
                data = bytes(getattr(stream, "data", None) or b"")
            front = stream.metadata.get("comment") == "Cover (front)" or name.startswith("cover.")
            if data:
                found.append((front, data))
    # The first picture, unless another one is said to be the front cover.
    _, cover = max(found, key=itemgetter(0), default=(False, b""))
    kind = cover_type(cover)
    if cover and (kind not in kinds or len(cover) > LARGEST_COVER):
        about = f"{kind or 'of an unknown kind'}, {len(cover)} bytes"
        logger.warning("%s: the cover is left out (%s): convert it", audio.name, about)
        return None
    return cover or None


def disposition(stream: Any) -> int:
    """Return FFmpeg's flags of a stream, whose type differs between the releases of PyAV."""
    return getattr(stream.disposition, "value", stream.disposition)


class Metadata:
    """Tags, under our names, and the cover of a file.

    An encoder writes `head` before FFmpeg's file, opens FFmpeg's muxer with `options`, gives it the
    tags `names`, calls `attach`, and calls `finish` when FFmpeg has closed the file. `titles` are
    those of the streams.
    """

    def __init__(
        self, tags: Mapping[str, str], cover: bytes | None = None, titles: Sequence[str] = ()
    ) -> None:
        self.tags, self.titles = tags, titles
        self.cover_type = cover_type(cover)
        self.cover = cover if cover and self.cover_type else b""
        self.head, self.options = b"", dict[str, str]()
        self.priming = 0  # samples that the encoder put before the first one of a late sound
        self.languages = list[str]()  # of the streams of a video
        self.names = dict(tags)
        self.prepare()

    def prepare(self) -> None:
        """Set `head`, `options` and `names` where they differ."""

    def attach(self, container: Any) -> None:
        """Add the cover to a container that is not yet written."""

    def finish(self, file: IO[bytes]) -> None:
        """Add the tags and the cover that FFmpeg does not write."""


class Matroska(Metadata):
    """Matroska: FFmpeg writes tags and attachments."""

    def prepare(self) -> None:
        self.names = {TAGS[n].matroska if n in TAGS else n: text for n, text in self.tags.items()}

    def attach(self, container: Any) -> None:
        if self.cover and self.cover_type:
            suffix = self.cover_type.removeprefix("image/").replace("jpeg", "jpg")
            # By this name, players know a cover.
            container.add_attachment(f"cover.{suffix}", self.cover_type, self.cover)


class Mp3(Metadata):
    """MP3, with a tag of ID3v2.4 before it instead of FFmpeg's."""

    def prepare(self) -> None:
        self.head, self.options = _id3(self.tags, self.cover), {"id3v2_version": "0"}


class Wave(Metadata):
    """WAV: FFmpeg writes some tags as INFO. If there are others, a chunk of ID3 has all tags."""

    INFO = frozenset("title artist album comment copyright date genre track".split())

    def finish(self, file: IO[bytes]) -> None:
        if self.tags.keys() <= self.INFO:
            return
        tag = _id3(self.tags, b"")
        tag += b"\0" * (len(tag) % 2)
        size = file.seek(0, 2) + 8 + len(tag)
        file.write(struct.pack("<4sI", b"id3 ", len(tag)) + tag)
        file.seek(0)
        # RF64 has its size in the chunk `ds64`.
        place, layout = (4, "<I") if file.read(4) == b"RIFF" else (20, "<Q")
        file.seek(place)
        file.write(struct.pack(layout, size - 8))


def _id3(tags: Mapping[str, str], cover: bytes) -> bytes:
    """Return a tag of ID3v2.4 in UTF-8."""

    def syncsafe(number: int) -> bytes:
        return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))

    contents = list[tuple[str, bytes]]()
    for name, value in tags.items():
        frame = TAGS[name].id3 if name in TAGS else name if name in FRAMES else "TXXX"
        # A comment and lyrics have a language, here unknown, and a description.
        before = {"COMM": "XXX\0", "USLT": "XXX\0", "TXXX": f"{name}\0"}.get(frame, "")
        contents.append((frame, f"\3{before}{value}".encode()))
    if cover:
        kind = str(cover_type(cover)).encode()
        contents.append(("APIC", b"\0%s\0%c\0%s" % (kind, FRONT, cover)))
    frames = b"".join(n.encode() + syncsafe(len(c)) + b"\0\0" + c for n, c in contents)
    return b"ID3\4\0\0" + syncsafe(len(frames)) + frames if frames else b""


class Mp4(Metadata):
    """MP4: FFmpeg writes the usual tags. The others and the cover go behind them."""

    COVER_TYPES: Mapping[str, int] = {"image/jpeg": 13, "image/png": 14, "image/bmp": 27}
    ATOMS = ("sonm", "soar", "soal")  # Other items have free names.

    def prepare(self) -> None:
        self.names = {n: text for n, text in self.tags.items() if n in TAGS and not TAGS[n].mp4}
        # The tempo is a whole number.
        with contextlib.suppress(KeyError, ValueError, OverflowError):
            self.names["tmpo"] = str(round(float(self.tags["bpm"])))

    def finish(self, file: IO[bytes]) -> None:
        items = b""
        for name, value in self.tags.items():
            atom = TAGS[name].mp4 if name in TAGS else name
            if atom == "tmpo":
                atom = None if self.names.get("tmpo") == value else "BPM"
            data = boxes.box(b"data", struct.pack(">II", 1, 0) + value.encode())
            if atom in self.ATOMS:
                items += boxes.box(atom.encode(), data)
            elif atom is not None:
                mean = boxes.box(b"mean", bytes(4) + b"com.apple.iTunes")
                free = boxes.box(b"name", bytes(4) + atom.encode())
                items += boxes.box(b"----", mean + free + data)
        if kind := self.COVER_TYPES.get(self.cover_type or ""):
            items += boxes.box(
                b"covr", boxes.box(b"data", struct.pack(">II", kind, 0) + self.cover)
            )
        if items:
            self._add_items(file, items)
        boxes.skip_priming(file, self.priming)

    def _add_items(self, file: IO[bytes], items: bytes) -> None:
        boxes.add(file, (b"moov", b"udta", b"meta", b"ilst"), items)


class Mov(Mp4):
    """QuickTime: FFmpeg writes the usual tags in another place, and not the box of the others."""

    def finish(self, file: IO[bytes]) -> None:
        super().finish(file)
        boxes.set_languages(file, self.languages)

    def _add_items(self, file: IO[bytes], items: bytes) -> None:
        handler = boxes.box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
        meta = boxes.box(b"meta", bytes(4) + handler + boxes.box(b"ilst", items))
        boxes.add(file, (b"moov", b"udta"), meta)


class StemMp4(Mp4):
    """A stem file: MP4 with a box that tells players its stems."""

    def finish(self, file: IO[bytes]) -> None:
        super().finish(file)
        stems = [
            {"name": name[:LONGEST_NAME], "color": colour}
            for name, colour in zip(self.titles[1:], COLOURS)
        ]
        content = {"mastering_dsp": MASTERING, "version": 1, "stems": stems}
        box = boxes.box(b"stem", json.dumps(content, ensure_ascii=False).encode())
        boxes.add(file, (b"moov", b"udta"), box)


class _Vorbis(Metadata):
    """Comments of Vorbis, in the place of those that the encoder wrote."""

    def _picture(self) -> bytes:
        """Return the cover as FLAC has it. Its size in pixels may be 0 for unknown."""
        if not self.cover:
            return b""
        kind = str(self.cover_type).encode()
        head = struct.pack(">II", FRONT, len(kind)) + kind
        return head + struct.pack(">6I", 0, 0, 0, 0, 0, len(self.cover)) + self.cover

    def _comments(self, old: bytes, more: Mapping[str, str]) -> bytes:
        """Return the comments behind the vendor's name of the `old` ones."""
        vendor = old[: 4 + int.from_bytes(old[:4], "little")]
        named = [(TAGS[n].vorbis if n in TAGS else n, value) for n, value in self.tags.items()]
        # A name is printable ASCII without "=".
        texts = [
            f"{re.sub('[^ -<>-}]', '_', name)}={value}".encode()
            for name, value in [*named, *more.items()]
        ]
        parts = [struct.pack("<I", len(text)) + text for text in texts]
        return vendor + struct.pack("<I", len(texts)) + b"".join(parts)


class Flac(_Vorbis):
    """FLAC: blocks of comments and of the cover, in the place of FFmpeg's comments and padding."""

    def prepare(self) -> None:
        space = len(self._comments(b"", {})) + PADDING
        if len(self.cover) + space > LARGEST_BLOCK - 100:
            logger.warning("a cover of %d bytes is left out: FLAC cannot hold it", len(self.cover))
            self.cover = b""
        self.names = {}
        self.options = {"metadata_header_padding": str(len(self._picture()) + space)}

    def finish(self, file: IO[bytes]) -> None:
        def block(kind: int, content: bytes) -> bytes:
            return bytes([kind]) + len(content).to_bytes(3, "big") + content

        # The first block describes the stream.
        file.seek(4)
        first = at = 4 + 4 + int.from_bytes(file.read(4)[1:], "big")
        last, comments = False, b""
        while not last:
            file.seek(at)
            head = file.read(4)
            last, size = bool(head[0] & 0x80), int.from_bytes(head[1:], "big")
            comments = file.read(size) if head[0] & 0x7F == 4 else comments
            at += 4 + size
        data = block(4, self._comments(comments, {}))
        data += block(6, self._picture()) if self.cover else b""
        file.seek(first)
        file.write(data + block(0x81, bytes(at - first - len(data) - 4)))


class Ogg(_Vorbis):
    """Ogg: the cover is among the comments. The encoder writes spaces in their place first."""

    def prepare(self) -> None:
        self.names = {"comment": " " * len(self._packet(b""))}

    def _packet(self, old: bytes) -> bytes:
        picture = base64.b64encode(self._picture()).decode()
        return self._comments(old, {"METADATA_BLOCK_PICTURE": picture} if picture else {})

    def finish(self, file: IO[bytes]) -> None:
        # The comments are the second packet, which may take many pages.
        pages: list[tuple[int, int, bytearray, int]] = []  # start, head, page, bytes of the packet
        at, ended = 0, False
        while not ended:
            file.seek(at)
            head = file.read(27)
            sizes = file.read(head[26])
            page = bytearray(head + sizes + file.read(sum(sizes)))
            if at:
                count = next((i + 1 for i, size in enumerate(sizes) if size < 255), 0)
                ended = count > 0
                pages.append((at, 27 + len(sizes), page, sum(sizes[: count or None])))
            at += len(page)
        old = b"".join(bytes(page[start : start + size]) for _, start, page, size in pages)
        # Vorbis ends its comments with a bit that is set.
        magic, end = (8, b"") if old.startswith(b"OpusTags") else (len("\3vorbis"), b"\1")
        new = (old[:magic] + self._packet(old[magic:]) + end).ljust(len(old), b"\0")
        for at, start, page, size in pages:
            page[start : start + size], new = new[:size], new[size:]
            page[22:26] = bytes(4)
            page[22:26] = _ogg_checksum(page)
            file.seek(at)
            file.write(page)


MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytearray) -> bytes:
    """Return the CRC of a page: that of zlib with all bits in the other order, from 0 on."""
    crc = zlib.crc32(page.translate(MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little")
