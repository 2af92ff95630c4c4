"""Where to begin to decode a part of a file, so that its samples are those of the whole file.

    ├──────── left out ────────┼── pre-roll ──┼── the part ──
    first frame             landing         first sample

Only formats that count samples tell where a sample lies, and only lossless codecs give the same
samples wherever one begins: those of the others depend on what was decoded before, in their last
bits (AAC draws noise) or in all. What is not sure is decoded from its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .packets import AV_ERRORS

COUNTING = frozenset("aiff au caf flac mov w64 wav".split())
SAME_ANYWHERE = frozenset("alac flac".split())  # and all of PCM
NEAR = 3  # seconds: what lies so near to the beginning is decoded from there
PREROLL = 1  # seconds in which times and samples have to agree


class Landing(NamedTuple):
    """A place to begin at: what to seek to, in the stream's unit, and the sample found there."""

    time: int
    sample: int


def find_landing(container: Any, stream: Any, first: int) -> Landing | None:
    """The place from which to decode for the sample `first`; None: from the beginning.

    The container is used up by this.
    """
    try:
        if first < NEAR * stream.rate or not _is_sure(container, stream):
            return None
        begin = next(_frames(container, stream))
        time = begin.pts + first - PREROLL * stream.rate
        container.seek(time, stream=stream)
        return _checked(begin, time, begin.pts + first, _frames(container, stream))
    except (*AV_ERRORS, StopIteration, TypeError, OverflowError):
        return None  # damage, frames without a time, a sample that no file has


def _is_sure(container: Any, stream: Any) -> bool:
    codec = stream.codec_context.name
    return (
        not COUNTING.isdisjoint(container.format.name.split(","))
        and stream.time_base * stream.rate == 1
        and (codec.startswith("pcm_") or codec in SAME_ANYWHERE)
    )


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    for packet in container.demux(stream):
        yield from packet.decode()


def _checked(begin: Any, time: int, wanted: int, frames: Iterator[Any]) -> Landing | None:
    """The landing, if every frame follows on the last, up to the one with `wanted`."""
    start: int | None = None
    expected = 0
    for frame in frames:
        if start is None:
            start = expected = frame.pts
        if start > time or frame.pts != expected or _kind(frame) != _kind(begin):
            return None
        expected += frame.samples
        if expected > wanted:
            return Landing(time, start - begin.pts)
    return None


def _kind(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.rate
