from __future__ import annotations

import pytest
import torch
from julius.resample import resample_frac

from demucs_infer import resample as resampling
from demucs_infer.resample import Resampler, resample, resampled_length

from .helpers import assert_close, noise


@pytest.mark.parametrize("length", [1, 9601])
@pytest.mark.parametrize(
    "rates", [(48_000, 44_100), (22_050, 44_100), (96_000, 8000), (8000, 8000)], ids=str
)
def test_whole_and_in_blocks_equal_the_reference(rates: tuple[int, int], length: int) -> None:
    wav = noise(2, length)
    expected, resampled = resample_frac(wav, *rates), resample(wav, *rates)
    assert (resampled is wav) == (rates[0] == rates[1])
    assert torch.allclose(resampled, expected, atol=1e-6)
    for size in (7, 1152, 5000):
        blocks = list(Resampler(*rates).stream(wav.split(size, dim=-1)))
        streamed = torch.cat(blocks, dim=-1)
        assert streamed.shape == expected.shape
        assert torch.allclose(streamed, expected, atol=1e-6)


def test_lengths_are_exact() -> None:
    day = 24 * 3600
    assert resampled_length(day * 48_000 + 1, 48_000, 44_100) == day * 44_100
    for length in (0, 100, 9601):
        blocks = Resampler(44_100, 96_000, length).stream(noise(2, 4410).split(999, dim=-1))
        assert sum(block.shape[-1] for block in blocks) == length


def test_rates_without_a_divisor_take_little_memory() -> None:
    """All filters would be 15 GB. A tone keeps its frequency, level and position."""
    # The reference rounds the times of its filters to float32.
    wav = noise(2, 2000)
    assert_close(resample(wav, 8001, 8000), resample_frac(wav, 8001, 8000), 1e-2)
    time = torch.arange(44_101, dtype=torch.float64) / 44_101
    wav = torch.sin(2 * torch.pi * 440 * time).float()[None]
    resampled = torch.cat(list(Resampler(44_101, 88_200).stream(wav.split(5000, -1))), -1)
    time = torch.arange(resampled.shape[-1], dtype=torch.float64) / 88_200
    expected = torch.sin(2 * torch.pi * 440 * time).float()
    assert resampled.shape == (1, 88_200)
    assert (resampled - expected)[:, 100:-100].abs().max() < 1e-3


def test_filters_computed_in_parts_give_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a rate such as 994481, which a file's header can have, all would take gigabytes."""
    wav = noise(2, 5000)
    expected = resample(wav, 44100, 44099)
    for taps in (20_000, 10**9):
        monkeypatch.setattr(resampling, "TAPS_AT_ONCE", taps)
        resampling._filters.cache_clear()
        assert torch.equal(resample(wav, 44100, 44099), expected)
    resampling._filters.cache_clear()
