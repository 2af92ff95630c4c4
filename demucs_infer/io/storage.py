"""Places of files: a local path, or a URL.

    "music/a.wav"                        LocalPath
    "s3://bucket/key", "https://host/…"  Url

Both answer the same questions, so that nobody else asks which of them a place is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import OptionError
from .local import LocalPath
from .url import Url

# Letters and more than one of them, as C:\ is a drive; chains (zip::s3://…) are addresses as well.
URL = re.compile(r"[a-z][a-z0-9+.-]+(::[a-z0-9+.-]*)*://", re.IGNORECASE)

Place = LocalPath | Url
Named = str | os.PathLike[str] | Url  # what a place is made of


def place(text: Named) -> Place:
    """What `text` names: a URL, or else a local path. Raises `OptionError` for an empty name."""
    if isinstance(text, (LocalPath, Url)):
        return text
    name = os.fspath(text)
    if not name:
        raise OptionError("an empty name is no file: use . for the current folder")
    return Url(name.rstrip("/")) if URL.match(name) else LocalPath(name)


@contextlib.contextmanager
def local_copy(source: Named, folder: Path | None = None) -> Iterator[Path]:
    """A local file with what is in `source`: itself, or a copy in `folder` while the block runs."""
    with place(source).local_copy(folder) as file:
        yield file
