"""Streaming weighted overlap-add: emits samples once no later window can change them.

Shapes: `[B, S, C, n]` windows of stems (batch, sources, channels, samples).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Window


def fade(length: int, transition_power: float) -> Tensor:
    r"""Return the weights of a window: up from its start to its middle, and down again, at most 1.

    1 ┤    /\
      │  /    \
    0 ┤/        \
    """
    half = length // 2
    up = torch.arange(1, half + 1, dtype=torch.float64, device="cpu")
    down = torch.arange(length - half, 0, -1, dtype=torch.float64, device="cpu")
    weight = torch.cat([up, down])
    smallest = torch.finfo(torch.float64).tiny  # a large power must not leave zero
    return (weight / weight.max()).pow(transition_power).clamp_min(smallest)


def window_share(windows: Sequence[Window], index: int, weight: Tensor) -> Tensor:
    """Return the share of window `index` in the sum at each of its samples, `[n]`.

    `weight` is `fade` for a whole window; shorter windows use its first part. A stem is the mean
    of the windows `y_i` that reach sample `t`, weighted by `w` from their starts `s_i` on:

                sum_i w[t - s_i] y_i[t - s_i]                                 w[t - s_i]
        y[t] =  -----------------------------  =  sum_i  share_i y_i,  share_i = ----------------
                     sum_j w[t - s_j]                                      sum_j w[t - s_j]

    The shares of all windows sum to 1 at each sample. They depend on the plan alone, so each
    window is weighted once, and no sum of weights is kept beside the sum of the stems.
    """
    start, stop = windows[index]
    total = weight.new_zeros(stop - start)
    before = itertools.takewhile(lambda w: w.stop > start, reversed(windows[:index]))
    after = itertools.takewhile(lambda w: w.start < stop, windows[index:])
    for other in itertools.chain(before, after):
        low, high = max(start, other.start), min(stop, other.stop)
        total[low - start : high - start] += weight[low - other.start : high - other.start]
    return (weight[: stop - start] / total).float()


class OverlapAdd:
    """A sum of windows, from which `take` removes the finished samples.

    It consists of parts that lie end to end: a window is added to those that it reaches, and its
    rest becomes the next part. So a sum takes only the memory of its unfinished samples.
    """

    def __init__(self) -> None:
        self.start = 0
        self._parts: deque[Tensor] = deque()

    def add(self, start: int, x: Tensor, share: Tensor | None = None) -> None:
        """Add `x` `[..., n]`, times `share` if it is given, at sample `start` of the track.

        No sample may be left out between the windows added before and `start`.
        """
        share = x.new_ones(1) if share is None else share
        share = share.expand(*share.shape[:-1], x.shape[-1])
        at = start - self.start
        for part in self._parts:
            count = min(part.shape[-1] - at, x.shape[-1])
            if count > 0:
                part[..., at : at + count].addcmul_(x[..., :count], share[..., :count])
                x, share, at = x[..., count:], share[..., count:], at + count
            at -= part.shape[-1]
        if x.shape[-1]:
            self._parts.append(x * share)

    def take(self, stop: int) -> Tensor:
        """Remove and return the samples up to `stop`, of which there is at least one."""
        pieces = []
        while self.start < stop:
            part = self._parts.popleft()
            piece = part[..., : stop - self.start]
            if piece.shape[-1] < part.shape[-1]:
                self._parts.appendleft(part[..., piece.shape[-1] :].clone())
            self.start += piece.shape[-1]
            pieces.append(piece)
        return torch.cat(pieces, dim=-1)
