"""Train the small HTDemucs of the demonstration on songs that `tests/tools/synth.py` makes.

    python -m training.train_demo OUT [--start CHECKPOINT] [--steps N] [--songs N]

OUT gets the songs (`songs.npy`), the state to resume from (`state.pt`), a line for each validation
(`log.txt`) and the averaged weights (`demo.safetensors`). A second call goes on where the first
one ended; with a larger `--steps` the rate rises again to where its curve then is.

The demonstration was trained in two runs on one core of a shared server:

1.  2400 steps from random weights, 52 minutes. That was an earlier script, with the L1 distance as
    the loss and stems of more varied gains, on songs of an earlier `tests/tools/synth.py`: harder
    ones, with wider levels, ranges and places, and longer reverb (both are those of commit
    7905f20).
2.  3100 steps of this script with its defaults and the first run's result as `--start`, 70
    minutes with pauses. Until step 1000 the rate was that of 3000 steps, and from there on the
    inverse STFT was a faster one of the same values and gradients.

On glibc, `MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000` in the environment
saves a third: memory is then kept instead of being mapped anew for every large tensor.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from demucs_infer.apply import apply_model
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.states import load_model, save_model
from tests import synth

MODEL = {
    "sources": list(synth.SOURCES),
    "channels": 16,
    "dconv_mode": 1,  # residual branches in the encoders alone
    "dconv_depth": 1,
    "t_layers": 1,
    "t_heads": 4,
    "t_hidden_scale": 2,
    "segment": 3,
}

# Seeds below 1000 belong to the tests, and are heard by no training.
FIRST_SONG, VALIDATION = 10_000, range(1000, 1020)
SECONDS = 20  # of a song
PCM = 32767  # the pool is int16: an hour of stems takes 2.5 GB

BATCH = 4  # of windows: on a CPU more steps are worth more than larger ones
RATE = 1.5e-3  # of Adam, at its peak
WARMUP = 50  # steps until then
CLIP = 10.0  # the largest norm of a gradient
COHERENT = 0.5  # share of windows whose stems are of one song, playing together
GAIN = 2.5  # dB: deviation of a stem's gain
FLOOR = 3e-3  # of the mix's power: a smaller error in a window is good enough
AVERAGE = 0.995  # decay of the averaged weights, a time of 200 steps


def write_song(path: Path, index: int) -> None:
    song = synth.song(FIRST_SONG + index, SECONDS)
    pcm = np.stack([song[source] for source in synth.SOURCES]) * PCM
    np.load(path, mmap_mode="r+")[index] = np.round(pcm)


def load_songs(path: Path, count: int) -> np.ndarray:
    """The songs `[N, S, C, T]` as int16, from a file that is made if there is none."""
    if not path.exists():
        partial = path.with_suffix(".part")
        shape = (count, len(synth.SOURCES), 2, SECONDS * synth.RATE)
        np.lib.format.open_memmap(partial, "w+", np.int16, shape)
        with ProcessPoolExecutor() as executor:
            list(executor.map(write_song, itertools.repeat(partial), range(count)))
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def draw_window(songs: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Stems `[S, C, T]` of a window, of one song or of several, changed in ways that keep music."""
    length = MODEL["segment"] * synth.RATE
    count = len(synth.SOURCES)
    pick = rng.integers(len(songs), size=count)
    start = rng.integers(songs.shape[-1] - length, size=count)
    if rng.random() < COHERENT:
        pick[:], start[:] = pick[0], start[0]
    stems = np.stack(
        [songs[p, s, :, at : at + length] for s, (p, at) in enumerate(zip(pick, start))]
    )
    stems = torch.from_numpy(stems.astype(np.float32) / PCM)
    gains = 10 ** (rng.normal(0, GAIN, (count, 1, 1)) / 20) * rng.choice([-1, 1], (count, 1, 1))
    stems = stems * torch.from_numpy(gains.astype(np.float32))
    swapped = torch.from_numpy(rng.random((count, 1, 1)) < 0.5)
    stems = torch.where(swapped, stems.flip(1), stems)
    return stems / (stems.sum(0).std() + 0.01)


def sdr(stems: Tensor, estimate: Tensor) -> Tensor:
    """Signal-to-distortion ratio of whole stems, dB `[S]`."""
    return 10 * torch.log10(stems.square().sum((1, 2)) / (stems - estimate).square().sum((1, 2)))


def distortion(estimate: Tensor, stems: Tensor) -> Tensor:
    """The mean over windows and sources of the error's power in dB, as SDR counts it."""
    return 10 * torch.log10((estimate - stems).square().mean((2, 3)) + FLOOR).mean()


@torch.no_grad()
def validate(model: nn.Module, seeds: range) -> Tensor:
    """Mean SDR `[S]` over the songs of `seeds`, separated as the library does it."""
    ratios = []
    for seed in seeds:
        song = synth.song(seed, SECONDS)
        stems = torch.from_numpy(np.stack([song[source] for source in synth.SOURCES]))
        mix = stems.sum(0)
        mean, std = mix.mean(), mix.mean(0).std()
        estimate = apply_model(model, ((mix - mean) / std)[None], shifts=0, overlap=0.25)[0]
        ratios.append(sdr(stems, estimate * std + mean))
    return torch.stack(ratios).mean(0)


def schedule(step: int, steps: int) -> float:
    """The rate at `step` as a part of the peak: up in a line, down in half a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - WARMUP) / (steps - WARMUP))))


class Training:
    """The weights, their average, and the optimizer."""

    def __init__(self, folder: Path, start: Path | None = None) -> None:
        torch.manual_seed(0)
        self.folder, self.step = folder, 0
        self.model = load_model(start) if start else HTDemucs(**MODEL)
        self.average = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), betas=(0.9, 0.99))
        if self.state_file.exists():
            state = torch.load(self.state_file)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    def advance(self, songs: np.ndarray, rate: float) -> float:
        """One step; returns its loss."""
        rng = np.random.default_rng(self.step)
        stems = torch.stack([draw_window(songs, rng) for _ in range(BATCH)])
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):  # a fifth faster, where the CPU has it
            estimate = self.model(stems.sum(1))
        loss = distortion(estimate, stems)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * rate
        self.optimizer.step()
        self.step += 1
        self.update_average()
        return loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(AVERAGE, self.step / (self.step + 10))  # the first weights are forgotten soon
        for mean, weight in zip(self.average.parameters(), self.model.parameters()):
            mean.lerp_(weight, 1 - decay)

    def save(self) -> None:
        """Write the state and the averaged model; a file is whole or not there."""
        state = {"step": self.step, "optimizer": self.optimizer.state_dict()}
        state |= {"model": self.model.state_dict(), "average": self.average.state_dict()}
        partial = self.state_file.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.state_file)
        partial = save_model(self.average, self.folder / "part.safetensors", half=True)
        partial.replace(self.folder / "demo.safetensors")

    def report(self, songs: range, line: str) -> None:
        each = validate(self.average, songs)
        scores = " ".join(f"{name} {x:.2f}" for name, x in zip(synth.SOURCES, each.tolist()))
        with (self.folder / "log.txt").open("a") as log:
            print(f"{line}: mean {each.mean():.2f} dB, {scores}", file=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3100)
    parser.add_argument("--start", type=Path, help="a checkpoint to begin with")
    parser.add_argument("--songs", type=int, default=240, help="songs of the pool")
    parser.add_argument("--every", type=int, default=200, help="steps between validations")
    parser.add_argument("--threads", type=int, default=1, help="1 is best on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    songs = load_songs(options.out / "songs.npy", options.songs)
    training = Training(options.out, options.start)
    start, losses = time.monotonic(), []
    while training.step < options.steps:
        losses.append(training.advance(songs, schedule(training.step, options.steps)))
        if training.step % options.every == 0 or training.step == options.steps:
            training.save()
            pace = (time.monotonic() - start) / len(losses)
            recent = np.mean(losses[-options.every :])
            line = f"step {training.step}, {pace:.2f} s per step, loss {recent:.4f}"
            last = training.step == options.steps
            training.report(VALIDATION if last else VALIDATION[:5], line)


if __name__ == "__main__":
    main()
