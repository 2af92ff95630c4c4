"""Speed and memory beside the reference: python -m tests.bench [--windows N].

Both sides run htdemucs at its released size on the same window, alternating in one process, after a
warm-up; the figures are medians. Peak memory is that of a process of its own for each side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import demucs.states
import torch

import demucs_infer.states

from .helpers import noise, released_pair, run, save_package

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


def medians(sides: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Seconds that each side takes: they alternate `count` times, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(count + 1):
        for name, function in sides.items():
            start = time.perf_counter()
            with torch.no_grad():
                function()
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


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
    window = medians({"ours": lambda: ours(mix), "theirs": lambda: theirs(mix)}, count)
    with tempfile.TemporaryDirectory() as folder:
        path = save_package(Path(folder, "a.th"), theirs, half=True)
        loaders = {"ours": demucs_infer.states, "theirs": demucs.states}
        sides = {name: partial(states.load_model, path) for name, states in loaders.items()}
        loading = medians(sides, count)
    print(f"{'htdemucs, one window of 7.8 s':34}{'ours':>10}{'theirs':>10}{'ratio':>8}")
    for label, times in (("seconds (median)", window), ("seconds to load (median)", loading)):
        a, b = times["ours"], times["theirs"]
        print(f"{label:34}{a:10.3f}{b:10.3f}{b / a:8.2f}")
    label = "peak memory of the window (MB)"
    print(f"{label:34}{peak_ours:10.0f}{peak_theirs:10.0f}{peak_ours / peak_theirs:8.2f}")


if __name__ == "__main__":
    main()
