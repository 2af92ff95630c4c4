from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.wdemucs import WDemucs

from .helpers import assert_close, assert_equal_models, merged

TINY = {"sources": ["a", "b"], "channels": 8, "nfft": 1024, "depth": 5, "samplerate": 8000}
OPTIONS = [
    {},
    {"hybrid_old": True, "cac": False},
    {"hybrid_old": True},
    {"cac": False},
    {"multi_freqs": [0.1, 0.3], "norm_starts": 99, "multi_freqs_depth": 2},
    {"norm_starts": 0, "dconv_lstm": 9, "dconv_attn": 9},
    {"rewrite": False, "freq_emb": 0, "channels_time": 4},
    {"depth": 6, "dconv_attn": 5, "dconv_lstm": 5, "dconv_mode": 3},
    {"audio_channels": 1, "growth": 1, "time_stride": 4, "norm_groups": 2, "dconv_comp": 2},
    {"context": 2, "context_enc": 1, "norm_starts": 3, "norm_groups": 2, "dconv_depth": -2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [pytest.param(2, marks=pytest.mark.slow), 20_001])
def test_small_models_equal_the_reference(options: dict, length: int) -> None:
    assert_equal_models(HDemucs, {**TINY, **options}, length)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.lists(st.sampled_from(OPTIONS), max_size=4), length=st.integers(500, 6000))
def test_options_of_several_rows_equal_the_reference(rows: list[dict], length: int) -> None:
    assert_equal_models(HDemucs, TINY | merged(rows), length)


def test_models_without_a_time_branch_are_rejected() -> None:
    with pytest.raises(OptionError, match="hybrid=False"):
        HDemucs(**TINY, hybrid=False)


def test_wdemucs_is_the_old_name() -> None:
    assert WDemucs is HDemucs


def test_spectrum_with_an_odd_hop_is_inverted() -> None:
    model = HDemucs(sources=["a", "b"], channels=4, nfft=4 * 129, depth=3).eval()
    tone = (torch.arange(5000) / 50).sin().expand(1, 2, -1)
    spectrum = model._spec(tone)
    frames = 39  # one for each hop that has begun
    assert spectrum.shape == (1, 2, 2 * 129, frames)
    # At the edges, frames that lie beyond them are missing from the sum.
    middle = slice(1000, 4000)
    assert_close(model._ispec(spectrum, 5000)[..., middle], tone[..., middle])
