"""The engine: a track is cut into windows, a model runs on each, and the results are overlap-added.

    source ──read──▶ windows ──model──▶ weighted windows ──overlap-add──▶ finished blocks

The windows of all models of a bag, and of all shifts, are planned first, as plain integers. A block
is handed on as soon as no later window touches it. `separate_blocks` is that pipe; `apply_model`
puts a tensor at both of its ends.

Shapes: `[B, C, T]` mixtures and `[B, S, C, T]` stems (batch, sources, channels, samples).

The engine knows a model by `sources`, `samplerate`, `audio_channels` and `segment` (seconds), and
by what some models have besides: `valid_length` (samples at which a window is best run),
`max_segment` (seconds; no window may be longer), `consume_random` (see `HTDemucs`) and
`takes_stems` (whether it is callable with the indices of the wanted sources, too).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import OptionError
from ..utils import center_trim
from .bag import BagOfModels, as_bag, check_segment
from .batches import Batches
from .memory import kept_memory
from .overlap_add import OverlapAdd, _capacity, fade, window_share
from .plan import ApplyOptions, Pass, Step, Window, _segment_and_stride, plan_passes, plan_steps
from .source import Source, TensorChunk, tensor_chunk

Callback = Callable[[dict[str, Any]], None]
DEFAULTS = ApplyOptions()


class _DirectExecutor(Executor):
    """Runs what is submitted at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(frozen=True)
class _Reporter:
    """Tells the caller's callback where the work is."""

    callback: Callback | None
    extra: Mapping[str, Any]
    lock: AbstractContextManager[Any]

    def __call__(self, step: Step, state: str) -> None:
        if self.callback is None:
            return
        with self.lock:
            self.callback(
                {
                    **self.extra,
                    "model_idx_in_bag": step.task.model,
                    "shift_idx": step.task.shift,
                    "segment_offset": step.window.start - step.task.start,
                    "state": state,
                }
            )


def _read_window(model: Any, source: Source, window: Window, options: ApplyOptions) -> Tensor:
    """The window, centred in the length that the model wants, with what surrounds it."""
    length = window.stop - window.start
    if options.segment is not None and hasattr(model, "max_segment"):
        wanted = int(options.segment * model.samplerate)
    else:
        wanted = model.valid_length(length) if hasattr(model, "valid_length") else length
    if wanted < length:
        raise OptionError(
            f"{length} samples do not fit into one window of {wanted}: leave split on"
        )
    start = window.start - (wanted - length) // 2
    return source.read(start, start + wanted)


@dataclass(frozen=True)
class _Job:
    """A planned separation: everything that the execution needs."""

    bag: BagOfModels
    source: Source
    options: ApplyOptions
    steps: list[Step]
    batches: Batches
    stems: list[int]
    gains: Tensor  # [M, S] for the wanted stems

    def run(
        self, executor: Executor, ahead: int, report: _Reporter
    ) -> Iterator[tuple[Step, Tensor]]:
        """Each step with the model's output for it, in order; `ahead` more batches are under way.

        The outputs are where the models are.
        """
        pending: deque[tuple[list[Step], Future[list[Tensor]]]] = deque()
        try:
            for group in self._groups():
                for step in group:
                    report(step, "start")
                pending.append((group, self._submit(executor, group)))
                if len(pending) > ahead:
                    yield from self._finish(pending, report)
            while pending:
                yield from self._finish(pending, report)
        finally:
            for _, future in pending:
                future.cancel()

    def _groups(self) -> Iterator[list[Step]]:
        """The steps, those together that make a batch: of one model, and of one length."""
        group: list[Step] = []
        for step in self.steps:
            full = len(group) >= self.batches.size
            if group and (full or self._kind(step) != self._kind(group[0])):
                yield group
                group = []
            group.append(step)
        yield group

    @staticmethod
    def _kind(step: Step) -> tuple[int, int]:
        return step.task.model, step.window.stop - step.window.start

    def _submit(self, executor: Executor, group: list[Step]) -> Future[list[Tensor]]:
        model = self.bag.models[group[0].task.model]
        windows = [_read_window(model, self.source, step.window, self.options) for step in group]
        return executor.submit(self.batches.run, model, windows, self.stems)

    @staticmethod
    def _finish(
        pending: deque[tuple[list[Step], Future[list[Tensor]]]], report: _Reporter
    ) -> Iterator[tuple[Step, Tensor]]:
        group, future = pending.popleft()
        results = future.result()
        for step in group:
            report(step, "end")
            yield step, center_trim(results.pop(0), step.window.stop - step.window.start)

    def blocks(
        self, outputs: Iterable[tuple[Step, Tensor]], progress: Callable[[], Any]
    ) -> Iterator[Tensor]:
        """Overlap-add the outputs of `run`, and yield finished blocks, where the outputs are."""
        length = self.source.length
        total = OverlapAdd(_capacity(self.steps, length))
        for step, output in outputs:
            start, stop = step.window
            share = self.gains[step.task.model][:, None, None] * self._share(step)
            late = max(0, -start)  # a shifted pass starts before the track
            if stop > start + late:
                total.add(start + late, (output * share.to(output.device))[..., late:])
            del output  # the next window needs the room
            progress()
            if step.complete > total.start:
                yield total.take(min(step.complete, length))

    def _share(self, step: Step) -> Tensor:
        longest = max(w.stop - w.start for w in step.task.windows)
        if self.options.split:
            longest = _segment_and_stride(self.bag.models[step.task.model], self.options)[0]
        weight = fade(longest, self.options.transition_power)
        return window_share(step.task.windows, step.number, weight)


def _stem_indices(sources: Sequence[str], stems: Sequence[str] | None) -> list[int]:
    """Where the wanted stems are among the sources; all of them for `None`."""
    wanted = list(sources) if stems is None else list(stems)
    unknown = [stem for stem in wanted if stem not in sources]
    if unknown or not wanted:
        raise OptionError(
            f"there is no stem {', '.join(map(repr, unknown))}: the model has {', '.join(sources)}"
        )
    return [list(sources).index(stem) for stem in wanted]


def _gains(bag: BagOfModels, stems: Sequence[int], shifts: int) -> Tensor:
    """What a pass of each model counts for each of `stems`, `[M, S]`."""
    weights = torch.tensor(bag.weights, dtype=torch.float64)[:, list(stems)]
    return (weights / weights.sum(0) / max(1, shifts)).float()


def separate_blocks(
    model: nn.Module,
    source: Source,
    *,
    options: ApplyOptions = DEFAULTS,
    in_lockstep: bool = True,
    progress: bool = False,
    device: str | torch.device = "cpu",
    stems: Sequence[str] | None = None,
    num_workers: int = 0,
    pool: Executor | None = None,
    lock: AbstractContextManager[Any] | None = None,
    callback: Callback | None = None,
    callback_arg: Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None,
    batch_size: int | None = None,
) -> Iterator[Tensor]:
    """Separate `source` and yield its stems block by block, `[B, S, C, n]` on `device`, in order.

    With `in_lockstep`, the passes of a bag and of shifts advance together, and what is kept is a
    window or two of each; otherwise they run one after the other, as in the reference, and blocks
    come during the last one. `passes` are those of `plan_passes`, if the caller wants to know them.
    The rest is described at `apply_model`.
    """
    bag = as_bag(model)
    check_segment(bag, options.segment)
    indices = _stem_indices(bag.sources, stems)
    gains = _gains(bag, indices, options.shifts)
    if source.length == 0:
        return
    device = torch.device(device)
    bag.to(device).eval()
    # Every model draws its offsets, but only those run that count for a wanted stem.
    planned = plan_passes(bag, source.length, options) if passes is None else passes
    wanted = [task for task in planned if gains[task.model].any()]
    batches = Batches(device, batch_size)
    steps = plan_steps(wanted, in_lockstep, batches.most)
    job = _Job(bag, source, options, steps, batches, indices, gains)
    extra = {**(callback_arg or {}), "audio_length": source.length, "models": len(bag.models)}
    report = _Reporter(callback, extra, lock or nullcontext())
    ahead = num_workers or (os.cpu_count() or 1 if pool else 0) if device.type == "cpu" else 0
    # Each has all cores: sums over fewer threads would have other bits.
    own = ThreadPoolExecutor(ahead) if ahead and pool is None else _DirectExecutor()
    seconds = source.length / bag.samplerate * len(wanted)
    with (
        own,
        kept_memory(),
        tqdm(
            total=len(steps), unit_scale=seconds / len(steps), unit="s", disable=not progress
        ) as bar,
    ):
        yield from job.blocks(job.run(pool or own, ahead, report), bar.update)


def apply_model(
    model: nn.Module,
    mix: Tensor | TensorChunk,
    shifts: int = 1,
    split: bool = True,
    overlap: float = 0.25,
    transition_power: float = 1.0,
    progress: bool = False,
    device: str | torch.device | None = None,
    num_workers: int = 0,
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
        model: a model or a `BagOfModels`; it is moved to `device` and set to evaluation.
        mix: the mixture; the stems are returned on its device.
        shifts: average this many passes, each offset by a random part of 0.5 s drawn from
            `random` (0: one pass without an offset). Slower by that factor, and slightly better.
        split: work window by window; otherwise the whole track is one window.
        overlap: part of a window that the next one covers, from 0 to less than 1.
        transition_power: exponent of the windows' weights, at least 1; higher is more abrupt.
        progress: show a progress bar on standard error.
        device: where the model runs; that of `mix` if not given.
        num_workers: threads that run windows at once, on a CPU.
        segment: length of a window in seconds, instead of the model's.
        pool: an executor of the caller's to run the windows.
        lock: a context manager that is held while `callback` runs.
        callback: called before and after each window, in the caller's thread, with a dictionary:
            `model_idx_in_bag`, `shift_idx`, `segment_offset` (samples), `state` ("start" or
            "end"), `audio_length` (samples) and `models` (their number). What it raises stops the
            separation and is raised here.
        callback_arg: entries to add to that dictionary.
        stems: the sources that are wanted, in this order (default: all). Models of a bag that do
            not count for them are not run; the others give what they give among all.
        seed: draw the offsets of the shifts from this instead of from `random`.
        batch_size: windows in one batch (default: on a GPU what its memory holds, else 1).

    Raises `OptionError` (a `ValueError`) for options out of range and for a mixture of another
    shape, or with values that are not finite.
    """
    options = ApplyOptions(shifts, split, overlap, transition_power, segment, seed)
    chunk = tensor_chunk(mix)
    _check_mixture(model, chunk)
    blocks = separate_blocks(
        model,
        chunk,
        options=options,
        in_lockstep=False,
        progress=progress,
        device=device or chunk.device,
        stems=stems,
        batch_size=batch_size,
        num_workers=num_workers,
        pool=pool,
        lock=lock,
        callback=callback,
        callback_arg=callback_arg,
    )
    batch, channels, length = chunk.shape
    sources: Any = model.sources if stems is None else stems
    out = chunk.tensor.new_empty(batch, len(sources), channels, length)
    done = 0
    for block in blocks:
        out[..., done : done + block.shape[-1]] = block
        done += block.shape[-1]
    return out


def _check_mixture(model: Any, mix: TensorChunk) -> None:
    if len(mix.shape) != 3 or mix.shape[1] != model.audio_channels:
        raise OptionError(
            f"the mixture must be [batch, {model.audio_channels} channels, samples],"
            f" not {list(mix.shape)}: see demucs_infer.audio.convert_audio"
        )
    if not mix.tensor.is_floating_point():
        raise OptionError(f"the mixture must be floating point, not {mix.tensor.dtype}")
    if not mix.tensor.isfinite().all():
        raise OptionError("the mixture has values that are not finite (NaN or Inf)")
