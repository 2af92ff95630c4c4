"""Models, and bags of them, as the engine sees them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..errors import ModelLoadingError, OptionError


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
