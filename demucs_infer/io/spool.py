"""Samples that do not fit into memory, and files that are not finished.

A `Workspace` is a hidden folder in the output folder. Unfinished stems and spools live in it, so
that one rename makes a stem appear. A process holds a lock on its workspace while it lives, however
it ends: the next one to work in the same output folder removes what has been left behind.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import SaveAudioError
from .local import TEMPORARY

LOCK = "lock"
IN_MEMORY = 2**22  # bytes: what a spool keeps in memory, 12 s of stereo at 44.1 kHz
SAMPLE = 4  # bytes of a float32


class Spool:
    """Samples `[C, T]` in the order in which they come: in memory while they are few, then on disk.

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
        try:
            self._file.seek(self.length * self.channels * SAMPLE)
            self._file.write(block.float().t().contiguous().numpy().tobytes())
        except OSError as exc:
            raise SaveAudioError(
                f"{self.folder}: has no room for the samples in work ({exc.strerror or exc})"
            ) from exc
        self.length += block.shape[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `[C, stop - start]`, which are there."""
        frame = self.channels * SAMPLE
        self._file.seek(start * frame)
        data = bytearray(self._file.read((stop - start) * frame))
        return torch.from_numpy(np.frombuffer(data, np.float32)).view(-1, self.channels).t()

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All samples, `size` at a time."""
        for start in range(0, self.length, size):
            yield self.read(start, min(start + size, self.length))

    def close(self) -> None:
        """Give the memory and the disk back."""
        with contextlib.suppress(OSError):  # of data that nobody needs any more
            self._file.close()


class Workspace:
    """A hidden folder in `folder`, for as long as the block runs.

    Workspaces of processes that are dead, or dead within `patience` seconds, are removed. Raises
    `SaveAudioError` if `folder` cannot be made or written to.
    """

    def __init__(self, folder: Path, patience: float = 0) -> None:
        self.folder = folder
        self.patience = patience

    def __enter__(self) -> Workspace:
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            self._make()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)

    def _make(self) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder))
            self._lock = FileLock(self.path / LOCK)
            try:
                self._lock.acquire()
            except NotImplementedError:  # some network folders have no locks
                return
            if (self.path / LOCK).exists():  # else another process took it for abandoned
                return
            self._lock.release()

    def _remove_abandoned(self) -> None:
        end = time.monotonic() + self.patience
        for path in self.folder.glob(f"{TEMPORARY}*"):
            with contextlib.suppress(Timeout, OSError, NotImplementedError):
                with FileLock(path / LOCK, timeout=max(0, end - time.monotonic())):
                    shutil.rmtree(path, ignore_errors=True)
                shutil.rmtree(path, ignore_errors=True)  # where a locked file cannot be removed

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise SaveAudioError(
                f"{self.folder}: cannot be written to ({exc.strerror or exc})"
            ) from exc

    def spool(self, channels: int) -> Spool:
        """Room for samples of `channels` channels."""
        return Spool(self.path, channels)

    def file(self) -> Path:
        """A new, empty file with the rights of any file."""
        path = self.path / secrets.token_hex(8)
        with self._writing():
            path.open("xb").close()
        return path
