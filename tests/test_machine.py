from __future__ import annotations

import platform
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from demucs_infer.engine import machine
from demucs_infer.engine.machine import worker_pool

from .helpers import environment, run

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")

PROLOGUE = """
import resource, torch
from demucs_infer.engine.machine import kept_memory

def faults(times=1):
    "Return the number of page faults of the last of `times` large tensors."
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The gaps that the first tensors leave may be a little too small for the next.
MANY = 20

def megabytes():
    "Return the resident memory of the process."
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

faults()
"""


def printed(script: str, **variables: str) -> list[float]:
    """Return the numbers that a new process prints."""
    result = run("-c", PROLOGUE + script, env={**environment(), **variables})
    assert result.returncode == 0, result.stderr
    return [float(word) for word in result.stdout.split()]


@glibc
@pytest.mark.slow
def test_memory_is_kept_within_nested_blocks_and_returned_after_them() -> None:
    outside, within, kept, still_kept, returned = printed(
        """
print(faults(MANY))
with kept_memory():
    with kept_memory():
        print(faults(MANY), megabytes())
    print(megabytes())
print(megabytes())
"""
    )
    assert within < outside / 8
    assert min(kept, still_kept) > returned + 50


@glibc
@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_MMAP_THRESHOLD_": "100000"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000"},
    ],
    ids="-".join,
)
def test_settings_of_the_user_are_kept(variables: dict[str, str]) -> None:
    script = "with kept_memory(): print(faults(), faults(MANY))"
    first, last = printed(script, **variables)
    assert last > first / 2


@glibc
@pytest.mark.slow
def test_separation_keeps_memory_between_windows_and_returns_it() -> None:
    before, after, first, last = printed(
        """
from demucs_infer.apply import apply_model
from tests.helpers import noise

class Wide(torch.nn.Module):
    sources, samplerate, audio_channels, segment = ["all"], 1000, 2, 10
    faults = []

    def forward(self, x):
        self.faults.append(faults(MANY if self.faults else 1))
        return x[:, None]

print(megabytes())
apply_model(Wide(), noise(2, 30_000)[None])
print(megabytes(), Wide.faults[0], Wide.faults[-1])
"""
    )
    assert after < before + 50
    assert last < first / 8


def test_only_the_workers_of_the_pool_use_one_thread() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with worker_pool(2) as pool:
            both = threading.Barrier(2)

            def threads() -> int:
                both.wait(60)
                return torch.get_num_threads()

            assert [job.result() for job in [pool.submit(threads) for _ in "ab"]] == [1, 1]
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(usual)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.slow
def test_worker_does_not_start_openmp_threads() -> None:
    script = """
import os, torch
from concurrent.futures import ThreadPoolExecutor
from demucs_infer.engine.machine import worker_pool

def work():
    before = set(os.listdir("/proc/self/task"))
    x = torch.ones(2, 1, 1_000_000)
    torch.nn.functional.conv1d(x, torch.ones(4, 1, 50)).exp().sum()
    return len(set(os.listdir("/proc/self/task")) - before)

torch.set_num_threads(4)
for pool in (ThreadPoolExecutor(1), worker_pool(1)):
    print(pool.submit(work).result())
"""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    usual, alone = map(int, result.stdout.split())
    assert usual > alone == 0


@pytest.mark.parametrize(
    ("capability", "of_intel", "faster"),
    [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False)],
)
def test_onednn_is_faster_where_mkl_does_not_use_avx512(
    capability: str, of_intel: bool, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "X86", True)
    monkeypatch.setattr(machine, "_is_of_intel", lambda: of_intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert machine.onednn_is_faster() == faster
