"""Temporary files: spools of samples, and the workspaces of unfinished stems.

A `Workspace` is a hidden folder in the output folder, so that a rename makes a stem appear. A
process holds a lock on its workspace for as long as it lives. The next process that works in the
same output folder removes the workspaces of processes that have died.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from ..errors import SaveAudioError
from .locations import TEMPORARY

if TYPE_CHECKING:
    from torch import Tensor

LOCK = "demucs-infer.lock"
IN_MEMORY = 2**22  # bytes that a spool keeps in memory: 12 s of stereo at 44.1 kHz
SAMPLE = 4  # bytes of a float32


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or exc
        raise SaveAudioError(f"{folder}: cannot be written to ({reason})") from exc


class Spool:
    """A queue of samples `[C, T]`: in memory while they are few, then on disk.

    The file has no name, or one that vanishes with the process. Raises `SaveAudioError` if the disk
    is full.
    """

    def __init__(self, folder: Path, channels: int) -> None:
        self.folder = folder
        self.channels = channels
        self.length = 0
        self._file: Any = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(folder))  # noqa: SIM115

    def write(self, block: Tensor) -> None:
        """Append `block` `[C, n]`."""
        if not block.shape[-1]:
            return
        with _writing(self.folder):
            self._file.seek(self.length * self.channels * SAMPLE)
            self._file.write(block.float().t().contiguous().numpy().tobytes())
        self.length += block.shape[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Return the samples `[C, stop - start]`, which must have been written."""
        import torch

        frame = self.channels * SAMPLE
        self._file.seek(start * frame)
        data = bytearray(self._file.read((stop - start) * frame))
        return torch.from_numpy(np.frombuffer(data, np.float32)).view(-1, self.channels).t()

    def blocks(self, size: int) -> Iterator[Tensor]:
        """Yield all samples, `size` at a time."""
        for start in range(0, self.length, size):
            yield self.read(start, min(start + size, self.length))

    def close(self) -> None:
        """Free the memory and the disk."""
        # Nobody needs the samples any more.
        with contextlib.suppress(OSError):
            self._file.close()


class Workspace:
    """A hidden folder in `folder`, which exists while the block runs.

    Workspaces whose processes are dead, or die within `timeout` seconds, are removed. A process
    holds the lock of a workspace from before it uses it until after it has removed it, and removes
    only workspaces whose lock it holds. So nobody removes a workspace that is in use.

    Raises `SaveAudioError` if `folder` cannot be made or written to.
    """

    def __init__(self, folder: Path, timeout: float = 0) -> None:
        self.folder = folder
        self.timeout = timeout

    def __enter__(self) -> Workspace:
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            while True:
                self.path = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder))
                # Another process may have taken the new folder for an abandoned one.
                if lock := _locked(self.path):
                    self._lock = lock
                    return self

    def __exit__(self, *exc_info: object) -> None:
        _remove(self.path, self._lock)

    def _remove_abandoned(self) -> None:
        end = time.monotonic() + self.timeout
        for path in self.folder.glob(f"{TEMPORARY}*"):
            # A folder without our lock file is not ours, nor is one of another user.
            with contextlib.suppress(OSError):
                if path.is_symlink() or not (path / LOCK).is_file():
                    continue
                if lock := _locked(path, max(0, end - time.monotonic())):
                    _remove(path, lock)

    def spool(self, channels: int) -> Spool:
        """Return a spool for samples of `channels` channels."""
        return Spool(self.path, channels)

    def file(self) -> Path:
        """Return a new, empty file, with the permissions that files usually get."""
        path = self.path / secrets.token_hex(8)
        with _writing(self.folder):
            path.open("xb").close()
        return path


def _locked(workspace: Path, timeout: float = 0) -> FileLock | None:
    """Lock a workspace. Return None if another process has the lock or has removed the folder."""
    lock = FileLock(workspace / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=timeout)
    except (Timeout, FileNotFoundError):
        return None
    if (workspace / LOCK).exists():
        return lock
    # The lock is that of a file that another process has removed.
    lock.release()
    return None


def _remove(workspace: Path, lock: FileLock) -> None:
    """Remove a workspace while its lock is held, and release the lock."""
    # Other threads, such as one that reads a pipe, can add no files under the old name. Windows
    # refuses to rename a folder with a locked file.
    with contextlib.suppress(OSError):
        workspace = workspace.rename(workspace.with_name(TEMPORARY + secrets.token_hex(8)))
    # The lock goes last. Without it, nobody would remove the rest if this process is killed.
    with contextlib.suppress(OSError):
        for path in workspace.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
    shutil.rmtree(workspace, ignore_errors=True)
    lock.release()
    if sys.platform == "win32":
        # A locked file could not be removed.
        shutil.rmtree(workspace, ignore_errors=True)
