"""Models as the engine, the backends and the export run them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import DConv
from ..demucs import Demucs
from ..errors import ModelLoadingError
from ..hdemucs import HybridUNet
from ..utils import pick_sources, shortened

MOST = 32  # windows in a batch, which keep any GPU busy
SHARE = 0.8  # of the free memory that a batch may take
# A network between the transforms of a model: real tensors in and out, of fixed shapes.
Network = Callable[..., tuple[Tensor, ...]]
Model = Demucs | HybridUNet  # the base classes of the networks here
# Errors of a network whose configuration is wrong, beside arithmetic and PyTorch's.
ALSO_RAISED = (AssertionError, TypeError, ValueError)


class Member:
    """A module as the engine runs it: a model of ours, or any other that separates windows.

    A module has `sources`, `samplerate` (hertz) and `segment` (seconds), and is callable on
    `[B, C, T]`. These are optional, and asked for here and nowhere else:

    - `audio_channels` (without it, any number),
    - `max_segment`, the longest window in seconds,
    - `valid_length(length)`, the samples at which a window of `length` is best run,
    - `consume_random(draw)`, which makes the reference's draws for each window,
    - a parameter `stems` of `forward`, the indices of the sources that are wanted.

    `runs` is the module itself, or a copy of it with fast layers.
    """

    def __init__(self, module: nn.Module) -> None:
        ask: Any = module
        self.module = self.runs = module
        self.sources: list[str] = list(ask.sources)
        self.samplerate = int(ask.samplerate)
        self.segment = float(ask.segment)
        self.audio_channels: int | None = getattr(ask, "audio_channels", None)
        self.max_segment = float(getattr(ask, "max_segment", inf))
        self.valid_length = getattr(ask, "valid_length", lambda length: length)
        self.consume_random = getattr(ask, "consume_random", lambda draw: None)
        try:
            # As it is called, even if the function wraps another one.
            signature = inspect.signature(module.forward, follow_wrapped=False)
            plain = type(module).__call__ is nn.Module.__call__
            self._takes_stems = plain and "stems" in signature.parameters
        except ValueError:  # a function that is not Python's, such as one of TorchScript
            self._takes_stems = False

    @property
    def device(self) -> torch.device | None:
        """The device of its weights; None without weights."""
        first = next(self.module.parameters(), None)
        return None if first is None else first.device

    def __call__(self, windows: Tensor, stems: Sequence[int]) -> Tensor:
        """Return the sources `stems` of `windows` `[B, C, T]`, as `[B, S, C, T]`."""
        unproven = getattr(self.module, "unproven", None)
        # Some networks run for long windows and fail for the short one at the end of a track.
        proven = vars(self.module).setdefault("proven_shapes", set()) if unproven else set()
        unproven = None if windows.shape in proven else unproven
        try:
            if self._takes_stems:
                output: Tensor = self.runs(windows, stems=stems)
            else:
                output = pick_sources(self.runs(windows), stems)
            if unproven and output.shape[-1] != windows.shape[-1]:
                raise ValueError(f"{list(windows.shape)} becomes {list(output.shape)}")
        except (ArithmeticError, LookupError, RuntimeError, *ALSO_RAISED) as exc:
            # Memory and devices are not the checkpoint's fault.
            if not unproven or re.search("memory|CUDA|MPS", str(exc)):
                raise
            raise ModelLoadingError(
                f"{unproven}: describes a model that cannot run ({shortened(exc)})"
            ) from exc
        proven.add(windows.shape)
        return output


class BatchRunner:
    """Runs batches of windows on `device`. Their `size` adapts unless it is given.

    On a GPU, the first batch runs one window at a time to measure its peak memory, which gives the
    size of the batches that fill the free memory. A batch that runs out of memory is halved. On a
    CPU a batch is slower than its windows one by one, so the size is 1 there by default.
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


def cast(model: Model, dtype: torch.dtype, exact: tuple[type[nn.Module], ...] = ()) -> Model:
    """Return a copy of `model` with its network in `dtype`.

    The outermost decoders' residual branches and outputs stay in float32: they take little time
    there, and no later layer averages their rounding (47 instead of 45 dB of noise). So do layers
    of the types `exact`, whose outputs are cast.
    """
    half: Any = copy.deepcopy(model)
    half.to(dtype)
    outermost = [getattr(half, name)[-1] for name in ("decoder", "tdecoder") if hasattr(half, name)]
    kinds = (DConv, nn.ConvTranspose1d, nn.ConvTranspose2d)
    layers = [part for last in outermost for part in last.modules() if isinstance(part, kinds)]
    within = {part for layer in layers for part in layer.modules()}
    inner = [part for part in half.modules() if isinstance(part, exact) and part not in within]
    for layer in inner:
        layer.register_forward_hook(partial(_narrowed, dtype))
    for layer in (*inner, *layers):
        layer.float().register_forward_pre_hook(changes_type)
    return half


def changes_type(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Convert the input of a layer to float32: a hook that the fast layers know."""
    return (inputs[0].float(),)


def _narrowed(dtype: torch.dtype, _: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.to(dtype)
