"""Windows are weighted and summed, and what is finished is taken off.

Shapes: `[B, S, C, n]` windows of stems (batch, sources, channels, samples).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Step, Window


def fade(length: int, transition_power: float) -> Tensor:
    """Weights of a window: up from its start to its middle, and down again, at most 1.

    1 ┤    /\\
      │  /    \\
    0 ┤/        \\
    """
    half = length // 2
    up = torch.arange(1, half + 1, dtype=torch.float64)
    down = torch.arange(length - half, 0, -1, dtype=torch.float64)
    weight = torch.cat([up, down])
    smallest = torch.finfo(torch.float64).tiny  # a large power must not leave zero
    return (weight / weight.max()).pow(transition_power).clamp_min(smallest)


def window_share(windows: Sequence[Window], index: int, weight: Tensor) -> Tensor:
    """Share of window `index` in the sum at each of its samples, `[n]`.

    `weight` is `fade` for a whole window; shorter windows use its first part. A stem is the mean
    of the windows `y_i` that reach sample `t`, weighted by `w` from their starts `s_i` on:

                sum_i w[t - s_i] y_i[t - s_i]                                 w[t - s_i]
        y[t] =  -----------------------------  =  sum_i  share_i y_i,  share_i = ----------------
                     sum_j w[t - s_j]                                      sum_j w[t - s_j]

    The shares of all windows sum to 1 at each sample. They depend on the plan alone, so each
    window is weighted once, and no sum of weights is kept beside the sum of the stems.
    """
    start, stop = windows[index]
    total = torch.zeros(stop - start, dtype=weight.dtype)
    before = itertools.takewhile(lambda w: w.stop > start, reversed(windows[:index]))
    after = itertools.takewhile(lambda w: w.start < stop, windows[index:])
    for other in itertools.chain(before, after):
        low, high = max(start, other.start), min(stop, other.stop)
        total[low - start : high - start] += weight[low - other.start : high - other.start]
    return (weight[: stop - start] / total).float()


class OverlapAdd:
    """A sum of windows of which the finished front is taken off.

    `capacity` is the number of samples that are unfinished at any time, at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.start = 0
        self.sum: Tensor | None = None

    def add(self, start: int, x: Tensor, share: Tensor | None = None) -> None:
        """Add `x` `[..., n]`, times `share` if it is given, at sample `start` of the track."""
        if self.sum is None:
            self.sum = x.new_zeros(*x.shape[:-1], self.capacity)
        at = start - self.start
        share = x.new_ones(()) if share is None else share
        self.sum[..., at : at + x.shape[-1]].addcmul_(x, share)

    def take(self, stop: int) -> Tensor:
        """Remove and return the samples up to `stop`."""
        assert self.sum is not None
        count = stop - self.start
        block = self.sum[..., :count].clone()
        rest = self.sum[..., count:].clone()
        self.sum[..., : rest.shape[-1]] = rest
        self.sum[..., rest.shape[-1] :] = 0
        self.start = stop
        return block


def unfinished(steps: Sequence[Step], length: int) -> int:
    """The samples that an `OverlapAdd` of `steps` has to hold at most."""
    finished = largest = 0
    for step in steps:
        largest = max(largest, min(step.window.stop, length) - finished)
        finished = max(finished, min(step.complete, length))
    return largest
