from __future__ import annotations

import pytest
import torch

from demucs_infer.read.pcm import MAX_SAMPLE, strange_samples


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nan, "not finite (NaN or Inf)"),
        (-torch.inf, "not finite (NaN or Inf)"),
        (1e25, "louder than 1e+06 of full scale"),
        (-1.1e6, "louder than 1e+06 of full scale"),
        (MAX_SAMPLE, None),
        (0.0, None),
    ],
)
def test_samples_that_no_music_has(value: float, reason: str | None) -> None:
    wav = torch.zeros(2, 100)
    wav[1, 50] = value
    assert strange_samples(wav) == reason


def test_no_samples_are_not_strange() -> None:
    assert strange_samples(torch.zeros(2, 0)) is None
