"""Bags of models as files: YAML, of strangers too, becomes checked and plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelLoadingError
from .content import Content

LARGEST = 2**18  # bytes of a bag's file


@dataclass(frozen=True)
class Bag:
    """The models of a bag by signature, a row of weights for each, and seconds of a window."""

    models: tuple[str, ...]
    weights: list[list[float]] | None = None
    segment: float | None = None

    @classmethod
    def read(cls, path: Path) -> Bag:
        """Read `NAME.yaml`. Raises `ModelLoadingError` if it is no bag."""
        try:
            return cls._of(Content.read(path, "bag").yaml(LARGEST))
        except _NoBag as exc:
            raise ModelLoadingError(f"{path}: {exc}") from exc

    @classmethod
    def _of(cls, content: Any) -> Bag:
        if not isinstance(content, dict) or not isinstance(content.get("models"), list):
            raise _NoBag("does not list its models")
        if not all(isinstance(sig, (str, int)) for sig in content["models"]):
            raise _NoBag("lists models that are no signatures")
        models = tuple(str(sig) for sig in content["models"])
        return cls(models, _rows(content.get("weights")), _seconds(content.get("segment")))


class _NoBag(Exception):
    """A file is no bag."""


def _rows(weights: Any) -> list[list[float]] | None:
    if weights is None:
        return None
    if not isinstance(weights, list) or not all(isinstance(row, list) for row in weights):
        raise _NoBag("its weights are no rows of numbers")
    return [[_number(weight, "weights") for weight in row] for row in weights]


def _seconds(segment: Any) -> float | None:
    return None if segment is None else _number(segment, "segment")


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, (int, float)):
            return float(value)
    except OverflowError:
        pass
    raise _NoBag(f"its {name} hold what is no number")
