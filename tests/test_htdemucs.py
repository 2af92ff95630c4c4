from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import TINY, assert_close, assert_equal_models, merged, noise, pair

OPTIONS = [
    {},
    {"bottom_channels": 0},
    {"dconv_mode": 3, "dconv_depth": 1, "dconv_comp": 4},
    {"cac": False},
    {"cac": False, "wiener_iters": -1, "end_iters": -1},
    {"t_norm_first": False, "t_cross_first": True, "t_gelu": False},
    {"t_group_norm": 2, "t_norm_in": False, "t_norm_in_group": 4, "t_layer_scale": False},
    {"t_layers": 0},
    {"multi_freqs": [0.3], "multi_freqs_depth": 2},
    {"norm_starts": 1, "norm_groups": 2, "rewrite": False},
    {"freq_emb": 0, "context": 0, "context_enc": 1},
    {"channels_time": 12, "growth": 3, "t_layers": 0},
    {"depth": 4, "nfft": 1024, "t_weight_pos_embed": 0.5, "t_max_period": 100.0},
    {"audio_channels": 1},
    {"segment": 0.7, "t_norm_out": False, "emb_scale": 3},
    {"channels": 16, "nfft": 512, "depth": 2, "time_stride": 4, "context": 2},
    {"t_heads": 4, "t_hidden_scale": 2.0, "dconv_depth": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 4000])
def test_small_models_equal_the_reference(options: dict, length: int) -> None:
    assert_equal_models(HTDemucs, {**TINY, **options}, length)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.lists(st.sampled_from(OPTIONS), max_size=4))
def test_options_of_several_rows_equal_the_reference(rows: list[dict]) -> None:
    assert_equal_models(HTDemucs, TINY | merged(rows))


def test_without_a_training_length_windows_are_not_padded() -> None:
    theirs, ours = pair(HTDemucs, **TINY, use_train_segment=False)
    with torch.no_grad():
        assert_close(ours(noise(2, 5003)[None]), theirs(noise(2, 5003)[None]))
    assert ours.valid_length(5003) == 5003


def test_short_windows_are_not_padded_in_training() -> None:
    theirs, ours = pair(HTDemucs, **TINY)
    mix = noise(2, 2000)[None]
    assert_close(ours.train()(mix), theirs.train()(mix))


def test_windows_over_the_training_length_are_rejected() -> None:
    model = HTDemucs(**TINY).eval()
    assert model.valid_length(1) == model.valid_length(4000) == 4000
    with pytest.raises(OptionError, match="4001 samples is longer"):
        model(noise(2, 4001)[None])


@pytest.mark.parametrize(
    "option",
    [
        {"t_emb": "cape"},
        {"t_emb": "scaled"},
        {"t_sparse_self_attn": True},
        {"t_sparse_cross_attn": True},
        {"t_sin_random_shift": 3},
        {"wiener_residual": True},
    ],
    ids=str,
)
def test_unsupported_options_are_named(option: dict) -> None:
    (name,) = option
    with pytest.raises(OptionError, match=name.removeprefix("t_")):
        HTDemucs(**TINY, **option)


def test_htdemucs_is_not_an_hdemucs() -> None:
    assert not isinstance(HTDemucs(**TINY), HDemucs)
