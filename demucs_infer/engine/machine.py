"""The memory, the threads and the instructions of the processor, as the engine uses them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..compat import has_bfloat16_instructions

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
# Setting a threshold ends glibc's own adaptation: these are the values that it grows to.
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
_CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_lock = threading.Lock()
_users = 0
_starting = threading.Lock()


def _glibc() -> Any:
    """Return the C library if it is glibc, and the environment does not configure malloc."""
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if os.name != "posix" or chosen or any(name in os.environ for name in _CHOICES):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process while the block runs, and return it to the system then.

    glibc asks the system for every block above 32 MB and gives it back when it is freed. The system
    fills what it gives with zeros, page by page: half of the time of a window of 40 s (the time
    model of mdx takes 2.6 instead of 5.5 s), a tenth of that of one of 7.8 s. What is kept has
    gaps: the peak of the former is about a tenth higher.

    Do nothing where the C library is another, or where the environment sets its thresholds (see
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


def worker_pool(workers: int) -> ThreadPoolExecutor:
    """Return a pool of threads without OpenMP teams.

    PyTorch's OpenMP gives each thread that works on tensors a team. Once there are more threads
    than cores, all teams wait for each other in the system instead of in a loop: a window of
    htdemucs takes 1.7 instead of 1.4 s as soon as another thread has a team, even an idle one.
    """
    return ThreadPoolExecutor(workers, initializer=_work_alone)


def _work_alone() -> None:
    # Another worker that starts meanwhile would take the 1 for the usual number.
    with _starting:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        # New threads would start with this number, too. Only another thread can restore theirs.
        other = threading.Thread(target=torch.set_num_threads, args=(usual,))
        other.start()
        other.join()


X86 = platform.machine().lower() in ("x86_64", "amd64")
# Variables, and their values at which a library does not use the instructions for bfloat16.
ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
ATEN = ("ATEN_CPU_CAPABILITY",)
_WITHOUT = {
    **dict.fromkeys(
        ONEDNN, "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split()
    ),
    **dict.fromkeys(ATEN, ("DEFAULT", "AVX2")),
}


def limit_on_bfloat16(*variables: str) -> str | None:
    """Return which of `variables` excludes the instructions for bfloat16, if one does."""
    for name in variables:
        value = os.environ.get(name, "")
        if value.upper() in _WITHOUT[name]:
            return f"{name}={value} leaves out the instructions for it"
    return None


@functools.cache
def _is_of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux; Apple's computers have no other x86 processor
        return platform.system() == "Darwin" or "GenuineIntel" in platform.processor()


def onednn_is_faster() -> bool:
    """Return True if products of matrices are faster by oneDNN than by MKL.

    MKL takes AVX-512 only on processors by Intel. It is as good where there is no AVX-512.
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return X86 and wide and not _is_of_intel() and torch.backends.mkldnn.is_available()


def why_no_bfloat16() -> str | None:
    """Return why PyTorch's bfloat16 would not be faster than float32 here; None where it is."""
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    limit = limit_on_bfloat16(*ONEDNN, *ATEN) if X86 else None
    if limit is None and (not has or (X86 and not has_bfloat16_instructions())):
        return "this processor has no instructions for it"
    return limit
