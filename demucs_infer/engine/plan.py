"""Plan a separation: cut a track into windows, as plain integers, before anything runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..errors import OptionError
from .bag import as_bag
from .options import SeparationOptions

MAX_SHIFT = 0.5  # seconds: the largest random offset of a shift


class Window(NamedTuple):
    """A range of samples of the track (a shifted pass starts before the track)."""

    start: int
    stop: int


@dataclass(frozen=True)
class Pass:
    """One model's way through the track, for one shift.

    `segment` is the length of a whole window, and `stride` the distance between the starts of two.
    """

    model: int
    shift: int
    windows: list[Window]
    offset: int | None  # samples that were drawn, out of 0.5 s; None without shifts
    segment: int
    stride: int

    @property
    def start(self) -> int:
        """The first sample of the first window."""
        return self.windows[0].start


class Step(NamedTuple):
    """A window to run, and the sample up to which the sum is complete after it."""

    task: Pass
    number: int  # of the window in its pass
    complete: int

    @property
    def window(self) -> Window:
        """The samples that the window covers."""
        return self.task.windows[self.number]


def plan_windows(start: int, stop: int, segment: int, stride: int) -> list[Window]:
    """Return windows of `segment` samples every `stride` samples; the last may be shorter."""
    return [Window(at, min(at + segment, stop)) for at in range(start, stop, stride)]


def plan_passes(model: nn.Module, length: int, options: SeparationOptions) -> list[Pass]:
    """Return every model's passes over a track of `length` samples, with their offsets drawn.

    The draws are in the reference's order (model by model, shift by shift, and the draws of a model
    in each window), so that the same `random.seed`, or the same seed in the options, gives the same
    stems. Raises `OptionError` if no sample is left between the starts of two windows.
    """
    passes = []
    bag = as_bag(model)
    draw = random if options.seed is None else random.Random(options.seed)
    max_shift = int(MAX_SHIFT * bag.samplerate)
    for index, member in enumerate(bag.members):
        for shift in range(max(1, options.shifts)):
            offset = draw.randint(0, max_shift) if options.shifts else None
            start = 0 if offset is None else offset - max_shift
            segment = stride = length - start
            if options.split:
                seconds = member.segment if options.segment is None else options.segment
                segment = int(member.samplerate * seconds)
                stride = int((1 - options.overlap) * segment)
                if stride < 1:
                    raise OptionError(
                        f"segment={seconds} with overlap={options.overlap} leaves no sample"
                        " between windows"
                    )
            windows = plan_windows(start, length, segment, stride)
            passes.append(Pass(index, shift, windows, offset, segment, stride))
            for _ in windows:
                member.consume_random(draw)
    return passes


def plan_steps(passes: Sequence[Pass], in_lockstep: bool, together: int = 1) -> list[Step]:
    """Return the order in which the windows run: pass after pass, or all passes in lockstep.

    In lockstep the track is finished from its start to its end, so that the sum stays short; each
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
