from __future__ import annotations

import platform

import pytest

from .helpers import environment, run

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")

PROLOGUE = """
import resource, torch
from demucs_infer.engine.memory import kept_memory

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
