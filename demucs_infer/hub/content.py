"""The bytes of a stranger's file, read once: what is hashed is what is parsed.

A file that is hashed by its name and opened again by its name may be another one the second time.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

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
