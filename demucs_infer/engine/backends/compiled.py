"""Backends that compile networks for fixed shapes, and the on-disk cache of compiled networks."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import __version__
from ...errors import OptionError
from ...log import logger
from ..model import Model, Network
from ..options import SeparationOptions
from . import Backend, EngineModel

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CompilingBackend(Backend):
    """An engine beside PyTorch. It takes PyTorch's tensors on the CPU, whatever its device.

    `title` is the engine's name in messages.
    """

    title: ClassVar[str]
    device = torch.device("cpu")

    def __init__(self, options: SeparationOptions, device: str | None, cache: Path | None) -> None:
        super().__init__(options, device, cache)
        if options.compile:
            raise OptionError(
                f"compile=True is for engine='torch': {self.title} compiles by itself"
            )
        self.cache = CompiledCache(None if cache is None else cache / self.name)

    @abstractmethod
    def compiled(self, model: Model, inputs: Sequence[Tensor]) -> Network:
        """Compile the network of `model` for tensors of the shapes of `inputs`.

        Threads may share the result. Raises `OptionError` for a network that the engine cannot run.
        """

    def converted(self, model: Model) -> nn.Module:
        lock, compiled = threading.Lock(), dict[tuple[torch.Size, ...], Network]()

        def network(*inputs: Tensor) -> tuple[Tensor, ...]:
            shapes = tuple(x.shape for x in inputs)
            with lock:
                if not compiled:
                    compiled[shapes] = self.compiled(model, inputs)
            # PyTorch runs windows of other lengths: at the end of a track, of some models.
            return compiled.get(shapes, model.network)(*inputs)

        return EngineModel(model, network)


def cache_name(model: Model, inputs: Sequence[Tensor], *facts: object) -> str:
    """Return a name for a compiled network that differs for other models, inputs and `facts`."""
    shapes = [tuple(x.shape) for x in inputs]
    known = (type(model).__qualname__, model.options, shapes, __version__, torch.__version__)
    digest = sha256(repr((*known, *facts)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


class CompiledCache:
    """The on-disk cache of the networks that one engine compiled. None keeps nothing.

    An entry by another user could change stems, or attack the parsers of engines, which do not
    expect hostile files. So the folder is opened once, and all checks and reads go through that
    descriptor: the folder and its files must belong to the user or to root, and no other user may
    be able to write to them. The SHA-256 of each file is beside it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, name: str) -> bytes | None:
        """Return the content that was stored under `name`, or None if it is missing or unsafe."""
        if self.folder is None:
            return None
        try:
            with _opened(self.folder) as folder:
                content, digest = _read(folder, name), _read(folder, f"{name}.sha256")
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
            with _opened(self.folder) as folder:
                _write(folder, name, content)
                _write(folder, f"{name}.sha256", sha256(content).hexdigest().encode() + b"\n")
        except OSError as exc:
            logger.info("%s: the compiled network is not kept: %s", self.folder, exc)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Path, int | None]]:
    """Open a folder: yield the prefix of its files' names, and its descriptor.

    Windows has no such descriptors, and caches are in the user's home.
    Raises `OSError` if another user may write to the folder or exchange it.
    """
    if sys.platform == "win32":
        yield path, None
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        parent = os.stat("..", dir_fd=descriptor)
        if _is_foreign(os.fstat(descriptor)) or _is_foreign(parent, stat.S_ISVTX):
            raise OSError("others may write there")
        yield Path(), descriptor
    finally:
        os.close(descriptor)


def _read(folder: tuple[Path, int | None], name: str) -> bytes:
    """Read a file. Raises `OSError` if another user may have written it."""
    prefix, descriptor = folder
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(prefix / name, flags, dir_fd=descriptor), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or _is_foreign(status):
            raise OSError(f"another user may have written {name}")
        return file.read()


def _write(folder: tuple[Path, int | None], name: str, content: bytes) -> None:
    """Write a file atomically. Raises `OSError`."""
    prefix, descriptor = folder
    part = prefix / f".{name}-{secrets.token_hex(4)}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    opened = os.open(part, flags, 0o600, dir_fd=descriptor)
    try:
        with os.fdopen(opened, "wb") as file:
            file.write(content)
        os.replace(part, prefix / name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
    except OSError:
        with suppress(OSError):
            os.unlink(part, dir_fd=descriptor)
        raise


def _is_foreign(status: os.stat_result, safe: int = 0) -> bool:
    """Return True if a user other than this one and root owns a file or may write to it.

    With a bit of `safe` in its mode others may: in a sticky folder they rename only their files.
    """
    if sys.platform == "win32":
        return False
    written = status.st_mode & OTHERS_WRITE and not status.st_mode & safe
    return status.st_uid not in (0, os.getuid()) or bool(written)
