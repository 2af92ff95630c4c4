"""Memory that a layer frees is kept for the next one, instead of returned to the system.

The C library of Linux (glibc) asks the system for every block above 32 MB and gives it back when it
is freed. The system fills what it gives with zeros, page by page, at the first touch: half of the
time of a window of 40 s (the time-domain model of mdx takes 2.6 instead of 5.5 s), a tenth of that
of one of 7.8 s. What is kept has gaps: the peak of the former is about a tenth higher.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # no blocks of their own, no returns
# What glibc's thresholds grow to by themselves, which setting them has ended.
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
_CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_lock = threading.Lock()
_users = 0


def _glibc() -> Any:
    """The C library, if it is glibc and nobody has chosen how it allocates."""
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if os.name != "posix" or chosen or any(name in os.environ for name in _CHOICES):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """While the block runs, the process keeps the memory that is freed; then all of it goes back.

    Does nothing where the C library is another, or the environment sets its thresholds (see
    mallopt(3)). Blocks may be nested, and be in several threads.
    """
    global _users
    glibc = _glibc()
    if glibc is None:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            for parameter, value in _KEEPING.items():
                glibc.mallopt(parameter, value)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for parameter, value in _USUAL.items():
                    glibc.mallopt(parameter, value)
                glibc.malloc_trim(0)
