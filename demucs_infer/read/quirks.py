"""Open files in FFmpeg, within limits and with work-arounds for its errors.

A playlist, an image sequence or a session description makes FFmpeg open other files or the
network. Two measures prevent that, and each suffices alone:

- FFmpeg refuses every format that is not in `DEMUXERS`, whatever the file is called, before the
  format's reader runs (`format_whitelist`).
- FFmpeg gets an open file and no path, and may not open anything else (`protocol_whitelist`).

Each work-around names the versions of FFmpeg that need it, of those that were tried: 7.1 (PyAV 15),
8.0 (16), 8.1 (17 and 18), and 9.0 (19).
"""

from __future__ import annotations

import errno
import io
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice, pairwise
from typing import Any, BinaryIO

import av

# PyAV 19 has no such argument, and always decodes tags this way.
TAG_ERRORS: dict[str, Any] = (
    {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "surrogateescape"}
)
# FFmpeg's readers (`ffmpeg -demuxers`) that find sound in one file.
DEMUXERS = " ".join(
    [
        # music and speech
        "aa aac aax ac3 ac4 act adx aea aiff alaw amr amrnb amrwb apac ape aptx aptx_hd ast au",
        "avr bit bonk caf codec2 daud dfpwm dsf dss dts dtshd eac3 epaf flac g722 g723_1 g726",
        "g726le g728 g729 gsm hca hcom iamf iff ilbc ircam kvag laf lc3 loas mlp mmf mp3 mpc",
        "mpc8 mtaf mulaw nistsphere oma osq pvf qcp qoa rka rso s337m s8 s16le sbc sds sdx shn",
        "sln sox spdif tak truehd tta u8 u16le voc vqf w64 wav wavarc wsd wv wve xwma",
        # films, radio and television
        "asf asf_o avi av1 cavsvideo dhav dv dxa flv gxf hxvs ivf ivr kux live_flv lmlm4 lvf",
        "lxf matroska mov mpeg mpegts mpegvideo mxf nsv nut nuv ogg pva rm swf ty webm wtv",
        # the sound of games
        "3dostr 4xm acm adf adp ads afc aix alp apc apm argo_asf argo_brp argo_cvg avs",
        "bethsoftvid bfi bfstm bink binka bmv boa brstm c93 cdxl dcstr derf dsicin ea ea_cdata",
        "film_cpk frm fsb fwse gdv genh hnm idcin ipmovie iss jv luodat mca mgsts mm moflex msf",
        "msp mtv musx mv mvi mxg nsp paf pmp pp_bnk psxstr redspark rl2 roq rpl rsd scd sdns",
        "sdr2 sga siff simbiosis_imx smjpeg smk smush sol svag svs thp tiertexseq tmv txd usm",
        "vag vividas vivo vmd vpk wady wc3movie wsaud wsvqa xa xmd xmv xvag yop",
    ]
).split()
# Codecs of pictures that MP4 holds. They are opened, for their size, only where they are copied.
PICTURES = tuple("av1 h264 hevc libdav1d mjpeg mpeg1video mpeg2video mpeg4 vp9 vvc".split())
MAX_FRAME = 2**21  # samples of one frame: Monkey's Audio has the longest, with 1 179 648
MAX_STREAMS = 256  # FFmpeg opens a decoder for each, which takes 0.7 MB
MAX_LINKS = 10_000
MAX_TAGS = 16  # before a container

ID3_SIZE = 10  # bytes of the header of an ID3v2 tag
TAGGED = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b"OggS", b"DSD ")
PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")
HEAD = 2**16  # bytes of a WAV file in which its chunks are looked for
PAGE = struct.Struct("<4sBBqIIIB")  # of Ogg: capture, version, flags, granule, …, segments
FIRST_PAGE = 2  # flag of a page that begins a stream
UNKNOWN_LENGTH = 0x7FFFF000  # bytes: from here on, a length stands for an unknown one
SEARCH = 2**16  # bytes that are searched at once for the next page


class Link:
    """A part of a file as FFmpeg sees it: a name, `read`, `seek` and `tell`.

    `patch` is a place in the part, and the byte that FFmpeg is to read there. `missing` counts the
    bytes of samples that a WAV file states beyond its end.
    """

    def __init__(self, file: BinaryIO, start: int, stop: int, name: str) -> None:
        self._file, self._start, self._size = file, start, stop - start
        self._at = 0
        self.name = name  # FFmpeg looks at the suffix, among others
        self.patch: tuple[int, int] | None = None
        self.missing = 0

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        position = offset + (0, self._at, self._size)[whence]
        if position < 0:
            return -errno.EINVAL  # for FFmpeg
        self._at = position
        return position

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        left = max(0, self._size - self._at)
        size = left if size < 0 else min(size, left)
        if not size:
            return b""
        data = _bytes_at(self._file, self._start + self._at, size)
        if self.patch is not None and 0 <= (place := self.patch[0] - self._at) < len(data):
            data = data[:place] + bytes([self.patch[1]]) + data[place + 1 :]
        self._at += len(data)
        return data


def open_container(link: Link, pictures: Sequence[str] = ()) -> Any:
    """Open a link as PyAV's container. `pictures` are codecs that may be opened besides sound.

    Raises the errors of PyAV.
    """
    link.seek(0)
    options = {
        "format_whitelist": ",".join(DEMUXERS),
        "protocol_whitelist": "none",
        # Pictures are not decoded: some of a few bytes take gigabytes.
        "codec_whitelist": ",".join([*_sound_codecs(), *pictures]),
        "max_streams": str(MAX_STREAMS),
    }
    container = av.open(link, "r", container_options=options, **TAG_ERRORS)
    for stream in container.streams.audio:
        if stream.codec_context is not None:
            stream.codec_context.options = {"max_samples": str(MAX_FRAME)}
    return container


@cache
def _sound_codecs() -> list[str]:
    def decodes_sound(name: str) -> bool:
        try:
            return av.Codec(name, "r").type == "audio"
        except ValueError:  # it is an encoder
            return False

    return [name for name in sorted(av.codecs_available) if decodes_sound(name)]


def find_links(file: BinaryIO, name: str) -> list[Link]:
    """Return the parts of a file that are decoded one after the other.

    A chained Ogg stream has several: FFmpeg 8.0 and 8.1 stop at a link with another rate or layout.
    Raises `ValueError` for too many.
    """
    size = file.seek(0, io.SEEK_END)
    start = _end_of_tags(file)
    head = _bytes_at(file, start, HEAD)
    if head[:4] == b"OggS":
        starts = list(islice(_ogg_links(file, start, size), MAX_LINKS + 1))
        if len(starts) > MAX_LINKS:
            raise ValueError(f"it is a chain of more than {MAX_LINKS} streams")
        return [Link(file, *edge, name) for edge in pairwise([*starts, size])]
    link = Link(file, start, size, name)
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        _read_wav_header(head, link, size - start)
    return [link]


def _bytes_at(file: BinaryIO, start: int, size: int) -> bytes:
    try:
        file.seek(start)
        return file.read(size)
    except OSError:
        raise
    except Exception as exc:  # of a caller's file object, such as one that decompresses
        raise OSError(f"{type(exc).__name__}: {exc}") from exc


def _end_of_tags(file: BinaryIO) -> int:
    """Return where a container begins behind ID3v2 tags, else 0.

    FFmpeg 8.1 skips the tags when it guesses the format, but its readers of WAV, AIFF and CAF do
    not, and refuse the file.
    """
    start = 0
    for _ in range(MAX_TAGS):
        head = _bytes_at(file, start, ID3_SIZE)
        if head[:3] != b"ID3" or len(head) < ID3_SIZE:
            break
        length = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0)))
        has_footer = head[5] & 0x10
        start += ID3_SIZE + length + (ID3_SIZE if has_footer else 0)
    head = _bytes_at(file, start, 12)
    return start if head[:4] in TAGGED or head[4:8] == b"ftyp" else 0


def _read_wav_header(head: bytes, link: Link, size: int) -> None:
    """Set the patch of a WAV file with 24 valid bits in 32, and the bytes that are missing.

    FFmpeg (7.1 to 8.1) takes such samples for an old kind of 24-bit float. As the lowest bits are
    zero, all 32 bits are valid. FFmpeg (7.1 to 8.1) reports the length that the file has, not the
    length that its header states.
    """
    at = 12
    while at + 8 <= len(head):
        name, length = struct.unpack_from("<4sI", head, at)
        at += 8
        chunk = head[at : at + 40]
        if name == b"fmt " and length >= 40 and len(chunk) == 40:
            tag, channels, _, _, block, bits, _, valid = struct.unpack_from("<HHIIHHHH", chunk)
            is_pcm = tag == 0xFFFE and chunk[24:] == PCM_GUID
            if is_pcm and (bits, valid, block) == (32, 24, 4 * channels):
                link.patch = at + 18, bits
        elif name == b"data":
            # RF64 has its length elsewhere, and writers to a pipe put the largest numbers there.
            if head[:4] == b"RIFF" and length < UNKNOWN_LENGTH:
                link.missing = max(0, at + length - size)
            return
        at += length + length % 2


def _ogg_links(file: BinaryIO, start: int, size: int) -> Iterator[int]:
    """Yield where the links of a chained Ogg stream begin: at first pages after other pages."""
    yield start
    is_begun = False  # the first pages of this link are over
    at: int | None = start
    while at is not None and at + PAGE.size <= size:
        head = _bytes_at(file, at, PAGE.size + 255)
        capture, version, flags, *_, segments = PAGE.unpack_from(head.ljust(PAGE.size, b"\0"))
        if capture != b"OggS" or version:
            at = _find(file, at + 1, b"OggS")
            continue
        if flags & FIRST_PAGE and is_begun:
            yield at
        is_begun = not flags & FIRST_PAGE
        at += PAGE.size + segments + sum(head[PAGE.size : PAGE.size + segments])


def _find(file: BinaryIO, start: int, sought: bytes) -> int | None:
    while data := _bytes_at(file, start, SEARCH):
        found = data.find(sought)
        if found >= 0:
            return start + found
        start += max(1, len(data) - len(sought) + 1)
    return None


def undropped_padding(container: Any, stream: Any, first_frame: Any) -> int:
    """Return how many samples FFmpeg forgets to drop before the first frame.

    For HE-AAC in MP4, an `iTunSMPB` tag counts samples of the output. FFmpeg (7.1 to 8.1) takes
    them for samples of the core, which are half as many in a second.
    """
    fields = container.metadata.get("iTunSMPB", "").split()
    time_base = first_frame.time_base or stream.time_base
    if len(fields) < 2 or "mp4" not in container.format.name or first_frame.pts is None:
        return 0
    try:
        padding = int(fields[1], 16)
    except ValueError:
        return 0
    is_halved = first_frame.rate * time_base == 2 and abs(2 * first_frame.pts - padding) <= 2
    return padding if is_halved and padding > 0 else 0
