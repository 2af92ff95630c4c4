"""The on-disk cache of compiled networks.

An entry of another user could give other stems, or worse: the parsers of engines are not made for
hostile files. So the folder is opened once, and everything is checked and read through that
descriptor: it and its files must belong to the user (or to root), and nobody else may write to
them. Beside each file is its SHA-256.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from ...log import logger

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CompiledCache:
    """The entries of one engine in `folder`. With None, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, name: str) -> bytes | None:
        """Return the content that was stored under `name`, or None if it is missing or unsafe."""
        if self.folder is None or not self.folder.is_dir():
            return None
        try:
            with _opened(self.folder) as entries:
                content, digest = entries.read(name), entries.read(f"{name}.sha256")
        except FileNotFoundError:
            return None
        except OSError as exc:
            logger.warning("%s: the cache of compiled networks is not used: %s", self.folder, exc)
            return None
        return content if sha256(content).hexdigest().encode() == digest.strip() else None

    def store(self, name: str, content: bytes) -> None:
        """Keep `content` under `name`, if the folder is safe and can be written to."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _opened(self.folder) as entries:
                entries.write(name, content)
                entries.write(f"{name}.sha256", sha256(content).hexdigest().encode() + b"\n")
        except OSError as exc:
            logger.info("%s: the compiled network is not kept: %s", self.folder, exc)


class _Folder:
    """A folder by its open descriptor, or on Windows by its path: caches are in the home there."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path, self.descriptor = path, descriptor

    def _at(self, name: str) -> str:
        return str(self.path / name) if self.descriptor is None else name

    def read(self, name: str) -> bytes:
        """Read a file. Raises `OSError` if another user may have written it."""
        # A named pipe would be waited for.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        flags |= getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(self._at(name), flags, dir_fd=self.descriptor), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or _is_foreign(status):
                raise OSError(f"another user may have written {name}")
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Write a file, which appears when it is whole. Raises `OSError`."""
        part, at = f".{name}-{secrets.token_hex(4)}.part", self.descriptor
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self._at(part), flags, 0o600, dir_fd=at)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(self._at(part), self._at(name), src_dir_fd=at, dst_dir_fd=at)
        except OSError:
            with suppress(OSError):
                os.unlink(self._at(part), dir_fd=at)
            raise


@contextmanager
def _opened(path: Path) -> Iterator[_Folder]:
    """Open a folder. Raises `OSError` if another user may write to it or exchange it."""
    if sys.platform == "win32":
        yield _Folder(path, None)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        parent = os.stat("..", dir_fd=descriptor)
        exchanged = parent.st_mode & OTHERS_WRITE and not parent.st_mode & stat.S_ISVTX
        if _is_foreign(os.fstat(descriptor)) or exchanged:
            raise OSError("others may write there")
        yield _Folder(path, descriptor)
    finally:
        os.close(descriptor)


def _is_foreign(status: os.stat_result) -> bool:
    """Return True if another user than this one and root owns a file or may write to it."""
    if sys.platform == "win32":
        return False
    return status.st_uid not in (0, os.getuid()) or bool(status.st_mode & OTHERS_WRITE)
