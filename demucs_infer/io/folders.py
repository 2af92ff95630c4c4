"""The folder of a track below the one that was named: what `{folder}` in a file name stands for.

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
    """The folders and patterns that were named; it can be pickled, for workers elsewhere."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def noting(self, names: Iterable[Name]) -> Iterator[Name]:
        """`names`, each noted when it comes."""
        for name in names:
            self._named.add(_root(str(name)))
            yield name

    def of(self, track: object) -> str:
        """The folder of `track` below what was named, with slashes; empty for a named track."""
        *parents, _ = _parts(str(track))
        for count in range(len(parents), 0, -1):
            if _joined(str(track), parents[:count]) in self._named:
                return "/".join(parents[count:])
        return ""


def _root(name: str) -> str:
    """Return `name`, or of a pattern the folder before its first wildcard."""
    if not glob.has_magic(name):
        return name
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), _parts(name))
    return _joined(name, list(plain))


def _parts(name: str) -> list[str]:
    return name.split("/") if "://" in name else [".", *PurePath(name).parts]


def _joined(name: str, parts: list[str]) -> str:
    return "/".join(parts) if "://" in name else str(PurePath(*parts))
