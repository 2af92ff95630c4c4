"""Files by URL, in whatever fsspec has a back end for: s3://, gs://, sftp://, https:// …

A `Url` stands where a `Path` does: for a track, an output folder or a stem. fsspec is imported when
one is used, and its back ends raise what they like; here that becomes one line.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from ..errors import AudioError, LoadAudioError, MissingDependencyError, SaveAudioError
from ..log import logger

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # two letters and more: no drive
WEB = frozenset({"http", "https"})
# Stores in which an object appears when its upload is complete, with options of their uploads: what
# is read into memory at once. Elsewhere a file is uploaded under another name, and then moved.
WHOLE = {scheme: {"chunksize": 2**23} for scheme in ("s3", "s3a", "gs", "gcs")}
TEMPORARY = ".demucs-infer-"  # starts the name of what is not finished, here and on disk


@dataclass(frozen=True)
class Url:
    """The address of a file or a folder."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def scheme(self) -> str:
        """What comes before "://"."""
        return self.text.partition("://")[0].lower()

    @property
    def is_web(self) -> bool:
        """Whether this can be read, but neither listed nor written."""
        return self.scheme in WEB

    @property
    def _parts(self) -> list[str]:
        if self.is_web:  # elsewhere %, ? and # are letters like others
            return [unquote(part) for part in urlsplit(self.text).path.split("/")]
        return self.text.partition("://")[2].split("/")

    @property
    def name(self) -> str:
        """The file's name."""
        return self._parts[-1].replace("/", "_")

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot."""
        return posixpath.splitext(self.name)[1]

    @property
    def folder_name(self) -> str:
        """The name of the folder that the file is in."""
        return "".join(self._parts[-2:-1]).replace("/", "_")

    def is_file(self) -> bool:
        """Whether the file is there."""
        with self._reading() as (store, path):
            return bool(store.isfile(path))

    def fetch(self, file: Path) -> None:
        """Copy this to the local `file`, piece by piece."""
        with self._reading() as (store, path):
            store.get_file(path, str(file))

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Read this as a stream."""
        with self._reading() as (store, path), store.open(path, "rb") as file:
            yield file

    def files(self) -> list[Url]:
        """All files below this folder, sorted."""
        with self._reading() as (store, path):
            return self._urls(path, sorted(store.find(path)))

    def matches(self) -> list[Url]:
        """All files and folders that fit this pattern, sorted."""
        with self._reading() as (store, path):
            return self._urls(path, sorted(store.glob(path)))

    def _urls(self, path: str, paths: list[str]) -> list[Url]:
        prefix = self.text.removesuffix(path)
        return [Url(prefix + other) for other in paths]

    def check_writable(self) -> None:
        """Raise `SaveAudioError` if the store, or its bucket, cannot be reached."""
        with self._errors(SaveAudioError, "written") as (store, path):
            if self.scheme in ("s3", "s3a"):
                with contextlib.suppress(PermissionError):  # one may write, and not ask
                    store.info(path.split("/")[0])

    def publish(self, file: Path) -> None:
        """Copy the local `file` to here, where it appears when it is whole."""
        with self._errors(SaveAudioError, "written") as (store, path):
            if self.scheme in WHOLE:
                store.put_file(str(file), path, **WHOLE[self.scheme])
            else:
                _put_and_move(store, file, path)

    def _reading(self) -> contextlib.AbstractContextManager[tuple[Any, str]]:
        return self._errors(LoadAudioError, "read")

    @contextlib.contextmanager
    def _errors(self, kind: type[AudioError], done: str) -> Iterator[tuple[Any, str]]:
        """fsspec's file system and the path in it, with nothing remembered of what it lists."""
        try:
            from fsspec.core import url_to_fs

            store, path = url_to_fs(self.text)
            store.invalidate_cache()
            yield store, path
        except AudioError:
            raise
        except ImportError as exc:
            package = getattr(exc.__cause__, "name", None) or exc.name or "another package"
            raise MissingDependencyError(package, self.text) from exc
        except FileNotFoundError as exc:
            logger.debug("", exc_info=exc)
            what = "no such file" if kind is LoadAudioError else "no such bucket or folder"
            raise kind(f"{self}: {what}") from exc
        except Exception as exc:  # each back end has a tree of its own
            raise kind(f"{self}: cannot be {done} ({_reason(exc)})") from exc


Place = Path | Url


def place(text: str) -> Place:
    """What `text` names: a URL, or else a local path."""
    return Url(text.rstrip("/")) if URL.match(text) else Path(text)


@contextlib.contextmanager
def local_copy(source: Place, folder: Path | None = None) -> Iterator[Path]:
    """A local file with what is in `source`: itself, or a copy in `folder` while the block runs."""
    if isinstance(source, Path):
        yield source
    else:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            file = Path(temporary, "copy")
            source.fetch(file)
            yield file


def _put_and_move(store: Any, file: Path, path: str) -> None:
    parent = posixpath.dirname(path)
    temporary = f"{parent}/{TEMPORARY}{secrets.token_hex(8)}"
    store.makedirs(parent, exist_ok=True)
    try:
        store.put_file(str(file), temporary)
        _move(store, temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            store.rm_file(temporary)
        raise


def _move(store: Any, source: str, target: str) -> None:
    from fsspec import AbstractFileSystem

    if type(store).mv is AbstractFileSystem.mv:  # which takes a name for a pattern
        store.cp_file(source, target)
        store.rm_file(source)
    else:
        store.mv(source, target)


def _reason(exc: BaseException) -> str:
    lines = str(getattr(exc, "strerror", None) or exc).splitlines()
    return lines[0] if lines else type(exc).__name__
