"""A page to listen to the stems with: one file of HTML that holds their sound.

    stems ──▶ MP3 ──base64──▶ into the template player.html ──▶ {track}/player.html

The page decodes them into buffers and starts these at one time, in step to the sample. A page on a
disk may not read the files beside it, so they are in it. Decoded sound takes a gigabyte for 9
minutes of four stems and the mix, so a track must not be longer than `LONGEST`.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import OptionError
from ..log import decoded

TEMPLATE = "player.html"
LONGEST = 20 * 60  # seconds
PIECE = 3 * 2**18  # bytes that are written as base64 at once


def check_length(name: str, seconds: float) -> None:
    """Raise `OptionError` if the track `name` is too long for a page."""
    if seconds > LONGEST:
        raise OptionError(
            f"{name}: takes {seconds / 60:.0f} minutes: a page to listen with holds"
            f" {LONGEST // 60}, since browsers keep it all in memory: leave out --player, or use"
            " --start and --duration"
        )


class Page(NamedTuple):
    """A track on its page. `length` counts samples at `rate` hertz."""

    title: str
    artist: str
    model: str
    rate: int
    length: int
    stems: Sequence[str]


def write_page(file: IO[bytes], page: Page, sounds: Iterable[Path]) -> None:
    """Write `page` with the MP3 files `sounds` of its stems, in their order, and of the mix."""
    template = files(__package__).joinpath(TEMPLATE).read_text("utf-8")
    head, after_title, after_track, tail = re.split("@(?:TITLE|TRACK|SOUNDS)@", template)
    # Names of files need not be text, but the page is.
    title = html.escape(decoded(page.title, "replace"))
    track = decoded(json.dumps(page._asdict(), ensure_ascii=False), "replace")
    # Nothing in a script may end it, or begin a comment.
    for sign in "<>&":
        track = track.replace(sign, f"\\u{ord(sign):04x}")
    file.write(f"{head}{title}{after_title}{track}{after_track}".encode())
    for sound in sounds:
        file.write(b'<script class="sound" type="text/plain">')
        with sound.open("rb") as data:
            while piece := data.read(PIECE):
                file.write(base64.b64encode(piece))
        file.write(b"</script>\n")
    file.write(tail.encode())
