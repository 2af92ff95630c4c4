"""A page to listen to the stems with: one file of HTML that holds their sound.

    stems ──spool──▶ MP3 ──base64──▶ into the template player.html ──▶ {track}/player.html

The page decodes them into buffers and starts these at one time, in step to the sample. A page on a
disk may not read the files beside it, so they are in it; and as decoded sound takes a gigabyte for
12 minutes of four stems, a track must not be longer than `LONGEST`.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO, NamedTuple

from torch import Tensor

from ..errors import OptionError
from ..read.pcm import rescale_divisor
from ..resample import Resampler
from ..storage.spool import Spool, Workspace
from .encode import encoder
from .formats import Encoding

TEMPLATE = "player.html"
LONGEST = 20 * 60  # seconds
ENCODING = Encoding("mp3", bitrate=128)
BLOCK = 2**16  # samples that are encoded at once
PIECE = 3 * 2**18  # bytes that are written as base64 at once


def check_length(name: str, seconds: float) -> None:
    """Raise `OptionError` if the track `name` is too long for a page."""
    if seconds > LONGEST:
        raise OptionError(
            f"{name}: takes {seconds / 60:.0f} minutes: a page to listen with holds"
            f" {LONGEST // 60}, since browsers keep it all in memory: leave out --player, or use"
            " --start and --duration"
        )


class About(NamedTuple):
    """A page says this of its track."""

    title: str
    artist: str
    model: str


class Page(NamedTuple):
    """A page's track: `length` counts samples at `rate` hertz."""

    about: About
    rate: int
    length: int
    stems: Sequence[str]

    def as_json(self) -> dict[str, object]:
        """The page as plain values."""
        return {**self.about._asdict(), **self._asdict(), "about": None}


def write_page(file: IO[bytes], page: Page, sounds: Iterable[Path]) -> None:
    """Write `page` with the MP3 files `sounds`, one for each of its stems, in their order."""
    template = files(__package__).joinpath(TEMPLATE).read_text("utf-8")
    head, after_title, after_track, tail = re.split("@(?:TITLE|TRACK|SOUNDS)@", template)
    title = html.escape(page.about.title)
    file.write(f"{head}{title}{after_title}{_as_script(page.as_json())}{after_track}".encode())
    for sound in sounds:
        file.write(b'<script class="sound" type="text/plain">')
        _write_base64(file, sound)
        file.write(b"</script>\n")
    file.write(tail.encode())


def _as_script(content: Mapping[str, object]) -> str:
    """JSON in which nothing ends the script that it stands in, or begins a comment."""
    text = json.dumps(content, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write_base64(file: IO[bytes], source: Path) -> None:
    with source.open("rb") as sound:
        while piece := sound.read(PIECE):
            file.write(base64.b64encode(piece))


class PlayerWriter:
    """Takes the stems of a track block by block, and writes their page.

    All stems are lowered by the same, so that the page plays the mix when all are on.
    """

    def __init__(
        self, space: Workspace, about: About, stems: Sequence[str], samplerate: int, channels: int
    ) -> None:
        self.space = space
        self.about = about
        self.rate = ENCODING.samplerate(samplerate)
        self.channels = min(channels, ENCODING.kind.channels)
        self.peak = 0.0
        self._resamplers = [Resampler(samplerate, self.rate) for _ in stems]
        self._spools: dict[str, Spool] = {name: space.spool(self.channels) for name in stems}
        self._files: list[Path] = []
        self.file = space.file()

    def write(self, blocks: Sequence[Tensor]) -> None:
        """Take a block `[C, n]` of every stem, at the model's rate."""
        for block, resampler, spool in zip(blocks, self._resamplers, self._spools.values()):
            self._take(spool, resampler.push(block[: self.channels]))

    def _take(self, spool: Spool, block: Tensor | None) -> None:
        if block is not None and block.shape[-1]:
            self.peak = max(self.peak, block.abs().max().item())
            spool.write(block)

    def encode(self, check: Callable[[], None]) -> None:
        """Encode the stems and write the page; `check` may end that at a block."""
        for resampler, spool in zip(self._resamplers, self._spools.values()):
            self._take(spool, resampler.flush())
        for spool in self._spools.values():
            self._files.append(self.space.file())
            self._encode_stem(spool, self._files[-1], check)
        length = max(spool.length for spool in self._spools.values())
        page = Page(self.about, self.rate, length, list(self._spools))
        with self.file.open("wb") as file:
            write_page(file, page, self._files)
        self.close()

    def _encode_stem(self, spool: Spool, path: Path, check: Callable[[], None]) -> None:
        divisor = rescale_divisor(self.peak)
        with path.open("w+b") as file:
            sink = encoder(file, ENCODING, self.rate, self.channels)
            for block in spool.blocks(BLOCK):
                check()
                sink.write(block / divisor)
            sink.close()

    def close(self) -> None:
        """Give back everything but the page, whole or not."""
        for spool in self._spools.values():
            spool.close()
        for path in self._files:
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what has been written."""
        self.close()
        self.file.unlink(missing_ok=True)
