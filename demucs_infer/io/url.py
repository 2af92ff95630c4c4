"""Addresses of files: a store that fsspec has a back end for, or the web.

    "s3://bucket/key"   Url ──checked──▶ s3://bucket ──▶ file system, which is given "bucket/key"
    "https://host/…"    Url ──checked──▶ requests

Addresses come from strangers: only the protocols of a table are opened, and what follows the root
of an address is never parsed again. fsspec is imported when one of its stores is used; what its
back ends raise becomes one line here.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from ..errors import (
    AudioError,
    LoadAudioError,
    MissingDependencyError,
    OptionError,
    SaveAudioError,
)
from ..log import logger
from .local import TEMPORARY, Undo, temporary_copy
from .web import fetch_track, open_track

CHAIN = re.compile(r"::[a-z0-9_+-]*(:|$)", re.IGNORECASE)  # another address behind this one
WEB = frozenset({"http", "https"})
S3, GS, AZURE, SSH = {"s3", "s3a"}, {"gs", "gcs"}, {"az", "abfs"}, {"sftp", "ssh"}
PROTOCOLS = frozenset({"file", "memory"} | S3 | GS | AZURE | SSH | WEB)
MORE_PROTOCOLS = "DEMUCS_INFER_PROTOCOLS"  # names of others that an operator allows
# Stores in which an object appears when its upload is complete, with options of their uploads: what
# is read into memory at once. Elsewhere a file is uploaded under another name, and then moved.
WHOLE = {scheme: {"chunksize": 2**23} for scheme in S3 | GS}
# What a store would read as something else than a letter of a name.
UNCLEAR = {**dict.fromkeys(S3, ("?versionId=",)), **dict.fromkeys(AZURE, ("?", "#"))}
LONGEST_KEY = 1024  # bytes of an object's name


@dataclass(frozen=True)
class Url:
    """The address of a file or a folder; `check` says whether it may be opened."""

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
            path = re.split("[?#]", self._rest, maxsplit=1)[0]
            return ["", *map(unquote, path.split("/")[1:])]
        return self._rest.split("/")

    @property
    def _rest(self) -> str:
        return self.text.partition("://")[2]

    @property
    def _root(self) -> str:
        """What a file system is built from: the protocol, with the bucket or the host."""
        host = "" if self.scheme == "file" else self._rest.partition("/")[0]
        return f"{self.scheme}://{host}"

    @property
    def _below_root(self) -> str:
        return self._rest if self.scheme == "file" else "".join(self._rest.partition("/")[1:])

    @property
    def name(self) -> str:
        """The file's name."""
        return _as_name(self._parts[-1])

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent_name(self) -> str:
        """The name of the folder that the file is in."""
        return _as_name("".join(self._parts[-2:-1]))

    @property
    def identity(self) -> str:
        """The same for all names of a file, as far as addresses show it."""
        return self.text

    def check(self) -> None:
        """Raise `OptionError` if this is nothing that may be opened."""
        scheme, allowed = self.scheme, _protocols()
        if scheme not in allowed:
            names = ", ".join(sorted(allowed))
            raise OptionError(
                f"{self}: addresses of {scheme}:// are not opened, only of {names}"
                f" ({MORE_PROTOCOLS} can name others)"
            )
        if self.is_web:
            self._check_web()
        else:
            self._check_key()

    def _check_web(self) -> None:
        try:
            host = urlsplit(self.text).hostname
        except ValueError:
            host = None
        if not host or "\0" in self.text:
            raise OptionError(f"{self}: is no address of the web")

    def _check_key(self) -> None:
        if CHAIN.search(self._rest):
            raise OptionError(f"{self}: chains of addresses are not opened")
        if "::" in self._root or "\0" in self.text:
            raise OptionError(f"{self}: is no address")
        for letters in UNCLEAR.get(self.scheme, ()):
            if letters in self._rest:
                raise OptionError(f"{self}: a name with {letters!r} means something else there")

    def below(self, relative: str) -> Url:
        """`relative` in this folder. Raises `OptionError` if that is another place."""
        normal = posixpath.normpath(relative)
        if re.match(r"/|\.$|\.\.(/|$)", normal):
            raise OptionError(f"{self / normal} would be outside of the output folder {self}")
        return self / normal

    def exists_whole(self) -> bool:
        """Tell whether a file is there; files appear when they are whole."""
        with self._reading() as (store, path):
            return bool(store.isfile(path))

    def fetch(self, file: Path) -> None:
        """Copy this to the local `file`, piece by piece."""
        if self.is_web:
            self._check_as(LoadAudioError)
            fetch_track(self.text, file)
            return
        with self._reading() as (store, path):
            store.get_file(path, str(file))

    @contextlib.contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """Read this as a stream."""
        if self.is_web:
            self._check_as(LoadAudioError)
            with open_track(self.text) as file:
                yield file
            return
        with self._reading() as (store, path), store.open(path, "rb") as file:
            yield file

    @contextlib.contextmanager
    def local_copy(self, folder: Path | None) -> Iterator[Path]:
        """A copy that lasts as long as the block."""
        with temporary_copy(folder) as file:
            self.fetch(file)
            yield file

    def files(self) -> list[Url]:
        """All files below this folder, sorted."""
        with self._reading() as (store, path):
            return self._urls(store, sorted(store.find(path)))

    def matches(self) -> list[Url]:
        """All files and folders that fit this pattern, sorted."""
        with self._reading() as (store, path):
            return self._urls(store, sorted(store.glob(path)))

    def _urls(self, store: Any, paths: list[str]) -> list[Url]:
        base = self._base(store)
        return [Url(self._root + path.removeprefix(base)) for path in paths]

    def check_writable(self) -> None:
        """Raise `SaveAudioError` if the store, or its bucket, cannot be reached."""
        with self._errors(SaveAudioError, "written") as (store, path):
            if self.scheme in S3:
                with contextlib.suppress(PermissionError):  # one may write, and not ask
                    store.info(path.split("/")[0])

    def check_target(self) -> None:
        """Raise `SaveAudioError` if no file can have this name."""
        self._check_as(SaveAudioError)
        if len(self._below_root.encode("utf-8", "surrogateescape")) > LONGEST_KEY + 1:
            raise SaveAudioError(f"{self}: cannot be written (the name is too long)")

    def publish(self, file: Path) -> Undo:
        """Copy the local `file` to here, where it appears when it is whole.

        Returns what removes it again. Raises `SaveAudioError`.
        """
        with self._errors(SaveAudioError, "written") as (store, path):
            if self.scheme in WHOLE:
                store.put_file(str(file), path, **WHOLE[self.scheme])
            else:
                _put_and_move(store, file, path)
        return self.remove

    def remove(self) -> None:
        """Remove the file. Raises `SaveAudioError`."""
        with self._errors(SaveAudioError, "removed") as (store, path):
            store.rm_file(path)

    def _reading(self) -> contextlib.AbstractContextManager[tuple[Any, str]]:
        return self._errors(LoadAudioError, "read")

    def _check_as(self, kind: type[AudioError]) -> None:
        try:
            self.check()
        except OptionError as exc:
            raise kind(str(exc)) from exc

    def _base(self, store: Any) -> str:
        """The root as the paths of `store` begin with it."""
        hostless = self._root.endswith("://")
        return "" if hostless else store._strip_protocol(self._root).rstrip("/")

    def _store(self) -> tuple[Any, str]:
        """The file system of the root, and the path in it, which nothing parses as an address."""
        from fsspec import get_filesystem_class

        kind = get_filesystem_class(self.scheme)
        store = kind(**kind._get_kwargs_from_urls(self._root))
        if self.scheme == "file":
            return store, str(Path(self._below_root).absolute())
        return store, self._base(store) + self._below_root

    @contextlib.contextmanager
    def _errors(self, kind: type[AudioError], done: str) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it, with nothing remembered of what it lists."""
        self._check_as(kind)
        try:
            store, path = self._store()
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


def _protocols() -> frozenset[str]:
    more = re.split(r"[\s,]+", os.environ.get(MORE_PROTOCOLS, "").lower())
    return PROTOCOLS | set(filter(None, more))


def _as_name(part: str) -> str:
    """A part of an address as the name of a file."""
    return part.replace("/", "_").replace("\0", "_")


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
