"""A part of a track: from a time on, for a time. Importing this needs no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import OptionError


@dataclass(frozen=True)
class Part:
    """What is separated of a track: from `start` on, for `duration`, both in seconds.

    Raises `OptionError` for times that there are not.
    """

    start: float | None = None
    duration: float | None = None

    def __post_init__(self) -> None:
        if self.start is not None and not 0 <= self.start < math.inf:
            raise OptionError(f"start={self.start} must be 0 or more seconds")
        if self.duration is not None and not 0 < self.duration < math.inf:
            raise OptionError(f"duration={self.duration} must be more than 0 seconds")

    def samples(self, rate: int) -> tuple[int, int | None]:
        """The first sample at `rate` hertz, and the one behind the last; None: to the end."""
        first = round((self.start or 0) * rate)
        return first, None if self.duration is None else first + round(self.duration * rate)
