"""The bytes of a stranger's file, read once: what is hashed is what is parsed.

A file that is hashed by its name and opened again by its name may be another one the second time.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from ..errors import ModelLoadingError

MAX_VALUES = 10**6  # in containers, counted as often as they are reached
MAX_DEPTH = 32  # of containers


class Refused(Exception):
    """A file holds something that no checkpoint needs."""


@dataclass(frozen=True)
class Content:
    """All bytes of the file that was at `path` when it was read."""

    path: Path
    data: bytes = field(repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str], kind: str = "checkpoint") -> Content:
        """Read a regular file. Raises `ModelLoadingError`, which calls it a `kind`."""
        path = Path(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
                raise ModelLoadingError(f"{path}: is no file")
            with path.open("rb") as file:
                return cls(path, file.read())
        except FileNotFoundError as exc:
            raise ModelLoadingError(f"{path}: no such {kind}") from exc
        except (OSError, ValueError) as exc:  # a name with a NUL byte is a ValueError
            reason = getattr(exc, "strerror", None) or exc
            raise ModelLoadingError(f"{path}: cannot be read ({reason})") from exc

    def yaml(self, limit: int) -> Any:
        """The values of a YAML file of at most `limit` bytes.

        Raises `ModelLoadingError` for what is no YAML, for dates and numbers that Python refuses,
        and for aliases that make a few lines endless.
        """
        if len(self.data) > limit:
            raise ModelLoadingError(
                f"{self.path}: has {len(self.data)} bytes, and may have {limit}"
            )
        try:
            values = yaml.load(self.data.decode("utf-8"), PlainLoader)
            check_size(values)
            return values
        except Exception as exc:  # also those that the constructors of values run into
            text = " ".join(str(exc).split()) or type(exc).__name__
            raise ModelLoadingError(f"{self.path}: is not valid YAML ({text[:300]})") from exc

    @property
    def digest(self) -> str:
        """The SHA-256 of the bytes, in hex."""
        return sha256(self.data).hexdigest()

    def damage(self, checksum: str) -> str:
        """Say that the SHA-256 does not start with `checksum`; nothing is said if it does."""
        actual = self.digest[: len(checksum)] if checksum else ""
        if actual == checksum:
            return ""
        return f"{self.path}: is damaged: its checksum is {actual} and should be {checksum}"

    def check(self, checksum: str) -> None:
        """Raise `ModelLoadingError` unless the SHA-256 starts with `checksum`."""
        if damage := self.damage(checksum):
            raise ModelLoadingError(f"{damage}: fetch it again")


class PlainLoader(yaml.SafeLoader):
    """Makes plain values; merges are refused, as a few lines of them can fill the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave merges alone, which have no value then."""


def check_size(value: Any) -> None:
    """Raise `Refused` for containers that hold themselves, or each other too often to be walked."""
    _count(value, {}, 0)


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """The values in nested containers, each counted as often as it is reached."""
    if not isinstance(value, (Mapping, list, tuple)):
        return 1
    if depth > MAX_DEPTH:
        raise Refused(f"containers in each other, more than {MAX_DEPTH} deep")
    if id(value) not in known:
        items = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_count(item, known, depth + 1) for item in items)
    if known[id(value)] > MAX_VALUES:
        raise Refused(f"more than {MAX_VALUES} values")
    return known[id(value)]
