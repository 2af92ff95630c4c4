"""Run several windows at once where that is faster: on a GPU.

The first batch runs one window at a time to measure its peak memory, which gives the size of the
batches that fill the free memory. A batch that runs out of memory is halved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .model import Member

MOST = 32  # windows at once, which keep any GPU busy
SHARE = 0.8  # of the free memory that a batch may take


class BatchRunner:
    """Runs batches of windows on `device`. Their `size` adapts unless it is given.

    On a CPU a batch is slower than its windows one by one, so the size is 1 there by default.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self.device = device
        self.size = size or 1
        self._measures = size is None and device.type == "cuda"

    @property
    def most(self) -> int:
        """The largest number of windows that a batch can have."""
        return MOST if self._measures else self.size

    @torch.no_grad()
    def run(self, model: Member, windows: Sequence[Tensor], stems: Sequence[int]) -> list[Tensor]:
        """Return `stems` of each window `[B, C, T]`, as `[B, S, C, T]` on the device."""
        if self._measures:
            self._measures = False
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            results = [self._run(model, [window], stems)[0] for window in windows]
            taken = torch.cuda.max_memory_allocated(self.device) - before
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0]
            self.size = int(min(MOST, max(1, SHARE * free // max(1, taken))))
            return results
        try:
            return self._run(model, windows, stems)
        except torch.cuda.OutOfMemoryError:
            if len(windows) == 1:
                raise
        # Outside of the handler, which keeps the memory of the failed attempt.
        self.size = middle = (len(windows) + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = (windows[:middle], windows[middle:])
        return [result for half in halves for result in self.run(model, half, stems)]

    def _run(self, model: Member, windows: Sequence[Tensor], stems: Sequence[int]) -> list[Tensor]:
        batch = windows[0] if len(windows) == 1 else torch.cat(list(windows))
        if self.device.type == "cuda" and batch.device.type == "cpu":
            batch = batch.pin_memory()  # copied while the GPU still works on the batch before
        batch = batch.to(self.device, non_blocking=self.device.type == "cuda")
        return list(model(batch, stems).split(len(windows[0])))
