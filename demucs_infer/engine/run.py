"""The engine: cut a track into windows, run a model on each, and overlap-add the results.

    source ──read──▶ windows ──model──▶ weighted windows ──overlap-add──▶ finished blocks

The windows of all models of a bag, and of all shifts, are planned first, as plain integers. A block
is yielded as soon as no later window reaches it.

Shapes: `[B, C, T]` mixtures and `[B, S, C, T]` stems (batch, sources, channels, samples).
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from math import isinf
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import DemucsInferError, OptionError
from ..utils import DummyPoolExecutor, center_trim
from .bag import BagOfModels, as_bag, check_segment
from .cpu import fast_copy
from .machine import kept_memory
from .model import BatchRunner, Member
from .options import SeparationOptions
from .overlap_add import OverlapAdd, fade, window_share
from .plan import Pass, Step, plan_passes, plan_steps

# Wraps the windows of a pass to show how many are done, as `tqdm.tqdm` does.
Bar = Callable[..., Iterable[Any]]
BAR_WIDTH = 120  # columns


class Source(Protocol):
    """Samples that the engine reads window by window, from the start to the end."""

    length: int

    def read(self, start: int, stop: int) -> Tensor:
        """Return samples `[B, C, stop - start]`, with zeros before 0 and from `length` on."""


def separate(
    model: nn.Module,
    source: Source,
    options: SeparationOptions,
    bar: Bar,
    *,
    in_lockstep: bool = True,
    passes: Sequence[Pass] | None = None,
    stay: bool = False,
    title: str | None = None,
    transition_power: float = 1.0,
    pool: Executor | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> Iterator[Tensor]:
    """Separate `source` and yield its stems block by block, `[B, S, C, n]` on the device, in order.

    Args:
        model: a model, or a bag of models.
        source: the samples of the track.
        options: those of `apply_model` and `Separator`; `stems` are names of sources.
        bar: makes a progress bar, if the options want progress.
        in_lockstep: let the passes of a bag and of shifts advance together, so that the sum is a
            window or two of each; else they run one after the other, as in the reference, and
            blocks come during the last one.
        passes: those of `plan_passes`, if the caller has them.
        stay: leave the models on the device; else each member of a bag returns after its last
            window, because four models at once would fill a small GPU.
        title: that of one bar for the track, in place of one for each pass.
        transition_power: see `apply_model`, as for `pool` and `lock`.
        pool: runs the windows of a CPU.
        lock: held while the callback runs.

    Raises `OptionError` for a segment that is too long and for unknown stems, `DemucsInferError`
    for stems that are not finite.
    """
    bag = as_bag(model)
    check_segment(bag, options.segment)
    if not transition_power >= 1:
        raise OptionError(f"transition_power={transition_power} must be at least 1")
    stems = stem_indices(bag.sources, options.stems)
    if source.length == 0:
        return
    if passes is None:
        passes = plan_passes(bag, source.length, options)
    # All models draw their offsets, but only those run that contribute to a wanted stem.
    weights = torch.tensor(bag.weights, dtype=torch.float64, device="cpu")[:, stems]
    gains = (weights / weights.sum(0) / max(1, options.shifts)).float()  # [M, S]
    wanted = [task for task in passes if gains[task.model].any()]
    device = torch.device(options.device or "cpu")
    batches = BatchRunner(device, options.batch_size)
    steps = plan_steps(wanted, in_lockstep, batches.most)
    # Each worker has all cores: sums over fewer threads would have other bits.
    workers = options.jobs or (os.cpu_count() or 1 if pool else 0)
    ahead = workers if device.type == "cpu" else 0
    own = ThreadPoolExecutor(ahead) if ahead and pool is None else DummyPoolExecutor()
    total = OverlapAdd()
    with (
        own as executor,
        kept_memory(),
        closing(
            _run_windows(
                bag, source, options, steps, stems, batches, pool or executor, ahead, stay, lock
            )
        ) as outputs,
        closing(_show_progress(bag, source.length, options, steps, bar, title)) as ticks,
    ):
        for _ in ticks:
            step, output = next(outputs)
            task, (start, stop) = step.task, step.window
            late = max(0, -start)  # a shifted pass starts before the track
            if stop > start + late:
                weight = fade(task.segment, transition_power)
                share = gains[task.model][:, None, None] * window_share(
                    task.windows, step.number, weight
                )
                total.add(start + late, output[..., late:], share.to(output.device)[..., late:])
            del output  # before the next window, which needs the memory
            if step.complete > total.start:
                block = total.take(min(step.complete, source.length))
                if not block.isfinite().all():
                    raise DemucsInferError(
                        "the model gives values that are not finite (NaN or Inf): try another model"
                    )
                yield block
                del block


def _run_windows(
    bag: BagOfModels,
    source: Source,
    options: SeparationOptions,
    steps: Sequence[Step],
    stems: Sequence[int],
    batches: BatchRunner,
    executor: Executor,
    ahead: int,
    stay: bool,
    lock: AbstractContextManager[Any] | None,
) -> Generator[tuple[Step, Tensor], None, None]:
    """Yield each step with the model's output for its window, in order, on the device.

    `ahead` more batches are under way in `executor`.
    """
    members, last = bag.members, {step.task.model: step for step in steps}
    homes: dict[int, torch.device | None] = {}  # of the models that are on the device
    pending: deque[tuple[list[Step], Future[list[Tensor]]]] = deque()
    groups = _batched(steps, batches)

    def release(index: int) -> None:
        home = homes.pop(index)
        # A model outside of a bag stays where it was brought, as in the reference.
        if home is not None and not stay and len(members) > 1:
            members[index].module.to(home)

    def report(step: Step, state: str) -> None:
        if options.callback is not None:
            event = {
                **(options.callback_arg or {}),
                "audio_length": source.length,
                "models": len(members),
                "model_idx_in_bag": step.task.model,
                "shift_idx": step.task.shift,
                "segment_offset": step.window.start - step.task.start,
                "state": state,
            }
            with lock or nullcontext():
                options.callback(event)

    try:
        while True:
            while len(pending) <= ahead and (group := next(groups, None)):
                for step in group:
                    report(step, "start")
                index = group[0].task.model
                member = members[index]
                if index not in homes:
                    homes[index] = member.device
                    module = member.module.to(batches.device).eval()
                    member.runs = fast_copy(module) if batches.device.type == "cpu" else module
                windows = [_read_window(member, source, step, options.segment) for step in group]
                pending.append((group, executor.submit(batches.run, member, windows, stems)))
                del windows
            if not pending:
                return
            group, future = pending.popleft()
            results = future.result()
            for step in group:
                report(step, "end")
                if last[step.task.model] is step:
                    release(step.task.model)
                yield step, center_trim(results.pop(0), step.window.stop - step.window.start)
    finally:
        for _, future in pending:
            future.cancel()
        for index in list(homes):
            release(index)


def _batched(steps: Sequence[Step], batches: BatchRunner) -> Iterator[list[Step]]:
    """Yield consecutive steps that make a batch: windows of one model and of one length."""
    for _, alike in itertools.groupby(
        steps, lambda step: (step.task.model, step.window.stop - step.window.start)
    ):
        while group := list(itertools.islice(alike, batches.size)):  # which may change
            yield group


def _read_window(model: Member, source: Source, step: Step, segment: float | None) -> Tensor:
    """Return a window, centred in the length that the model wants, with its surroundings."""
    length = step.window.stop - step.window.start
    if segment is not None and not isinf(model.max_segment):
        wanted = int(segment * model.samplerate)
    else:
        wanted = model.valid_length(length)
    if wanted < length:
        raise OptionError(
            f"{length} samples do not fit into one window of {wanted}: leave split on"
        )
    start = step.window.start - (wanted - length) // 2
    return source.read(start, start + wanted)


def _show_progress(
    bag: BagOfModels,
    length: int,
    options: SeparationOptions,
    steps: Sequence[Step],
    bar: Bar,
    title: str | None,
) -> Generator[None, None, None]:
    """Yield once for each of `steps`, through one bar for each pass, or with `title` through one.

    In lockstep no pass ends before the others: finished windows fill one bar after the other.
    Raises `DemucsInferError` if a bar leaves out windows or has too many.
    """
    passes = list({id(step.task): step.task for step in steps}.values())
    for task in passes if title is None else passes[:1]:
        planned: Sequence[Any] = task.windows if title is None else steps
        shown: Iterable[Any] = planned
        if options.progress and options.split:
            seconds, named = round(task.stride / bag.samplerate, 2), {}
            if title is not None:
                seconds, named = length / bag.samplerate / len(planned), {"desc": title}
            shown = bar(planned, unit="seconds", unit_scale=seconds, ncols=BAR_WIDTH, **named)
        windows, count = iter(shown), 0
        try:
            for _ in windows:
                count += 1
                if count <= len(planned):
                    yield
        finally:
            if isinstance(windows, Generator):  # tqdm's own, which draws its end then
                windows.close()
        if count != len(planned):
            raise DemucsInferError(
                f"the progress bar went through {count} windows of {len(planned)}:"
                " a replacement of tqdm must yield each once"
            )


def stem_indices(sources: Sequence[str], stems: Sequence[str] | None) -> list[int]:
    """Return the indices of the wanted stems among the sources; None stands for all.

    Raises `OptionError` for an unknown stem, and if none is wanted.
    """
    wanted = list(sources) if stems is None else list(stems)
    unknown = [stem for stem in wanted if stem not in sources]
    if unknown or not wanted:
        missing, known = ", ".join(map(repr, unknown)), ", ".join(sources)
        raise OptionError(f"the model has no stem {missing}: choose among {known}")
    return [list(sources).index(stem) for stem in wanted]
