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

# Parameters of mallopt(3). Setting a threshold ends glibc's own adaptation: USUAL has the values
# that it grows to.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEEPING = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
USUAL = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}
THRESHOLDS = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}

_lock, _starting = threading.Lock(), threading.Lock()
_users = 0


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process while the block runs, and return it to the system then.

    glibc asks the system for every block above 32 MB and returns it when it is freed. The system
    fills each page with zeros: half of the time of a window of 40 s (mdx in time takes 2.6 instead
    of 5.5 s on an EPYC with AVX-512), a tenth of that of a window of 7.8 s. Kept memory has gaps:
    mdx in time adds 1.6 instead of 1.2 GB to the peak, and the spectral models of mdx 3 % more
    (EPYC with AVX2). Blocks may be nested, and run in several threads. They do nothing with another
    C library, or if the environment sets the thresholds.
    """
    global _users
    glibc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or THRESHOLDS & {*os.environ}
    if chosen or not hasattr(glibc, "gnu_get_libc_version"):
        yield
        return
    with _lock:
        _users += 1
        for parameter, value in KEEPING.items() if _users == 1 else ():
            glibc.mallopt(parameter, value)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for parameter, value in USUAL.items():
                    glibc.mallopt(parameter, value)
                glibc.malloc_trim(0)


def worker_pool(workers: int) -> ThreadPoolExecutor:
    """Return a pool of threads without OpenMP teams.

    PyTorch's OpenMP gives each thread that works on tensors a team. Once there are more threads
    than cores, all teams wait for each other in the system instead of in a loop: a window of
    htdemucs takes 1.7 instead of 1.4 s (EPYC with AVX-512) as soon as another thread has a team,
    even an idle one.
    """

    def work_alone() -> None:
        # Another worker that starts meanwhile would take the 1 for the usual number.
        with _starting:
            usual = torch.get_num_threads()
            torch.set_num_threads(1)
            # New threads would start with this number, too. Only another thread can restore theirs.
            other = threading.Thread(target=torch.set_num_threads, args=(usual,))
            other.start()
            other.join()

    return ThreadPoolExecutor(workers, initializer=work_alone)


X86 = platform.machine().lower() in ("x86_64", "amd64")
# Variables that limit the instructions of a library. At these values, bfloat16 has none.
ONEDNN, ATEN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"), ("ATEN_CPU_CAPABILITY",)
OLDER = "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split()
WITHOUT = dict.fromkeys(ONEDNN, OLDER) | {name: ["DEFAULT", "AVX2"] for name in ATEN}


def limit_on_bfloat16(*variables: str) -> str | None:
    """Return which of `variables` excludes the instructions for bfloat16, if one does."""
    for name in variables:
        value = os.environ.get(name, "")
        if value.upper() in WITHOUT[name]:
            return f"{name}={value} leaves out the instructions for it"
    return None


def why_no_bfloat16() -> str | None:
    """Return why PyTorch's bfloat16 would be slower than float32 here; None if it is faster."""
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    limit = limit_on_bfloat16(*ONEDNN, *ATEN) if X86 else None
    if limit is None and (not has or (X86 and not has_bfloat16_instructions())):
        return "this processor has no instructions for it"
    return limit


@functools.cache
def _is_of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux; Apple's computers have no other x86 processor
        return platform.system() == "Darwin" or "GenuineIntel" in platform.processor()


def onednn_is_faster() -> bool:
    """Return True if products of matrices are faster by oneDNN than by MKL.

    MKL takes AVX-512 only on processors by Intel. With AVX2 alone, both are as fast.
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return X86 and wide and not _is_of_intel() and torch.backends.mkldnn.is_available()
