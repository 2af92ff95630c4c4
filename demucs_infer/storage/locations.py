"""Locations of tracks and stems: local paths, and URLs of stores or of the web.

    "music/a.wav"      Path
    "s3://bucket/key"  Url ──checked──▶ fsspec's file system of s3://bucket, which is given the key
    "https://host/…"   Url ──checked──▶ `http`

Locations are not trusted. Only URLs of a table of protocols are opened, chains of fsspec are
refused, and nothing parses the part of a URL behind its bucket or host again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import posixpath
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
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
from . import http

# A drive such as C: has one letter. Chains such as zip::s3:// count as URLs, to be refused.
URL = re.compile(r"[a-z][a-z0-9+.-]+(::[a-z0-9+.-]*)*://", re.IGNORECASE)
CHAIN = re.compile(r"::[a-z0-9_+-]*(:|$)", re.IGNORECASE)
WEB = frozenset({"http", "https"})
S3, GS, AZURE, SSH = {"s3", "s3a"}, {"gs", "gcs"}, {"az", "abfs"}, {"sftp", "ssh"}
PROTOCOLS = frozenset({"file", "memory"} | S3 | GS | AZURE | SSH | WEB)
MORE_PROTOCOLS = "DEMUCS_INFER_PROTOCOLS"  # names of others that an operator allows
# In these stores an object appears when its upload is complete. The options limit how much of it is
# in memory. Elsewhere a file is uploaded under another name, and then moved.
ATOMIC = {scheme: {"chunksize": 2**23} for scheme in S3 | GS}
# In these stores, the characters are not part of a name.
AMBIGUOUS = {**dict.fromkeys(S3, ("?versionId=",)), **dict.fromkeys(AZURE, ("?", "#"))}
MAX_FOLDERS = 10_000  # that are remembered while locations are compared
LONGEST_KEY = 1025  # bytes of an object's name, with the slash before it
TEMPORARY = ".demucs-infer-"  # begins the names of unfinished files and of their folders
MAX_TRACK = 2**33  # bytes of a track from the web, a pipe or a device
MAX_LIST = 2**26  # bytes of a list of tracks from the web
TRACK_LIMITS = http.Limits(longest=3600.0)

Undo = Callable[[], None]


@dataclass(frozen=True)
class Url:
    """A URL of a file or folder. Its `str` is for messages, and lacks credentials and queries."""

    text: str

    def __str__(self) -> str:
        # In the names of these stores, question marks are characters like others.
        plain = self.scheme in PROTOCOLS - WEB - AZURE and not CHAIN.search(self.rest)
        return http.redact(f"{self.scheme}://{self.rest}", has_query=not plain)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    @property
    def scheme(self) -> str:
        """The protocol."""
        return self.text.partition("://")[0].lower()

    @property
    def is_web(self) -> bool:
        """True for a URL that can be read, but neither listed nor written."""
        return self.scheme in WEB

    @property
    def rest(self) -> str:
        """The part behind the protocol: the path of a URL file://."""
        return self.text.partition("://")[2]

    @property
    def root(self) -> str:
        """The protocol with the bucket or host, which a file system is built from."""
        return f"{self.scheme}://{self.rest.partition('/')[0]}"

    @property
    def path(self) -> str:
        """The part behind the root, from its slash on."""
        return "".join(self.rest.partition("/")[1:])

    @property
    def names(self) -> list[str]:
        """The names of the folders above the file, and of the file."""
        if not self.is_web:
            return str(self).partition("://")[2].split("/")
        parts = re.split("[?#]", self.path, maxsplit=1)[0].split("/")
        return [re.sub("[/\0]", "_", unquote(part)) for part in parts]

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.names[-1]

    def check(self) -> None:
        """Raise `OptionError` if this may not be opened."""
        allowed = PROTOCOLS | set(re.split(r"[\s,]+", os.environ.get(MORE_PROTOCOLS, "").lower()))
        if self.scheme not in allowed:
            names = ", ".join(sorted(filter(None, allowed)))
            problem = f"URLs of {self.scheme}:// are not opened, only those of {names}"
            raise OptionError(f"{self}: {problem} ({MORE_PROTOCOLS} can name others)")
        host = None
        with contextlib.suppress(ValueError):
            host = urlsplit(self.text).hostname
        if "\0" in self.text or (self.is_web and not host):
            raise OptionError(f"{self}: is not a valid URL")
        if not self.is_web and (CHAIN.search(self.rest) or "::" in self.root):
            raise OptionError(f"{self}: chains of URLs are not opened")
        for text in AMBIGUOUS.get(self.scheme, ()):
            if text in self.path:
                raise OptionError(f"{self}: a name with {text!r} means something else there")

    def find(self, pattern: bool) -> list[Url]:
        """List the files below this folder, or the files and folders that fit this pattern."""
        with self.store() as (store, path):
            base = path.removesuffix(self.path)
            found = sorted(store.glob(path) if pattern else store.find(path))
            return [Url(self.root + name.removeprefix(base)) for name in found]

    @contextlib.contextmanager
    def store(self, kind: type[AudioError] = LoadAudioError) -> Iterator[tuple[Any, str]]:
        """Lend the file system of the root, and the path in it. Failures raise `kind`."""
        with self.checked(kind):
            from fsspec.core import url_to_fs

            if self.scheme == "file":
                store, path = url_to_fs("file://")[0], str(Path(self.rest).absolute())
            else:
                store, base = url_to_fs(self.root)
                # Without a host, some stores add the current folder.
                path = ("" if self.root.endswith("://") else base.rstrip("/")) + self.path
            # Others may have changed the store since it was listed.
            store.invalidate_cache()
            yield store, path

    @contextlib.contextmanager
    def checked(self, kind: type[AudioError] = LoadAudioError) -> Iterator[None]:
        """Check the URL. Failures, also those of the block, raise `kind`."""
        try:
            self.check()
            yield
        except AudioError:
            raise
        except OptionError as exc:
            raise kind(str(exc)) from exc
        except ImportError as exc:
            package = getattr(exc.__cause__, "name", None) or exc.name or "another package"
            raise MissingDependencyError(package, str(self)) from exc
        except Exception as exc:
            # Each store has its own exceptions.
            logger.debug("", exc_info=exc)
            raise kind(self._describe(exc, kind)) from exc

    def _describe(self, exc: Exception, kind: type[AudioError]) -> str:
        """Return the message for an exception, whose text may contain the URL."""
        if isinstance(exc, http.HostError) and not exc.answered:
            return str(exc)
        if isinstance(exc, FileNotFoundError) or getattr(exc, "status", 0) == 404:
            return f"{self}: no such {'file' if kind is LoadAudioError else 'bucket or folder'}"
        text = getattr(exc, "reason", None) or getattr(exc, "strerror", None) or exc
        lines = str(text).replace(self.text, str(self)).splitlines() or [type(exc).__name__]
        done = "read" if kind is LoadAudioError else "written"
        return f"{self}: cannot be {done} ({lines[0]})"


Location = Path | Url
Named = str | os.PathLike[str] | Url  # becomes a location


def location(name: Named) -> Location:
    """Return the URL or the local path that `name` is. Raises `OptionError` for an empty name."""
    if isinstance(name, (Path, Url)):
        return name
    text = os.fspath(name)
    if not text:
        raise OptionError("an empty name is not a file: use . for the current folder")
    return Url(text.rstrip("/")) if URL.match(text) else Path(text)


def full_text(place: Location) -> str:
    """Return the text from which `location` makes this location."""
    return place.text if isinstance(place, Url) else str(place)


def check(place: Location) -> None:
    """Raise `OptionError` for a name that no file can have, or a URL that may not be opened."""
    if isinstance(place, Url):
        return place.check()
    try:
        os.fsencode(place)
    except UnicodeEncodeError as exc:
        raise OptionError(f"{str(place)!r}: is not a valid name ({exc.reason})") from exc
    if "\0" in str(place):
        raise OptionError(f"{str(place)!r}: is not a valid name (it has a NUL)")
    return None


def parent_name(place: Location) -> str:
    """Return the name of the folder that the file is in."""
    if isinstance(place, Url):
        return "".join(place.names[-2:-1])
    return os.path.basename(os.path.dirname(os.path.abspath(place)))  # noqa: PTH100,PTH119,PTH120


def below(folder: Location, relative: str) -> Location:
    """Return `relative` in `folder`. Raises `OptionError` if that is elsewhere."""
    system: Any = posixpath if isinstance(folder, Url) else os.path
    normal = system.normpath(relative)
    absolute = system.isabs(normal) or system.splitdrive(normal)[0]
    if absolute or normal in (".", "..") or normal.startswith(f"..{system.sep}"):
        raise OptionError(f"{relative} would be outside of the output folder {folder}")
    return folder / normal


def exists(place: Location) -> bool:
    """Return True if there is a file."""
    if isinstance(place, Url):
        with place.store() as (store, path):
            return bool(store.isfile(path))
    return place.is_file()


class Identities:
    """Compare locations: all names of a file have one identity, as far as links and case show.

    Each folder is resolved once, so use an instance for one look at the disk.
    """

    def __init__(self) -> None:
        self._real_folder = functools.lru_cache(MAX_FOLDERS)(_resolve)

    def of(self, place: Location) -> str:
        """Return the identity of a location."""
        if isinstance(place, Url) or str(place) == "-":
            return full_text(place)
        # `Path` would take several times as long, for each of a million tracks.
        folder, name = os.path.split(str(place))
        if name in ("", ".", ".."):
            folder, name = os.path.split(os.path.abspath(place))  # noqa: PTH100
        path = os.path.join(self._real_folder(folder), name)  # noqa: PTH118
        if os.path.islink(path):  # noqa: PTH114
            path = _resolve(path)
        path = os.path.normcase(path)
        return path.casefold() if sys.platform == "darwin" else path


def _resolve(path: str) -> str:
    # Python before 3.13 follows links by recursion. The system opens no chain that is so long.
    with contextlib.suppress(RecursionError):
        return os.path.realpath(path)
    return os.path.abspath(path)  # noqa: PTH100


@contextlib.contextmanager
def reading(place: Location) -> Iterator[IO[bytes]]:
    """Open a list of tracks. Raises `LoadAudioError`, or `OSError` for a local file."""
    if not isinstance(place, Url):
        with place.open("rb") as file:
            yield file
    elif place.is_web:
        with place.checked():
            content = b"".join(http.read(place.text, MAX_LIST, TRACK_LIMITS))
        yield io.BytesIO(content)
    else:
        with place.store() as (store, path), store.open(path, "rb") as file:
            yield file


@contextlib.contextmanager
def local_copy(name: Named, folder: Path | None = None) -> Iterator[Path]:
    """Lend the file itself, or a copy in `folder` of a URL, a pipe or a device."""
    place = location(name)
    if isinstance(place, Path) and (place.is_file() or place.is_dir() or not place.exists()):
        yield place
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        copy = Path(temporary, "copy")
        if isinstance(place, Url) and not place.is_web:
            with place.store() as (store, path):
                store.get_file(path, str(copy))
        else:
            with copy.open("wb") as target:
                target.writelines(_blocks(place))
        yield copy


def _blocks(place: Location) -> Iterator[bytes]:
    """Yield the bytes of a URL of the web, or of a pipe. Raises `LoadAudioError`."""
    if isinstance(place, Url):
        with place.checked():
            yield from http.read(place.text, MAX_TRACK, TRACK_LIMITS)
        return
    count = 0
    with place.open("rb") as source:
        while block := source.read(http.READ_BLOCK):
            yield block
            count += len(block)
            if count > MAX_TRACK:
                raise LoadAudioError(f"{place}: has over {MAX_TRACK} bytes, the limit")


def check_folder(folder: Location) -> None:
    """Raise `SaveAudioError` if the store of an output folder, or its bucket, is out of reach."""
    if isinstance(folder, Url):
        with folder.store(SaveAudioError) as (store, path):
            # One may be allowed to write a bucket and not to ask about it.
            if folder.scheme in S3:
                with contextlib.suppress(PermissionError):
                    store.info(path.split("/")[0])


def check_target(place: Location) -> None:
    """Raise `SaveAudioError` if no file can have this name."""
    problem = ""
    try:
        check(place)
        if isinstance(place, Url):
            problem = "the name is too long" if len(os.fsencode(place.path)) > LONGEST_KEY else ""
        elif place.is_dir():
            problem = "a folder has this name"
        else:
            # The system refuses names that are too long, even of files that do not exist.
            folder = next(path for path in place.absolute().parents if path.exists())
            for part in place.parts:
                with contextlib.suppress(FileNotFoundError):
                    (folder / part).lstat()
    except (OSError, OptionError) as exc:
        problem = str(getattr(exc, "strerror", None) or exc)
    if problem:
        raise SaveAudioError(f"{place}: cannot be written ({problem})")


def replaced_by(file: Path) -> Path:
    """Return the path of the replaced file until all files of its track are there."""
    return file.with_name(f"{file.name}.kept")


def publish(file: Path, place: Location) -> Undo:
    """Let the whole local `file` appear at `place`, and return a function that undoes it.

    Raises `SaveAudioError`, or `OSError` for a local file.
    """
    if not isinstance(place, Url):
        return _rename(file, place)

    def remove() -> None:
        with place.store(SaveAudioError) as (store, path):
            store.rm_file(path)

    with place.store(SaveAudioError) as (store, path):
        if place.scheme in ATOMIC:
            store.put_file(str(file), path, **ATOMIC[place.scheme])
        else:
            _upload_and_move(store, file, path)
    return remove


def _rename(file: Path, target: Path) -> Undo:
    kept = replaced_by(file)
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        # It has appeared since the targets were checked, and must not be replaced.
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists():
        try:
            os.link(target, kept)
        except OSError:
            # The file system has no links.
            target.replace(kept)

    def undo() -> None:
        if kept.exists():
            kept.replace(target)
        else:
            target.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()

    try:
        file.replace(target)
    except OSError:
        if kept.exists() and not target.exists():
            kept.replace(target)
        raise
    return undo


def _upload_and_move(store: Any, file: Path, path: str) -> None:
    from fsspec import AbstractFileSystem

    parent = posixpath.dirname(path)
    temporary = f"{parent}/{TEMPORARY}{secrets.token_hex(8)}"
    store.makedirs(parent, exist_ok=True)
    try:
        store.put_file(str(file), temporary)
        if type(store).mv is AbstractFileSystem.mv:
            # That one takes a name for a pattern.
            store.cp_file(temporary, path)
            store.rm_file(temporary)
        else:
            store.mv(temporary, path)
    except BaseException:
        # The first error is the one to report.
        with contextlib.suppress(Exception):
            store.rm_file(temporary)
        raise
