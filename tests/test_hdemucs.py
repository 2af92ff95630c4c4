from __future__ import annotations

import demucs.hdemucs
import pytest
import torch

from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.wdemucs import WDemucs

from .helpers import assert_close, noise, pair

TINY = {"sources": ["a", "b"], "channels": 8, "nfft": 1024, "depth": 5, "samplerate": 8000}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hybrid_old": True, "cac": False},
        {"hybrid_old": True},
        {"cac": False},
        {"multi_freqs": [0.1, 0.3], "norm_starts": 99},
        {"dconv_lstm": 1, "dconv_attn": 2, "dconv_mode": 3},
        {"rewrite": False, "freq_emb": 0, "channels_time": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 3001, 60_000])
def test_small_models_equal_the_reference(options: dict, length: int) -> None:
    theirs, ours = pair(demucs.hdemucs.HDemucs, HDemucs, **{**TINY, **options})
    mix = torch.stack([noise(2, length, seed) for seed in range(2)])
    with torch.no_grad():
        assert_close(ours(mix), theirs(mix))


def test_frequency_only_models_are_refused() -> None:
    with pytest.raises(OptionError, match="hybrid=False"):
        HDemucs(**TINY, hybrid=False)


def test_wdemucs_is_the_old_name() -> None:
    assert WDemucs is HDemucs
