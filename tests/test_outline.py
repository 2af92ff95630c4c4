"""A model is run on shapes when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demucs_infer.demucs import Demucs
from demucs_infer.errors import ModelLoadingError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.hub.outline import check_window
from demucs_infer.resample import _filters
from demucs_infer.states import load_model

from .helpers import SOURCES, TINY, noise, pair, save_package

SMALL = {"sources": SOURCES, "channels": 8, "samplerate": 8000, "segment": 0.5}
FAMILIES = {
    "htdemucs": (HTDemucs, TINY),
    "six": (HTDemucs, {**TINY, "bottom_channels": 0, "channels": 16}),
    "hdemucs": (HDemucs, {**SMALL, "nfft": 1024, "depth": 4, "dconv_lstm": 3, "dconv_attn": 3}),
    "magnitudes": (HDemucs, {**SMALL, "nfft": 1024, "depth": 4, "cac": False}),
    "bands": (HDemucs, {**SMALL, "nfft": 1024, "multi_freqs": [0.3], "dconv_mode": 3}),
    "demucs": (Demucs, {**SMALL, "depth": 3, "dconv_lstm": 2, "dconv_attn": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_checked_gives_the_same_stems(family: str, tmp_path: Path) -> None:
    """Nothing that the check computes is kept, such as filters of zeros."""
    model_class, options = FAMILIES[family]
    theirs, ours = pair(model_class, **options)
    mix = noise(2, 4000)[None]
    with torch.no_grad():
        expected = ours(mix)
        _filters.cache_clear()
        loaded = load_model(save_package(tmp_path / "model.th", theirs))
        assert torch.equal(loaded(mix), expected)


def test_a_window_that_cannot_be_run_is_refused() -> None:
    model = HDemucs(**{**SMALL, "nfft": 1024, "depth": 4})
    check_window(model)
    model.segment = 1e6
    with pytest.raises(ModelLoadingError, match="segment is too long"):
        check_window(model)
