"""The folder of a track below the one that was named: the value of `{folder}` in a file name.

named      track                  folder
A          A/Hits/01.mp3          Hits
s3://b/*   s3://b/x/y/song.mp3    x/y
song.mp3   song.mp3               (empty)
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import TypeVar

Name = TypeVar("Name")


class Folders:
    """The folders and patterns that were named. It can be pickled, for workers elsewhere."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def noting(self, names: Iterable[Name]) -> Iterator[Name]:
        """Yield `names` and remember them, of a pattern the folder before its first wildcard."""
        for name in names:
            text = str(name)
            if glob.has_magic(text):
                plain = itertools.takewhile(lambda part: not glob.has_magic(part), _parts(text))
                text = _joined(text, list(plain))
            self._named.add(text)
            yield name

    def of(self, track: object) -> str:
        """Return the folder of `track` below a named folder, with slashes, or "" for none."""
        *parents, _ = _parts(str(track))
        for count in range(len(parents), 0, -1):
            if _joined(str(track), parents[:count]) in self._named:
                return "/".join(parents[count:])
        return ""


def _parts(name: str) -> list[str]:
    return name.split("/") if "://" in name else [".", *PurePath(name).parts]


def _joined(name: str, parts: list[str]) -> str:
    return "/".join(parts) if "://" in name else str(PurePath(*parts))
