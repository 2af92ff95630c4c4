"""The engine: a track is cut into windows, a model runs on each, and the results are overlap-added.

    source ──read──▶ windows ──model──▶ weighted windows ──overlap-add──▶ finished blocks

The windows of all models of a bag, and of all shifts, are planned first, as plain integers. A block
is handed on as soon as no later window touches it.

Shapes: `[B, C, T]` mixtures and `[B, S, C, T]` stems (batch, sources, channels, samples).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import isinf
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DemucsInferError, OptionError
from ..utils import DummyPoolExecutor, center_trim
from .bag import BagOfModels, as_bag, check_segment
from .batches import BatchRunner
from .cpu import fast_copy
from .machine import kept_memory
from .model import Member
from .overlap_add import OverlapAdd, fade, window_share
from .plan import ApplyOptions, Pass, Step, Window, plan_passes, plan_steps, segment_and_stride
from .source import Source

Callback = Callable[[dict[str, Any]], Any]
# Wraps the windows of a pass to show how many are done, as `tqdm.tqdm` does.
Bar = Callable[..., Iterable[Any]]
BAR_WIDTH = 120  # columns


@dataclass(frozen=True)
class RunOptions:
    """How a planned separation is run, and who is told; see `apply_model`.

    With `in_lockstep`, the passes of a bag and of shifts advance together, and what is kept is a
    window or two of each; otherwise they run one after the other, as in the reference, and blocks
    come during the last one. `passes` are those of `plan_passes`, if the caller wants to know them.
    With `stay`, models remain on `device`; otherwise each member of a bag is moved there when its
    turn comes, and then back.
    """

    in_lockstep: bool = True
    progress: bool = False
    device: str | torch.device = "cpu"
    stems: Sequence[str] | None = None
    num_workers: int = 0
    pool: Executor | None = None
    lock: AbstractContextManager[Any] | None = None
    callback: Callback | None = None
    callback_arg: Mapping[str, Any] | None = None
    passes: Sequence[Pass] | None = None
    batch_size: int | None = None
    stay: bool = False
    title: str | None = None  # of one bar for the track, instead of one for each pass


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


@dataclass
class _Placement:
    """Moves members of a bag to `device` when they are first needed, and back after their end.

    Four models at once would fill a small GPU.
    """

    members: Sequence[Member]
    device: torch.device
    stay: bool
    homes: dict[int, torch.device | None] = field(default_factory=dict)
    ready: dict[int, Member] = field(default_factory=dict)

    def bring(self, index: int) -> Member:
        """The member `index`, on the device."""
        member = self.members[index]
        if index not in self.homes:
            self.homes[index] = member.device
            member.module.to(self.device).eval()
            on_cpu = self.device.type == "cpu"
            runs = fast_copy(member.module) if on_cpu else member.module
            self.ready[index] = replace(member, runs=runs)
        return self.ready[index]

    def release(self, index: int) -> None:
        """Move the member `index` back."""
        home = self.homes.pop(index, None)
        self.ready.pop(index, None)
        if home is not None and not self.stay:
            self.members[index].module.to(home)

    def release_all(self) -> None:
        """Move back what is still on the device."""
        for index in list(self.homes):
            self.release(index)


def _read_window(model: Member, source: Source, window: Window, options: ApplyOptions) -> Tensor:
    """The window, centred in the length that the model wants, with what surrounds it."""
    length = window.stop - window.start
    if options.segment is not None and not isinf(model.max_segment):
        wanted = int(options.segment * model.samplerate)
    else:
        wanted = model.valid_length(length)
    if wanted < length:
        raise OptionError(
            f"{length} samples do not fit into one window of {wanted}: leave split on"
        )
    start = window.start - (wanted - length) // 2
    return source.read(start, start + wanted)


@dataclass(frozen=True)
class SeparationPlan:
    """A planned separation: everything that the execution needs."""

    placement: _Placement
    source: Source
    options: ApplyOptions
    steps: list[Step]
    batches: BatchRunner
    stems: list[int]
    gains: Tensor  # [M, S] for the wanted stems

    def run(
        self, executor: Executor, ahead: int, report: _Reporter
    ) -> Iterator[tuple[Step, Tensor]]:
        """Each step with the model's output for it, in order; `ahead` more batches are under way.

        The outputs are where the models are.
        """
        pending: deque[tuple[list[Step], Future[list[Tensor]]]] = deque()
        last = {step.task.model: step for step in self.steps}
        try:
            for group in self._groups():
                for step in group:
                    report(step, "start")
                pending.append((group, self._submit(executor, group)))
                if len(pending) > ahead:
                    yield from self._finish(pending, report, last)
            while pending:
                yield from self._finish(pending, report, last)
        finally:
            for _, future in pending:
                future.cancel()
            self.placement.release_all()

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
        model = self.placement.bring(group[0].task.model)
        windows = [_read_window(model, self.source, step.window, self.options) for step in group]
        return executor.submit(self.batches.run, model, windows, self.stems)

    def _finish(
        self,
        pending: deque[tuple[list[Step], Future[list[Tensor]]]],
        report: _Reporter,
        last: Mapping[int, Step],
    ) -> Iterator[tuple[Step, Tensor]]:
        group, future = pending.popleft()
        results = future.result()
        for step in group:
            report(step, "end")
            if last[step.task.model] is step:
                self.placement.release(step.task.model)
            yield step, center_trim(results.pop(0), step.window.stop - step.window.start)

    def blocks(
        self, outputs: Iterator[tuple[Step, Tensor]], bar: Bar | None, one_bar: bool
    ) -> Iterator[Tensor]:
        """Overlap-add the outputs of `run`, and yield finished blocks, where the outputs are.

        `bar` is called for each pass. In lockstep no pass ends before the others: the finished
        windows fill one bar after the other. With `one_bar`, it is called once, for the track.
        """
        length = self.source.length
        total = OverlapAdd()
        tasks = list({id(step.task): step.task for step in self.steps}.values())
        for task in tasks[:1] if one_bar else tasks:
            counted: Sequence[Any] = self.steps if one_bar else task.windows
            shown = None
            if bar is not None:
                model = self.placement.members[task.model]
                seconds = round(segment_and_stride(model, self.options)[1] / model.samplerate, 2)
                if one_bar:
                    seconds = length / model.samplerate / len(counted)
                shown = bar(counted, unit="seconds", unit_scale=seconds, ncols=BAR_WIDTH)
            with closing(_each(counted, shown)) as windows:
                for _ in windows:
                    step, output = next(outputs)
                    self._add(total, step, output)
                    del output  # the next window needs the room
                    if step.complete > total.start:
                        yield _finite(total.take(min(step.complete, length)))

    def _add(self, total: OverlapAdd, step: Step, output: Tensor) -> None:
        start, stop = step.window
        late = max(0, -start)  # a shifted pass starts before the track
        if stop > start + late:
            share = self._share(step).to(output.device)
            total.add(start + late, output[..., late:], share[..., late:])

    def _share(self, step: Step) -> Tensor:
        """What each sample of the step's stems counts in their sum, `[S, 1, n]`."""
        longest = max(w.stop - w.start for w in step.task.windows)
        if self.options.split:
            longest = segment_and_stride(self.placement.members[step.task.model], self.options)[0]
        weight = fade(longest, self.options.transition_power)
        share = window_share(step.task.windows, step.number, weight)
        return self.gains[step.task.model][:, None, None] * share


def _each(planned: Sequence[Any], shown: Iterable[Any] | None) -> Generator[None, None, None]:
    """Go through the `planned` windows by the bar that is `shown`, which is closed at the end.

    Raises `DemucsInferError` if the bar leaves out windows or has too many.
    """
    windows, count = iter(planned if shown is None else shown), 0
    try:
        for _ in windows:
            count += 1
            if count <= len(planned):
                yield
    finally:
        if isinstance(windows, Generator):  # tqdm's own, which may be drawn half
            windows.close()
    if count != len(planned):
        raise DemucsInferError(
            f"the progress bar went through {count} windows of {len(planned)}:"
            " what stands for tqdm must yield each once"
        )


def _finite(block: Tensor) -> Tensor:
    """`block` itself. Raises `DemucsInferError` if it is no sound."""
    if not block.isfinite().all():
        raise DemucsInferError("the model gives values that are not finite (NaN or Inf)")
    return block


def stem_indices(sources: Sequence[str], stems: Sequence[str] | None) -> list[int]:
    """Indices of the wanted stems among the sources; all of them for `None`.

    Raises `OptionError` for an unknown stem, and for none.
    """
    wanted = list(sources) if stems is None else list(stems)
    unknown = [stem for stem in wanted if stem not in sources]
    if unknown or not wanted:
        raise OptionError(
            f"there is no stem {', '.join(map(repr, unknown))}: the model has {', '.join(sources)}"
        )
    return [list(sources).index(stem) for stem in wanted]


def _gains(bag: BagOfModels, stems: Sequence[int], shifts: int) -> Tensor:
    """What a pass of each model counts for each of `stems`, `[M, S]`."""
    weights = torch.tensor(bag.weights, dtype=torch.float64, device="cpu")[:, list(stems)]
    return (weights / weights.sum(0) / max(1, shifts)).float()


def separate(
    model: nn.Module, source: Source, options: ApplyOptions, how: RunOptions, bar: Bar
) -> Iterator[Tensor]:
    """Separate `source` and yield its stems block by block, `[B, S, C, n]` on a device, in order.

    `bar` is called for each pass if `how` wants progress. Raises `OptionError` for a segment that
    is too long and for unknown stems, `DemucsInferError` for stems that are not finite.
    """
    bag = as_bag(model)
    check_segment(bag, options.segment)
    indices = stem_indices(bag.sources, how.stems)
    gains = _gains(bag, indices, options.shifts)
    if source.length == 0:
        return
    device = torch.device(how.device)
    # Every model draws its offsets, but only those run that count for a wanted stem.
    planned = plan_passes(bag, source.length, options) if how.passes is None else how.passes
    wanted = [task for task in planned if gains[task.model].any()]
    batches = BatchRunner(device, how.batch_size)
    # A model by itself stays where it was brought, as in the reference.
    placement = _Placement(bag.members, device, how.stay or len(bag.models) == 1)
    steps = plan_steps(wanted, how.in_lockstep, batches.most)
    plan = SeparationPlan(placement, source, options, steps, batches, indices, gains)
    extra = {**(how.callback_arg or {}), "audio_length": source.length, "models": len(bag.models)}
    report = _Reporter(how.callback, extra, how.lock or nullcontext())
    # Each has all cores: sums over fewer threads would have other bits.
    workers = how.num_workers or (os.cpu_count() or 1 if how.pool else 0)
    ahead = workers if device.type == "cpu" else 0
    titled = bar if how.title is None else partial(bar, desc=how.title)
    own = ThreadPoolExecutor(ahead) if ahead and how.pool is None else DummyPoolExecutor()
    with own, kept_memory():
        outputs = plan.run(how.pool or own, ahead, report)
        shown = titled if how.progress and options.split else None
        yield from plan.blocks(outputs, shown, how.title is not None)
