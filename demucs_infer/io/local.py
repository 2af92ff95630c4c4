"""Local files as places: a `Path` that answers what a `Url` does."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ..errors import LoadAudioError, OptionError, SaveAudioError
from .web import LARGEST

if sys.platform == "win32":
    from pathlib import WindowsPath as SystemPath
else:
    from pathlib import PosixPath as SystemPath

LONGEST_NAME = 255  # bytes, where the system does not say
TEMPORARY = ".demucs-infer-"  # starts the name of what is not finished, here and on disk

Undo = Callable[[], None]


def replaced_by(file: Path) -> Path:
    """Where the file that `file` replaces waits until the whole track has replaced its own."""
    return file.with_name(f"{file.name}.kept")


class LocalPath(SystemPath):
    """A `Path` that answers what a `Url` does."""

    is_web = False

    def check(self) -> None:
        """Raise `OptionError` if no file can have this name."""
        try:
            os.fsencode(self)
        except UnicodeEncodeError as exc:
            raise OptionError(f"{str(self)!r}: is no name here ({exc.reason})") from exc
        if "\0" in str(self):
            raise OptionError(f"{str(self)!r}: is no name (it has a NUL)")

    @property
    def parent_name(self) -> str:
        """The name of the folder that the file is in."""
        return Path.cwd().joinpath(self).parent.name

    @property
    def identity(self) -> str:
        """The same for all names of a file, also where capitals do not count."""
        name = os.path.normcase(os.path.realpath(self)) if str(self) != "-" else "-"
        return name.casefold() if sys.platform == "darwin" else name

    def below(self, relative: str) -> LocalPath:
        """`relative` in this folder. Raises `OptionError` if that is another place."""
        path = LocalPath(os.path.normpath(self / relative))
        if LocalPath(os.path.normpath(self)) not in path.parents:
            raise OptionError(f"{path} would be outside of the output folder {self}")
        return path

    def exists_whole(self) -> bool:
        """Tell whether a file is there; files appear when they are whole."""
        return self.is_file()

    def check_writable(self) -> None:
        """Raise nothing: who makes the first file here sees."""

    def check_target(self) -> None:
        """Raise `SaveAudioError` if no file can appear here: something is in the way."""
        try:
            if self.is_dir():
                raise SaveAudioError(f"{self}: cannot be written (a folder has this name)")
            limit = _longest_name(self)
            for part in self.parts:
                if len(os.fsencode(part)) > limit:
                    raise SaveAudioError(f"{self}: cannot be written (a name is too long)")
        except OSError as exc:
            if isinstance(exc, SaveAudioError):
                raise
            raise SaveAudioError(f"{self}: cannot be written ({exc.strerror or exc})") from exc

    def publish(self, file: Path) -> Undo:
        """Give the whole `file` this name; returns what takes that back. Raises `OSError`."""
        kept = replaced_by(file)
        made = [path for path in self.parents if not path.exists()]
        self.parent.mkdir(parents=True, exist_ok=True)
        if self.is_dir():
            # It has appeared since the targets were checked, and must not be replaced.
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if self.exists():
            try:
                os.link(self, kept)
            except OSError:  # of a file system without links
                self.replace(kept)
        try:
            file.replace(self)
        except OSError:
            if not self.exists() and kept.exists():
                kept.replace(self)
            raise

        def undo() -> None:
            if kept.exists():
                kept.replace(self)
            else:
                self.unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()

        return undo

    @contextlib.contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """Read this as a stream. Raises `OSError`."""
        with self.open("rb") as file:
            yield file

    @contextlib.contextmanager
    def local_copy(self, folder: Path | None) -> Iterator[Path]:
        """The file itself, or a copy of what comes out of a pipe or a device."""
        if self.is_file() or self.is_dir() or not self.exists():
            yield self
            return
        with temporary_copy(folder) as file:
            with self.open("rb") as source, file.open("wb") as target:
                _copy(source, target, str(self))
            yield file


def _longest_name(path: Path) -> int:
    """The bytes that a name may have, in the first folder above `path` that is there."""
    there = next((folder for folder in path.absolute().parents if folder.exists()), Path.cwd())
    if sys.platform != "win32":
        with contextlib.suppress(OSError, ValueError):
            return os.pathconf(there, "PC_NAME_MAX")
    return LONGEST_NAME


@contextlib.contextmanager
def temporary_copy(folder: Path | None) -> Iterator[Path]:
    """Lend the name of a file in a folder that lasts as long as the block."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        yield Path(temporary, "copy")


def _copy(source: IO[bytes], target: IO[bytes], name: str) -> None:
    """Copy what comes, as far as a track may be long."""
    while block := source.read(2**20):
        target.write(block)
        if target.tell() > LARGEST:
            raise LoadAudioError(f"{name}: goes on after {LARGEST} bytes")
