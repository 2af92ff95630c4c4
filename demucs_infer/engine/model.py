"""Models as the engine, the backends and the export see them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelLoadingError
from ..utils import pick_sources, shortened


class Network(Protocol):
    """What stands between the transforms of a model: real tensors in and out, of fixed shapes."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]: ...


class Model(Protocol):
    """A model of ours, a `torch.nn.Module` beside all this.

    `sources` are the names of its stems, `samplerate` is in hertz, and `segment`, the length of a
    window, in seconds. `options` is the dataclass that describes its architecture.
    """

    sources: list[str]
    samplerate: int
    audio_channels: int
    segment: float
    options: Any

    def __call__(
        self, mix: Tensor, stems: Sequence[int] | None = None, *, network: Network | None = None
    ) -> Tensor:
        """Separate `mix` `[B, C, T]` into `[B, S, C, T]`: all sources, or those of `stems`.

        `network` runs instead of the model's own.
        """

    def network(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run what stands between the transforms."""

    def exact_layers(self) -> list[nn.Module]:
        """Layers that stay in float32 when the network is cast to half precision."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Weights by name."""


def _same(length: int) -> int:
    return length


def _nothing(draw: Any) -> None:
    pass


@dataclass(frozen=True)
class Member:
    """A module as the engine runs it: a model of ours, or any other that separates windows.

    A module has `sources`, `samplerate` (hertz) and `segment` (seconds), and is callable on
    `[B, C, T]`; what else it may have is asked here and nowhere else:

    - `audio_channels` (else any number goes),
    - `max_segment`, the longest window in seconds,
    - `valid_length(length)`, the samples at which a window of `length` is best run,
    - `consume_random(draw)`, which draws what the reference draws for each window,
    - a parameter `stems` of `forward`, the indices of the sources that are wanted.
    """

    module: nn.Module
    sources: list[str]
    samplerate: int
    segment: float
    audio_channels: int | None
    max_segment: float
    valid_length: Callable[[int], int]
    consume_random: Callable[[Any], None]
    takes_stems: bool

    @classmethod
    def of(cls, module: nn.Module) -> Member:
        """Ask `module` for all of it."""
        ask: Any = module
        return cls(
            module,
            list(ask.sources),
            int(ask.samplerate),
            float(ask.segment),
            getattr(ask, "audio_channels", None),
            float(getattr(ask, "max_segment", inf)),
            getattr(ask, "valid_length", _same),
            getattr(ask, "consume_random", _nothing),
            # As it is called, whatever function it may stand for.
            "stems" in inspect.signature(module.forward, follow_wrapped=False).parameters,
        )

    @property
    def device(self) -> torch.device | None:
        """The device of its weights; None without any."""
        first = next(self.module.parameters(), None)
        return None if first is None else first.device

    def __call__(self, windows: Tensor, stems: Sequence[int]) -> Tensor:
        """The sources `stems` of `windows` `[B, C, T]`, as `[B, S, C, T]`."""
        unproven = getattr(self.module, "unproven", None)
        try:
            if self.takes_stems:
                output: Tensor = self.module(windows, stems)
            else:
                output = pick_sources(self.module(windows), stems)
            if unproven and output.shape[-1] != windows.shape[-1]:
                raise ValueError(f"{list(windows.shape)} becomes {list(output.shape)}")
        except (
            ArithmeticError,
            AssertionError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as exc:
            # Memory and devices are not the checkpoint's fault.
            if not unproven or re.search("memory|CUDA|MPS", str(exc)):
                raise
            raise ModelLoadingError(
                f"{unproven}: describes a model that cannot run ({shortened(exc)})"
            ) from exc
        if unproven:
            self.module.unproven = None  # type: ignore[assignment]
        return output
