"""Speed, error and memory beside the reference: python -m tests.tools.bench [--help].

All sides run the same window with the same random weights, alternating, each in a process of its
own, after a warm-up; seconds are medians. A window is as long as the model is run at (7.8 s for
htdemucs, 40 s for the others), unless --seconds is given. Peak memory is that of a process of its
own for each side. With --song the two commands separate a made song, everything counted; with
--cuda the windows run on a GPU. With --exact both are compared with the reference in float64, on
tones with gaps. Each time goes to standard error when it is taken.

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m tests.tools.bench

stands for a processor without AVX-512, but for MKL, which still has it on Intel's, and OpenVINO,
which may crash: --network leaves it out.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import demucs.states
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demucs_infer.states
from demucs_infer.audio import save_audio
from demucs_infer.engine.backends import on_engine
from demucs_infer.engine.cpu import fast_copy, linear
from demucs_infer.engine.machine import kept_memory
from demucs_infer.engine.options import SeparationOptions

from ..helpers import (
    decibels,
    environment,
    noise,
    released_pair,
    run,
    save_package,
    tone_with_gaps,
)

MODELS = {
    "htdemucs": "955717e8",
    "hdemucs_mmi": "75fc33f5",
    "mdx, spectral": "a1d90b5c",
    "mdx, time": "0d19c1c6",
}
TRACKS, TRACK_SECONDS = 24, 20  # of each process with --ray
ON_CPU = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "openvino float32": {"engine": "openvino"},
    "openvino bfloat16": {"engine": "openvino", "precision": "bfloat16"},
    "onnxruntime float32": {"engine": "onnxruntime"},
}
ON_CUDA = {
    "float32": {},
    "float16": {"precision": "float16"},
    "bfloat16": {"precision": "bfloat16"},
}
PEAK = """
import resource, sys, torch
from tests.tools.bench import SeparationOptions, fast_copy, kept_memory
from tests.tools.bench import make_window, nullcontext, on_engine
from tests.helpers import released_pair
theirs, ours = released_pair(sys.argv[1])
side = theirs
if sys.argv[2] != "demucs":
    side = fast_copy(on_engine(ours, SeparationOptions(**eval(sys.argv[3]))))
mix = make_window(ours, eval(sys.argv[4]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad(), nullcontext() if side is theirs else kept_memory():
    side(mix)
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
            taken = time.perf_counter() - start
            print(f"{name}: {taken:.2f} s", file=sys.stderr, flush=True)
            if index:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def make_window(model: nn.Module, seconds: float | None) -> Tensor:
    """Noise `[1, 2, T]` of `seconds`, or of the length that `model` is run at."""
    return noise(2, int(44_100 * (seconds or model.segment)))[None]


def peak_megabytes(
    signature: str, side: str, options: Mapping[str, Any], seconds: float | None
) -> float:
    """The bytes that a window adds to the peak memory of a process that has the models."""
    result = run("-c", PEAK, signature, side, dict(options), seconds)
    result.check_returncode()
    per_megabyte = 1024 * 1024 if sys.platform == "darwin" else 1024  # bytes there, else KiB
    return int(result.stdout) / per_megabyte


def matrix_rate() -> float:
    """GFLOP/s of the machine in the better of PyTorch's two float32 products of large matrices."""
    side = 4096
    x = torch.randn(side, side)
    with torch.no_grad():
        ways = {"PyTorch": lambda: F.linear(x, x), "ours": lambda: linear(x, x, None)}
        return 2 * side**3 / 1e9 / min(medians(ways, 3).values())


def gigaflops(model: nn.Module, mix: Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(mix)
    return counter.get_total_flops() / 1e9


class Side:
    """One side of a comparison, in a process of its own, which waits while others have their turn.

    In one process, idle threads of an engine and memory that another gives back cost all of them.
    The arguments are those of `_serve`.
    """

    def __init__(self, *arguments: Any) -> None:
        processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        self.result = torch.from_numpy(self._pipe.recv())

    def window(self) -> None:
        self._pipe.send(None)
        self._pipe.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


@torch.no_grad()
def _serve(
    pipe: Any,
    signature: str,
    options: Mapping[str, Any] | None,
    seconds: float | None,
    device: str,
    batch: int,
) -> None:
    """Run a window when told to, by an engine with `options`, or, for None, by the reference."""
    theirs, ours = (model.to(device) for model in released_pair(signature))
    mix = make_window(ours, seconds).to(device).expand(batch, -1, -1)
    mine = options is not None
    model = theirs
    if mine:
        model = on_engine(ours, SeparationOptions(**options, device=device))
        model = fast_copy(model) if device == "cpu" else model  # as the engine does
    with kept_memory() if mine else nullcontext():  # as the engine does
        pipe.send(model(mix[:1]).cpu().numpy())
        while True:
            pipe.recv()
            model(mix)
            if device == "cuda":
                torch.cuda.synchronize()
            pipe.send(None)


def compare_windows(
    label: str, count: int, seconds: float | None, device: str, networks: Sequence[str] | None
) -> None:
    """A line of the table for each side of one model."""
    signature, batch = MODELS[label], 8 if device == "cuda" else 1
    known = ON_CPU if device == "cpu" else ON_CUDA
    variants: dict[str, Mapping[str, Any] | None] = {
        name: known[name] for name in networks or known
    }
    sides = {
        name: Side(signature, options, seconds, device, batch)
        for name, options in {**variants, "demucs": None}.items()
    }
    times = medians({name: side.window for name, side in sides.items()}, count)
    for side in sides.values():
        side.close()
    theirs, ours = released_pair(signature)
    rate, work = matrix_rate(), gigaflops(theirs, make_window(ours, seconds))
    for name, value in times.items():
        ratio = times["demucs"] / value
        error = decibels(sides[name].result, sides["demucs"].result)
        cells = [label, name, f"{value / batch:.3f}", f"{ratio:.2f}", f"{error:.0f} dB"]
        if device == "cpu":
            cells.append(f"{work / value / rate:.0%}")
        print("|", " | ".join(cells), "|", flush=True)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` cores busy with other programs."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@torch.no_grad()
def compare_errors(label: str, seconds: float | None) -> None:
    """Largest errors of both sides against the reference in float64, as parts of its peak."""
    theirs, ours = released_pair(MODELS[label])
    mix = tone_with_gaps(int(44_100 * (seconds or 7.8)), 44_100)
    exact = copy.deepcopy(theirs).double()(mix)
    error, allowed = (
        float((model(mix.float()) - exact).abs().max() / exact.abs().max())
        for model in (ours, theirs)
    )
    print(f"| {label} | {error:.1e} | {allowed:.1e} | {error / allowed:.2f} |", flush=True)


def compare_memory(label: str, seconds: float | None, networks: Sequence[str] | None) -> None:
    chosen = {name: ON_CPU[name] for name in networks or ON_CPU}
    sides: dict[str, dict[str, str]] = {**chosen, "demucs": {}}
    peaks = {name: peak_megabytes(MODELS[label], name, kw, seconds) for name, kw in sides.items()}
    for name, value in peaks.items():
        print(f"| {label} | {name} | {value:.0f} | {value / peaks['demucs']:.2f} |", flush=True)


def compare_songs(minutes: Sequence[float]) -> None:
    """Peak memory of the command on songs of some lengths."""
    with tempfile.TemporaryDirectory() as name:
        for length in minutes:
            song = Path(name, f"{length:g}.wav")
            # Never whole here: the peak of this process would count for its children, too.
            second = noise(44_100, 2).mul(2**12).short().numpy().tobytes()
            with wave.open(str(song), "wb") as file:
                file.setparams((2, 2, 44_100, 0, "NONE", ""))
                for _ in range(round(60 * length)):
                    file.writeframes(second)
            words = ["-m", "demucs_infer", "-n", "demucs_unittest", "-d", "cpu", "-q", "-o", name]
            process = subprocess.Popen([sys.executable, *words, str(song)])
            _, status, used = os.wait4(process.pid, 0)
            assert not status
            print(f"{length:g} minutes: {used.ru_maxrss / 2**10:.0f} MiB", flush=True)


def compare_loading(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save_package(Path(folder, "a.th"), released_pair("955717e8")[0], half=True)
        loaders = {"demucs-infer": demucs_infer.states, "demucs": demucs.states}
        sides = {name: partial(states.load_model, path) for name, states in loaders.items()}
        for name, seconds in medians(sides, count).items():
            print(f"loading htdemucs, {name}: {seconds:.3f} s")


def compare_commands(seconds: float, count: int) -> None:
    """The two commands on a song of `seconds`: start, load, decode, separate, encode."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_package(folder / "net.th", released_pair("955717e8")[0], half=True)
        song = folder / "song.mp3"
        save_audio(noise(2, int(44_100 * seconds)), song, 44_100)
        common = ["--repo", folder, "-n", "net", "-o", folder, "-d", "cpu", song]
        sides = {
            "demucs-infer": ["-m", "demucs_infer", *common],
            "demucs-infer --precision bfloat16": [
                *["-m", "demucs_infer", "--precision", "bfloat16", *common]
            ],
            **{
                f"demucs-infer --engine {engine}": [
                    *["-m", "demucs_infer", "--engine", engine, "--cache-dir", folder, *common]
                ]
                for engine in ("openvino", "onnxruntime")
            },
            "demucs": ["-m", "demucs", *common],
        }
        times = medians({k: partial(_checked, *v) for k, v in sides.items()}, count)
        for side, value in times.items():
            print(f"| {side} | {value:.1f} | {times['demucs'] / value:.2f} |", flush=True)


def compare_ray(count: int) -> None:
    """Ray beside as many plain processes, on the same tracks: a process and a thread per core.

    Both start up, too: only the tracks beyond the first of each process count.
    """
    alone = {**environment(), "OMP_NUM_THREADS": "1"}
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracks = [folder / f"{index}.wav" for index in range(TRACKS * processes)]
        for track in tracks:
            save_audio(noise(2, 44_100 * TRACK_SECONDS), track, 44_100)
        command = ["-m", "demucs_infer", "-n", "demo", "-d", "cpu", "-q", "-o", folder]
        on_ray = ["--ray", "--cpus-per-worker", 1]

        def plain(songs: Sequence[Path]) -> None:
            with ThreadPoolExecutor(processes) as pool:
                shares = [songs[index::processes] for index in range(processes)]
                list(pool.map(lambda share: _checked(*command, *share, env=alone), shares))

        sides = {
            f"{side}, {len(songs)} tracks": partial(function, songs)
            for songs in (tracks[:processes], tracks)
            for side, function in {
                "plain": plain,
                "ray": lambda songs: _checked(*command, *on_ray, "--", *songs, env=alone),
            }.items()
        }
        plain_start, ray_start, plain_all, ray_all = medians(sides, count).values()
        ratio = (ray_all - ray_start) / (plain_all - plain_start)
        print(f"start: {plain_start:.1f} s, on Ray {ray_start:.1f} s")
        print(f"{len(tracks)} tracks: {plain_all:.1f} s, on Ray {ray_all:.1f} s", end=" ")
        print(f"(beyond the start {ratio - 1:+.0%})")


def _checked(*arguments: object, **kwargs: object) -> None:
    result = run(*arguments, **kwargs)
    assert result.returncode == 0, result.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=5, help="windows per side (default: 5)")
    parser.add_argument("--model", choices=MODELS, action="append", help="(default: all)")
    parser.add_argument("--network", choices=ON_CPU, action="append", help="(default: all)")
    parser.add_argument("--seconds", type=float, help="length of a window (default: the model's)")
    parser.add_argument("--cuda", action="store_true", help="on a GPU, in batches of 8 windows")
    parser.add_argument("--busy", action="store_true", help="each second core has other work")
    parser.add_argument("--exact", action="store_true", help="compare with float64 instead")
    parser.add_argument("--memory", action="store_true", help="compare peak memory instead")
    parser.add_argument(
        "--minutes",
        type=float,
        action="append",
        help="peak memory of the command on a song of so many minutes instead",
    )
    parser.add_argument("--loading", action="store_true", help="compare loading instead")
    parser.add_argument("--ray", action="store_true", help="compare Ray with processes instead")
    parser.add_argument("--song", type=float, metavar="SECONDS", help="compare commands instead")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores,", end=" ")
    print(f"{torch.backends.cpu.get_cpu_capability()},", end=" ")
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    with busy((os.cpu_count() or 1) // 2) if args.busy else nullcontext():
        _compare(args)


def _compare(args: argparse.Namespace) -> None:
    labels = args.model or MODELS
    if args.loading:
        compare_loading(args.windows)
    elif args.song:
        compare_commands(args.song, args.windows)
    elif args.ray:
        compare_ray(args.windows)
    elif args.exact:
        print("| model | error | of demucs | ratio |\n|---|---|---|---|")
        for label in labels:
            compare_errors(label, args.seconds)
    elif args.minutes:
        compare_songs(args.minutes)
    elif args.memory:
        for label in labels:
            compare_memory(label, args.seconds, args.network)
    else:
        print("| model | network | seconds | ratio | error below | of matrix rate |")
        print("|---|---|---|---|---|---|")
        device = "cuda" if args.cuda else "cpu"
        for label in labels:
            compare_windows(label, args.windows, args.seconds, device, args.network)


if __name__ == "__main__":
    main()
