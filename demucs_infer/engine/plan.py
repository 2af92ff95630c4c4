"""A track is cut into windows: plain integers, before anything runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..errors import OptionError
from .bag import as_bag
from .model import Member

MAX_SHIFT = 0.5  # seconds: the largest random offset of a shift


@dataclass(frozen=True)
class ApplyOptions:
    """How a track is cut; see `apply_model`. Raises `OptionError` for a value out of range."""

    shifts: int = 1
    split: bool = True
    overlap: float = 0.25
    transition_power: float = 1.0
    segment: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.shifts < 0 or self.shifts != int(self.shifts):
            raise OptionError(f"shifts={self.shifts} must be a whole number, 0 or more")
        if not 0 <= self.overlap < 1:
            raise OptionError(f"overlap={self.overlap} must be at least 0 and less than 1")
        if not self.transition_power >= 1:
            raise OptionError(f"transition_power={self.transition_power} must be at least 1")
        if self.segment is not None and not self.segment > 0:
            raise OptionError(f"segment={self.segment} must be more than 0 seconds")


class Window(NamedTuple):
    """A piece of a pass, in samples of the track (a shifted pass starts before the track)."""

    start: int
    stop: int


@dataclass(frozen=True)
class Pass:
    """One model's way through the track, for one shift."""

    model: int
    shift: int
    windows: list[Window]
    offset: int | None  # samples that were drawn, out of 0.5 s; None without shifts

    @property
    def start(self) -> int:
        return self.windows[0].start


class Step(NamedTuple):
    """A window to run, and how far the sum is complete once it has been added."""

    task: Pass
    number: int  # of the window in its pass
    complete: int

    @property
    def window(self) -> Window:
        return self.task.windows[self.number]


def plan_windows(start: int, stop: int, segment: int, stride: int) -> list[Window]:
    """Windows of `segment` samples every `stride` samples; the last ones may be shorter."""
    return [Window(at, min(at + segment, stop)) for at in range(start, stop, stride)]


def plan_passes(model: nn.Module, length: int, options: ApplyOptions) -> list[Pass]:
    """Every model's passes over a track of `length` samples, with their offsets drawn.

    The draws are in the reference's order (model by model, shift by shift, and what a model draws
    in each window), so that the same `random.seed`, or the same seed in the options, gives the same
    stems.
    """
    passes = []
    bag = as_bag(model)
    draw = random if options.seed is None else random.Random(options.seed)
    max_shift = int(MAX_SHIFT * bag.samplerate)
    for index, member in enumerate(bag.members):
        for shift in range(max(1, options.shifts)):
            offset = draw.randint(0, max_shift) if options.shifts else None
            start = 0 if offset is None else offset - max_shift
            windows = [Window(start, length)]
            if options.split:
                windows = plan_windows(start, length, *segment_and_stride(member, options))
            passes.append(Pass(index, shift, windows, offset))
            for _ in windows:
                member.consume_random(draw)
    return passes


def segment_and_stride(model: Member, options: ApplyOptions) -> tuple[int, int]:
    """Samples of a window, and from the start of one to that of the next."""
    seconds = model.segment if options.segment is None else options.segment
    segment = int(model.samplerate * seconds)
    stride = int((1 - options.overlap) * segment)
    if stride < 1:
        raise OptionError(
            f"segment={seconds} with overlap={options.overlap} leaves no sample between windows"
        )
    return segment, stride


def plan_steps(passes: Sequence[Pass], in_lockstep: bool, together: int = 1) -> list[Step]:
    """The order in which the windows run: pass after pass, or all passes in lockstep.

    In lockstep the track is finished from its start to its end, so that little has to be kept; each
    pass takes about `together` windows before the next one follows.
    """
    tasks = [(task, index) for task in passes for index in range(len(task.windows))]
    if in_lockstep:
        longest = max(window.stop - window.start for task in passes for window in task.windows)
        span = longest * together if together > 1 else 1
        tasks.sort(key=lambda item: item[0].windows[item[1]].start // span)
    steps = []
    complete = max(task.windows[-1].stop for task in passes)
    for task, index in reversed(tasks):
        steps.append(Step(task, index, complete))
        complete = min(complete, task.windows[index].start)
    return steps[::-1]
