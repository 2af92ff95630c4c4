"""Apply a model to a mixture: the interface of the engine for programs.

`separate_blocks` yields stems block by block, `apply_model` takes and returns whole tensors. The
work is done in `engine`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any

import torch
import tqdm
from torch import Tensor, nn

from .demucs import Demucs
from .engine.bag import BagOfModels, as_bag, check_segment
from .engine.options import Callback, SeparationOptions
from .engine.overlap_add import OverlapAdd, fade, window_share
from .engine.plan import MAX_SHIFT, Pass, Step, Window, plan_passes, plan_steps, plan_windows
from .engine.run import Source, separate
from .errors import OptionError
from .hdemucs import HDemucs
from .htdemucs import HTDemucs
from .log import is_terminal
from .read.pcm import strange_samples
from .utils import DummyPoolExecutor, center_trim

__all__ = [
    "MAX_SHIFT",
    "BagOfModels",
    "Callback",
    "Demucs",
    "DummyPoolExecutor",
    "HDemucs",
    "HTDemucs",
    "Model",
    "OverlapAdd",
    "Pass",
    "SeparationOptions",
    "Source",
    "Step",
    "TensorChunk",
    "Window",
    "apply_model",
    "as_bag",
    "center_trim",
    "check_segment",
    "fade",
    "plan_passes",
    "plan_steps",
    "plan_windows",
    "separate_blocks",
    "tensor_chunk",
    "window_share",
]

Model = Demucs | HDemucs | HTDemucs
DEFAULTS = SeparationOptions()
# Seconds of audio, and how many of them a second takes. Elsewhere, programs read the usual bar.
TERMINAL_BAR = "{l_bar}{bar}| {n:.1f}/{total:.1f} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class TensorChunk:
    """A range of a tensor `[..., T]` that knows its surroundings."""

    def __init__(
        self, tensor: Tensor | TensorChunk, offset: int = 0, length: int | None = None
    ) -> None:
        total = tensor.shape[-1]
        if not 0 <= offset <= total:
            raise OptionError(f"offset={offset} is not within the {total} samples of the tensor")
        self.length = total - offset if length is None else min(total - offset, length)
        self.offset = offset
        self.tensor: Tensor
        if isinstance(tensor, TensorChunk):
            self.tensor = tensor.tensor
            self.offset += tensor.offset
        else:
            self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the chunk, `[..., length]`."""
        return torch.Size([*self.tensor.shape[:-1], self.length])

    @property
    def device(self) -> torch.device:
        """The device of the tensor."""
        return self.tensor.device

    def read(self, start: int, stop: int) -> Tensor:
        """Return samples `[..., stop - start]`, counted from the chunk's start.

        They are zero outside of the tensor.
        """
        start, stop = start + self.offset, stop + self.offset
        total = self.tensor.shape[-1]
        inside = self.tensor[..., min(max(start, 0), total) : min(max(stop, 0), total)]
        return nn.functional.pad(
            inside, (min(max(-start, 0), stop - start), max(stop - max(total, start), 0))
        )

    def padded(self, target_length: int) -> Tensor:
        """Return the chunk centred in `target_length` samples, with its surroundings."""
        start = -((target_length - self.length) // 2)
        if target_length < self.length:
            raise OptionError(f"cannot pad {self.length} samples to {target_length}")
        return self.read(start, start + target_length)


def tensor_chunk(tensor_or_chunk: Tensor | TensorChunk) -> TensorChunk:
    """Return the chunk itself, or the whole tensor as one."""
    if isinstance(tensor_or_chunk, TensorChunk):
        return tensor_or_chunk
    return TensorChunk(tensor_or_chunk)


def _bar(windows: Iterable[Any], **options: Any) -> Iterable[Any]:
    """Make a progress bar by the `tqdm` of this module, which programs replace by their own."""
    if sys.stderr is None:  # a program without a console, whose own bar may show elsewhere
        options["file"] = io.StringIO()
    elif is_terminal(sys.stderr):
        del options["ncols"]
        options |= {"dynamic_ncols": True, "bar_format": TERMINAL_BAR}
    return tqdm.tqdm(windows, **options)


def separate_blocks(
    model: nn.Module, source: Source, *, options: SeparationOptions = DEFAULTS, **how: Any
) -> Iterator[Tensor]:
    """Separate `source` and yield its stems block by block, `[B, S, C, n]` on the device, in order.

    `how` are the keyword arguments of `engine.run.separate`. Raises `OptionError` for options that
    the model does not have, `DemucsInferError` for stems that are not finite.
    """
    return separate(model, source, options, _bar, **how)


def apply_model(
    model: nn.Module,
    mix: Tensor | TensorChunk,
    shifts: int = DEFAULTS.shifts,
    split: bool = DEFAULTS.split,
    overlap: float = DEFAULTS.overlap,
    transition_power: float = 1.0,
    progress: bool = DEFAULTS.progress,
    device: str | torch.device | None = None,
    num_workers: int = DEFAULTS.jobs,
    segment: float | None = None,
    pool: Executor | None = None,
    lock: AbstractContextManager[Any] | None = None,
    callback: Callback | None = None,
    callback_arg: Mapping[str, Any] | None = None,
    *,
    stems: Sequence[str] | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Separate `mix` `[B, C, T]`, at the model's sample rate, into stems `[B, S, C, T]`.

    Args:
        model: a model or a `BagOfModels`, which is set to evaluation. A model is moved to `device`;
            the models of a bag one after the other, and then back.
        mix: the mixture; the stems are returned on its device.
        shifts: average this many passes, each offset by a random part of 0.5 s drawn from
            `random` (0: one pass without an offset). Slower by that factor, and slightly better.
        split: work window by window; otherwise the whole track is one window.
        overlap: part of a window that the next one covers, from 0 to less than 1.
        transition_power: exponent of the windows' weights, at least 1; higher is more abrupt.
        progress: show a progress bar on standard error for each pass, through `tqdm.tqdm`.
        device: the device that runs the model (default: that of `mix`).
        num_workers: threads that run windows at once, on a CPU.
        segment: length of a window in seconds, instead of the model's.
        pool: an executor of the caller's to run the windows.
        lock: a context manager that is held while `callback` runs.
        callback: called before and after each window, in the caller's thread, with a dictionary:
            `model_idx_in_bag`, `shift_idx`, `segment_offset` (samples), `state` ("start" or
            "end"), `audio_length` (samples) and `models` (their number). An exception that it
            raises stops the separation and is raised here.
        callback_arg: entries to add to that dictionary.
        stems: the sources that are wanted, in this order (default: all). Models of a bag that do
            not contribute to them are not run.
        seed: draw the offsets of the shifts from this instead of from `random`.
        batch_size: windows in one batch (default: as many as fit into a GPU's memory, else 1).

    Raises `OptionError` (a `ValueError`) for options out of range and for a mixture of another
    shape, or with values that are not finite; `DemucsInferError` for stems that are not finite.
    """
    chunk = tensor_chunk(mix)
    wanted = as_bag(model).audio_channels
    if len(chunk.shape) != 3 or wanted not in (None, chunk.shape[1]):
        raise OptionError(
            f"the mixture must be [batch, {wanted or 'any number of'} channels, samples],"
            f" not {list(chunk.shape)}: see demucs_infer.audio.convert_audio"
        )
    if not chunk.tensor.is_floating_point():
        raise OptionError(f"the mixture must be floating point, not {chunk.tensor.dtype}")
    reason = strange_samples(chunk.tensor)
    if reason:
        raise OptionError(f"the mixture has values that are {reason}")
    options = SeparationOptions(
        device=device or chunk.device,
        shifts=shifts,
        overlap=overlap,
        split=split,
        segment=segment,
        jobs=num_workers,
        progress=progress,
        callback=callback,
        callback_arg=callback_arg,
        stems=stems,
        seed=seed,
        batch_size=batch_size,
    )
    blocks = separate(
        model,
        chunk,
        options,
        _bar,
        in_lockstep=False,
        transition_power=transition_power,
        pool=pool,
        lock=lock,
    )
    batch, channels, length = chunk.shape
    sources: Any = model.sources if stems is None else stems
    out = chunk.tensor.new_empty(batch, len(sources), channels, length)
    done = 0
    for block in blocks:
        out[..., done : done + block.shape[-1]] = block
        done += block.shape[-1]
    return out
