"""What the C library does with memory that is freed, seen in processes of their own."""

from __future__ import annotations

import os
import platform

import pytest

from .helpers import run

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back, and is told not to"
)

PROLOGUE = """
import resource, torch
from demucs_infer.engine.memory import kept_memory

def faults(times=1):
    "Pages that the system has to give for the last of some large tensors."
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

MANY = 20  # the first ones may leave gaps that are a little too small for the next

def megabytes():
    "What the process has of the system."
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

faults()
"""


def printed(script: str) -> list[float]:
    result = run("-c", PROLOGUE + script)
    assert result.returncode == 0, result.stderr
    return [float(word) for word in result.stdout.split()]


def test_memory_is_kept_within_the_block_and_given_back_after_it() -> None:
    outside, within, kept, still_kept, given_back = printed(
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
    assert min(kept, still_kept) > given_back + 50


def test_who_has_chosen_how_memory_is_kept_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "with kept_memory(): print(faults(), faults(MANY))"
    for name, value in {
        "MALLOC_MMAP_THRESHOLD_": "100000",
        "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000",
    }.items():
        with monkeypatch.context() as patch:
            patch.setitem(os.environ, name, value)
            first, last = printed(script)
        assert last > first / 2


def test_a_separation_keeps_memory_between_windows_and_gives_it_back() -> None:
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
