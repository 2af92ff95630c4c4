"""Bags of models, whose results are averaged."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from numbers import Real

from torch import Tensor, nn

from ..errors import ModelLoadingError, OptionError
from .model import Member


class BagOfModels(nn.Module):
    """Models whose results are averaged.

    `weights` has a row per model with a number per source (default: all 1). `segment` (seconds)
    replaces the segment of the models, but never exceeds the longest that they take; the models
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
        if segment is not None and not (isinstance(segment, Real) and 0 < segment < math.inf):
            raise ModelLoadingError(f"the segment of a bag must be seconds, not {segment!r}")
        self.models = nn.ModuleList(_with_segment(model, segment) for model in models)
        members = self.members
        for name in ("sources", "samplerate", "audio_channels"):
            values = [getattr(member, name) for member in members]
            if any(value != values[0] for value in values):
                raise ModelLoadingError(f"the models of a bag differ in {name}: {values}")
        first = members[0]
        self.sources, self.samplerate = first.sources, first.samplerate
        self.audio_channels = first.audio_channels
        # For callers; the engine uses the segment of each model.
        self.segment = min(member.segment for member in members)
        self.weights = _checked_weights(weights, len(members), len(self.sources))

    @property
    def members(self) -> list[Member]:
        """The models as the engine runs them."""
        return [Member(model) for model in self.models]

    @property
    def max_segment(self) -> float:
        """The longest segment in seconds that every model takes (infinite if none has a limit)."""
        return min(member.max_segment for member in self.members)

    @property
    def max_allowed_segment(self) -> float:
        """`max_segment`, under the name of the reference."""
        return self.max_segment

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a bag is run by apply_model")


def _checked_weights(
    weights: Sequence[Sequence[float]] | None, models: int, sources: int
) -> list[list[float]]:
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
        raise ModelLoadingError(f"the weights of a bag leave a source without a model: {weights}")
    return rows


def as_bag(model: nn.Module) -> BagOfModels:
    """Return the bag itself, or a bag of the one model."""
    return model if isinstance(model, BagOfModels) else BagOfModels([model])


def check_segment(model: nn.Module, segment: float | None) -> None:
    """Raise `OptionError` if `segment` (seconds) is too long for `model` to take at once."""
    longest = as_bag(model).max_segment
    if segment is not None and segment > longest:
        raise OptionError(
            f"segment={segment:g} is longer than the {longest:g} s that the model can take at once:"
            " give that or less"
        )


def _with_segment(model: nn.Module, segment: float | None) -> nn.Module:
    """Return `model`, or a copy that shares its weights but has another `segment`."""
    if segment is None or segment > Member(model).max_segment:
        return model
    model = copy.copy(model)
    model.segment = segment  # type: ignore[assignment]
    return model
