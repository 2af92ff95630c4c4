"""Fetch one file over HTTP, so that what bears its final name is whole.

    address ──Range──▶ TARGET.part ──SHA-256, fsync──▶ rename ──▶ TARGET

What is there of `TARGET.part` is kept when a connection or the process breaks, and only the rest is
asked for the next time. The digest alone decides what is right: no ETag is compared (two hosts of
one file may disagree on it), and a mirror need not be trusted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DownloadError
from ..log import logger, printable
from .http import (
    TRANSIENT,
    Broken,
    HostError,
    Patience,
    ask,
    content_range,
    received,
    retry_after,
    shown,
    status_line,
)

if TYPE_CHECKING:
    from requests import Response

READ_BLOCK = 2**20  # bytes of a file
MARGIN = 2**20  # bytes that a file may have more than its rounded size, and a quarter of it
LARGEST = 2**32  # bytes of a file of unknown size


PATIENCE = Patience()


@dataclass(frozen=True)
class Download:
    """A file to be fetched. `size` is in bytes, rounded, and None where it is not known.

    Its content is right that has the digest `sha256`, or, where that is empty, `length` bytes.
    """

    url: str
    target: Path
    sha256: str
    size: int | None
    length: int | None
    patience: Patience

    @property
    def part(self) -> Path:
        """The file that grows while the content arrives."""
        return _with_ending(self.target, ".part")

    @property
    def limit(self) -> int:
        """The most bytes that are accepted."""
        if self.length is not None:
            return self.length
        return LARGEST if self.size is None else self.size + self.size // 4 + MARGIN

    def is_right(self, digest: str, length: int) -> bool:
        """Judge a content by its digest, or else by its length in bytes."""
        return digest.startswith(self.sha256) if self.sha256 else length == self.length


class _WrongContent(Exception):
    """The content is wrong, and so it is at the server if it came `whole`, in one known length."""

    def __init__(self, reason: str, whole: bool) -> None:
        super().__init__(reason)
        self.whole = whole


def fetch(
    url: str,
    target: Path,
    sha256: str,
    *,
    size: int | None = None,
    length: int | None = None,
    patience: Patience | None = None,
) -> None:
    """Fetch `url` as the file `target`, unless that is there with the right digest.

    Of several processes one fetches and the others wait. A file with another digest is renamed to
    `TARGET.corrupt`.

    Args:
        url: an http or https address; proxies, certificates and passwords are those of `requests`.
        target: the file; its folder is made.
        sha256: the file's digest in hex (or its leading digits, if no more are known).
        size: of the file in bytes, roughly, to stop a body without an end.
        length: of the file in bytes, exactly; where there is no digest, this alone is verified.
        patience: times and numbers to give up at (default: `PATIENCE`).

    Raises `HostError` for what is the server's or the network's fault, else `DownloadError`.
    """
    if not sha256 and length is None:
        raise DownloadError(f"{shown(url)}: has no known SHA-256 to check what would come")
    download = Download(url, target, sha256.lower(), size, length, patience or PATIENCE)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not _is_there(download):
                _download(download)
    except OSError as exc:
        raise DownloadError(f"{target}: cannot be written ({exc.strerror or exc})") from exc


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, in hex. Raises `OSError`."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _with_ending(path: Path, ending: str) -> Path:
    """Append to a file's name: `a.th` becomes `a.th.part`."""
    return path.with_name(path.name + ending)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, waiting for another process that does."""
    from filelock import FileLock, Timeout

    lock = FileLock(_with_ending(target, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: waiting for another process that fetches it", target.name)
        lock.acquire()
    try:
        yield
    finally:
        # One that waits sees that the file is gone, and makes another. Windows has it in use, but
        # removes it on release.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _is_there(download: Download) -> bool:
    """Tell whether the target is there and right; a wrong one is moved aside."""
    if not download.target.exists():
        return False
    digest, size = file_digest(download.target), _size(download.target)
    if download.is_right(digest, size):
        return True
    aside = _with_ending(download.target, ".corrupt")
    download.target.replace(aside)
    logger.warning(
        "%s: %s: moved to %s, and fetched anew",
        *(download.target, _difference(download, "its SHA-256", digest, size), aside.name),
    )
    return False


def _download(download: Download) -> None:
    try:
        _fill_part(download)
        download.part.replace(download.target)
        _sync_folder(download.target.parent)
    except OSError:  # a full disk, above all, should not stay full
        with suppress(OSError):
            download.part.unlink()
        raise


def _fill_part(download: Download) -> None:
    """Fetch the part until its digest is right, from scratch if an older half may be at fault."""
    for second in (False, True):
        try:
            _persist(download)
            return
        except _WrongContent as exc:
            download.part.unlink(missing_ok=True)
            if second or exc.whole:
                raise HostError(f"{shown(download.url)}: {exc}") from exc
            logger.warning("%s: %s: fetching it from the start", download.target.name, exc)


def _persist(download: Download) -> None:
    """Repeat attempts that break, as long as `download.patience` lasts."""
    failures, reached = 0, _size(download.part)
    while True:
        try:
            _attempt(download)
            return
        except Broken as exc:
            gained = _size(download.part) - reached >= download.patience.gain
            failures = 1 if gained else failures + 1
            reached = max(reached, _size(download.part))
            wait = _pause(download, exc, failures, gained)
        time.sleep(wait)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _pause(download: Download, broken: Broken, failures: int, gained: bool) -> float:
    """Choose the seconds to wait before the next attempt. Raises `HostError` for none."""
    patience, problem = download.patience, f"{shown(download.url)}: {broken}"
    if failures >= patience.attempts and not gained:
        tried = f" (tried {failures} times)" if failures > 1 else ""
        raise HostError(f"{problem}{tried}", may_pass=broken.connected) from broken
    if broken.wait is not None and broken.wait > patience.longest_wait:
        raise HostError(f"{problem}, and asks to wait {broken.wait:.0f} s") from broken
    doubled = patience.backoff * 2 ** (failures - 1)
    wait = min(doubled if broken.wait is None else broken.wait, patience.longest_wait)
    logger.warning("%s: %s: trying again in %.0f s", download.target.name, broken, wait)
    return wait


class _Part:
    """The file that a download grows in, with the digest of what it has."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._digest = sha256()
        self._file = path.open("a+b")
        self._file.seek(0)
        while block := self._file.read(READ_BLOCK):
            self._digest.update(block)
            self.size += len(block)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.size:
            self._path.unlink()

    def write(self, block: bytes) -> None:
        self._file.write(block)
        self._file.flush()  # so that a killed process has it
        self._digest.update(block)
        self.size += len(block)

    def restart(self) -> None:
        self._file.truncate(0)
        self._digest, self.size = sha256(), 0

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def _attempt(download: Download) -> None:
    """Ask once for what the part lacks, and check the whole."""
    with _Part(download.part) as part:
        if not download.is_right(part.digest, part.size):
            whole = _receive(download, part)
            if not download.is_right(part.digest, part.size):
                what = "the SHA-256 of what came"
                raise _WrongContent(_difference(download, what, part.digest, part.size), whole)
        part.sync()


def _difference(download: Download, what: str, digest: str, size: int) -> str:
    if download.sha256:
        return f"{what} is {digest} and should be {download.sha256}"
    return f"there are {size} bytes and should be {download.length}"


def _receive(download: Download, part: _Part) -> bool:
    """Append the body of an answer; tell whether all of the file came with it, as announced."""
    with _answer(download, part.size) as response:
        total = _place(response, part)
        whole = not part.size
        if total is not None and total > download.limit:
            raise _WrongContent(f"it has {total} bytes, and may have {download.limit}", whole)
        limit = download.limit if total is None else total
        with _progress_bar(download.target.name, part.size, total) as bar:
            for block in received(response, download.patience):
                if part.size + len(block) > limit:
                    raise _WrongContent(f"it goes on after the expected {limit} bytes", whole)
                part.write(block)
                bar.update(len(block))
    if total is not None and part.size < total:
        raise Broken(f"{part.size} of {total} bytes came")
    return whole and total is not None


def _progress_bar(name: str, start: int, total: int | None) -> Any:
    """A bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    name = printable(name)
    return tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True, disable=None)


def _answer(download: Download, start: int) -> Response:
    """Ask for the file from the byte `start` on."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    return ask("GET", download.url, download.patience.timeout, headers, stream=True)


def _place(response: Response, part: _Part) -> int | None:
    """Check the status and make `part` end where the body starts; returns the file's length."""
    status = response.status_code
    if status == 206:
        start, total = content_range(response)
        if start == part.size:
            return total
    if status in (206, 416) and part.size:  # another range, or none since the file is shorter
        part.restart()
        raise Broken("the server has other parts of the file than those asked for")
    if status in TRANSIENT:
        raise Broken(status_line(response), retry_after(response))
    if status != 200:
        raise HostError(f"{shown(response.url)}: {status_line(response)}")
    part.restart()
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _sync_folder(folder: Path) -> None:
    """Make a rename last, where folders can be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
