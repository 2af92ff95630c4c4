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

import copy
import itertools
import math
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Batches
from .errors import ModelLoadingError, OptionError
from .memory import kept_memory
from .utils import center_trim

MAX_SHIFT = 0.5  # seconds: the largest random offset of a shift

Callback = Callable[[dict[str, Any]], None]


class Source(Protocol):
    """Samples that the engine reads window by window, from the start to the end."""

    length: int

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `[B, C, stop - start]`, with zeros before 0 and from `length` on."""


class TensorChunk:
    """A part of a tensor `[..., T]` that knows what surrounds it."""

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
        return torch.Size([*self.tensor.shape[:-1], self.length])

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `[..., stop - start]` counted from the chunk's start; zeros past the tensor."""
        start, stop = start + self.offset, stop + self.offset
        total = self.tensor.shape[-1]
        inside = self.tensor[..., min(max(start, 0), total) : min(max(stop, 0), total)]
        return nn.functional.pad(
            inside, (min(max(-start, 0), stop - start), max(stop - max(total, start), 0))
        )

    def padded(self, target_length: int) -> Tensor:
        """The chunk centred in `target_length` samples, with what surrounds it at both ends."""
        start = -((target_length - self.length) // 2)
        if target_length < self.length:
            raise OptionError(f"cannot pad {self.length} samples to {target_length}")
        return self.read(start, start + target_length)


def tensor_chunk(tensor_or_chunk: Tensor | TensorChunk) -> TensorChunk:
    """The chunk itself, or the whole tensor as one."""
    if isinstance(tensor_or_chunk, TensorChunk):
        return tensor_or_chunk
    return TensorChunk(tensor_or_chunk)


class BagOfModels(nn.Module):
    """Models whose results are averaged.

    `weights` has a row per model with a number per source (default: all 1). `segment` (seconds)
    replaces the segment of the models, but never exceeds what one of them can take; the models
    themselves are not changed. Raises `ModelLoadingError` if the models do not fit together.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[Sequence[float]] | None = None,
        segment: float | None = None,
    ) -> None:
        super().__init__()
        if not models:
            raise ModelLoadingError("a bag needs at least one model")
        first: Any = models[0]
        for name in ("sources", "samplerate", "audio_channels"):
            values = [getattr(model, name) for model in models]
            if any(value != values[0] for value in values):
                raise ModelLoadingError(f"the models of a bag differ in {name}: {values}")
        self.sources: list[str] = list(first.sources)
        self.samplerate: int = first.samplerate
        self.audio_channels: int = first.audio_channels
        if segment is not None and not (isinstance(segment, Real) and 0 < segment < math.inf):
            raise ModelLoadingError(f"the segment of a bag must be seconds, not {segment!r}")
        self.models = nn.ModuleList(_with_segment(model, segment) for model in models)
        self.weights = self._checked(weights)

    def _checked(self, weights: Sequence[Sequence[float]] | None) -> list[list[float]]:
        models, sources = len(self.models), len(self.sources)
        if weights is None:
            return [[1.0] * sources for _ in range(models)]
        try:
            rows = [[float(weight) for weight in row] for row in weights]
        except (TypeError, ValueError):
            rows = []
        finite = all(math.isfinite(weight) for row in rows for weight in row)
        if len(rows) != models or any(len(row) != sources for row in rows) or not finite:
            raise ModelLoadingError(
                f"the weights of a bag must be {models} rows (models) of {sources} numbers"
                f" (sources), not {weights}"
            )
        if any(sum(column) == 0 for column in zip(*rows)):
            raise ModelLoadingError(
                f"the weights of a bag leave a source without a model: {weights}"
            )
        return rows

    @property
    def segment(self) -> float:
        """The shortest segment of the models, in seconds."""
        return min(_segment(model) for model in self.models)

    @property
    def max_segment(self) -> float:
        """The longest segment in seconds that every model takes (infinite if none has a limit)."""
        return min(_max_segment(model) for model in self.models)

    @property
    def max_allowed_segment(self) -> float:
        """The reference's name of `max_segment`."""
        return self.max_segment

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a bag is run by apply_model")


def as_bag(model: nn.Module) -> BagOfModels:
    """The bag itself, or a bag of the one model."""
    return model if isinstance(model, BagOfModels) else BagOfModels([model])


def _segment(model: Any) -> float:
    return float(model.segment)


def _max_segment(model: Any) -> float:
    return float(getattr(model, "max_segment", float("inf")))


def check_segment(model: nn.Module, segment: float | None) -> None:
    """Raise `OptionError` if `segment` (seconds) is longer than what `model` can take at once."""
    longest = _max_segment(model)
    if segment is not None and segment > longest:
        raise OptionError(
            f"segment={segment:g} is longer than the {longest:g} s that the model can take at once:"
            " give that or less"
        )


def _with_segment(model: nn.Module, segment: float | None) -> nn.Module:
    """`model`, or a copy that shares its weights but has another `segment`."""
    if segment is None or segment > _max_segment(model):
        return model
    model = copy.copy(model)
    model.segment = segment  # type: ignore[assignment]
    return model


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
    member: Any
    for index, member in enumerate(bag.models):
        for shift in range(max(1, options.shifts)):
            offset = draw.randint(0, max_shift) if options.shifts else None
            start = 0 if offset is None else offset - max_shift
            windows = [Window(start, length)]
            if options.split:
                windows = plan_windows(start, length, *_segment_and_stride(member, options))
            passes.append(Pass(index, shift, windows, offset))
            if hasattr(member, "consume_random"):
                for _ in windows:
                    member.consume_random(draw)
    return passes


def _segment_and_stride(model: Any, options: ApplyOptions) -> tuple[int, int]:
    seconds = _segment(model) if options.segment is None else options.segment
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
    """What window `index` contributes at each of its samples, `[n]`: shares of a pass sum to 1.

    `weight` is `fade` for a whole window; shorter windows use its first part.
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

    def add(self, start: int, x: Tensor) -> None:
        """Add `x` `[..., n]` at sample `start` of the track."""
        if self.sum is None:
            self.sum = x.new_zeros(*x.shape[:-1], self.capacity)
        at = start - self.start
        self.sum[..., at : at + x.shape[-1]] += x

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


def _capacity(steps: Sequence[Step], length: int) -> int:
    """How many samples an `OverlapAdd` of `steps` has to hold."""
    finished = largest = 0
    for step in steps:
        largest = max(largest, min(step.window.stop, length) - finished)
        finished = max(finished, min(step.complete, length))
    return largest


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
    options: ApplyOptions = ApplyOptions(),
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
