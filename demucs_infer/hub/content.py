"""The bytes of a stranger's file, read once: what is hashed is what is parsed.

A file that is hashed by its name and opened again by its name may be another one the second time.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from ..errors import ModelLoadingError


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
        and for aliases, which make a few lines endless.
        """
        if len(self.data) > limit:
            raise ModelLoadingError(
                f"{self.path}: has {len(self.data)} bytes, and may have {limit}"
            )
        try:
            return yaml.load(self.data.decode("utf-8"), PlainLoader)
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
    """Makes a tree of plain values, and refuses what would tie its branches together."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias is not supported here")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave merges alone, which have no value then."""


# Numbers such as 1e-3, which are text to YAML 1.1.
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)
