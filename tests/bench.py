"""Speed and memory beside the reference: python -m tests.bench [--windows N].

Both sides run htdemucs at its released size on the same window, alternating in one process, after a
warm-up; the figures are medians. Peak memory is that of a process of its own for each side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from .helpers import noise, released_pair, run

WINDOW = 343_980  # samples: 7.8 s at 44.1 kHz

PEAK = """
import resource, sys, torch
from tests.bench import WINDOW
from tests.helpers import noise, released_pair
model = released_pair("955717e8")[int(sys.argv[1])]
mix = noise(2, WINDOW)[None]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    model(mix)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        function()
    return time.perf_counter() - start


def peak_megabytes(side: int) -> float:
    """What a window adds to the peak memory of a process with both models loaded."""
    result = run("-c", PEAK, side)
    result.check_returncode()
    per_megabyte = 1024 * 1024 if sys.platform == "darwin" else 1024  # bytes there, else KiB
    return int(result.stdout) / per_megabyte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=7, help="windows per side")
    count = parser.parse_args().windows
    # First, while this process is small: Linux hands a parent's peak on to its children.
    peak_ours, peak_theirs = peak_megabytes(1), peak_megabytes(0)
    theirs, ours = released_pair("955717e8")
    mix = noise(2, WINDOW)[None]
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    for index in range(count + 1):
        for name, model in (("theirs", theirs), ("ours", ours)):
            taken = seconds(lambda model=model: model(mix))
            if index:
                times[name].append(taken)
    a, b = statistics.median(times["ours"]), statistics.median(times["theirs"])
    print(f"{'htdemucs, one window of 7.8 s':34}{'ours':>10}{'theirs':>10}{'ratio':>8}")
    print(f"{'seconds (median)':34}{a:10.3f}{b:10.3f}{b / a:8.2f}")
    label = "peak memory of the window (MB)"
    print(f"{label:34}{peak_ours:10.0f}{peak_theirs:10.0f}{peak_ours / peak_theirs:8.2f}")


if __name__ == "__main__":
    main()
