"""Several windows at once, where that is faster: on a GPU.

The first window runs alone, and shows how much memory one takes; the next ones are as many at once
as fit into what is free. When they do not fit after all, half as many are tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from .model import Member

MOST = 32  # windows at once: by then a GPU is busy
SHARE = 0.8  # of the free memory that may be taken


class BatchRunner:
    """How many windows go into one batch on `device`: `size`, which adapts unless it is given.

    On a CPU a batch is slower than its windows one by one, so that the size is 1 there by default.
    Raises `OptionError` for a size below 1.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise OptionError(f"batch_size={size} must be 1 or more")
        self.device = device
        self.size = size or 1
        self._measures = size is None and device.type == "cuda"

    @property
    def most(self) -> int:
        """How many windows a batch may ever have."""
        return MOST if self._measures else self.size

    @torch.no_grad()
    def run(self, model: Member, windows: Sequence[Tensor], stems: Sequence[int]) -> list[Tensor]:
        """`stems` of each window `[B, C, T]`, as `[B, S, C, T]` on the device."""
        if self._measures:
            return self._measured(model, windows, stems)
        try:
            return _run(model, windows, stems, self.device)
        except torch.cuda.OutOfMemoryError:
            if len(windows) == 1:
                raise
        # Outside of the handler, so that what the failed attempt holds is free again.
        self.size = middle = (len(windows) + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [
            result
            for part in (windows[:middle], windows[middle:])
            for result in self.run(model, part, stems)
        ]

    def _measured(
        self, model: Member, windows: Sequence[Tensor], stems: Sequence[int]
    ) -> list[Tensor]:
        """As `run`, one by one, and see how many would have fitted."""
        self._measures = False
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        results = [_run(model, [window], stems, self.device)[0] for window in windows]
        taken = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        self.size = int(min(MOST, max(1, SHARE * free // max(1, taken))))
        return results


def _run(
    model: Member, windows: Sequence[Tensor], stems: Sequence[int], device: torch.device
) -> list[Tensor]:
    batch = windows[0] if len(windows) == 1 else torch.cat(list(windows))
    if device.type == "cuda" and batch.device.type == "cpu":
        batch = batch.pin_memory()  # copied while the GPU still works on the batch before
    batch = batch.to(device, non_blocking=device.type == "cuda")
    return list(model(batch, stems).split(len(windows[0])))
