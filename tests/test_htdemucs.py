from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import TINY, assert_close, assert_equal_models, noise, pair

OPTIONS = {
    "audio_channels": st.sampled_from([1, 2]),
    "channels": st.sampled_from([8, 16]),
    "growth": st.sampled_from([1, 2]),
    "nfft": st.sampled_from([512, 1024]),
    "cac": st.booleans(),
    "depth": st.integers(1, 3),
    "rewrite": st.booleans(),
    "multi_freqs": st.sampled_from([None, [0.4], [0.25, 0.5]]),
    "multi_freqs_depth": st.integers(1, 2),
    "freq_emb": st.sampled_from([0, 0.2]),
    "time_stride": st.sampled_from([2, 4]),
    "context": st.integers(0, 2),
    "context_enc": st.integers(0, 1),
    "norm_starts": st.integers(2, 4),
    "norm_groups": st.sampled_from([1, 4]),
    "dconv_mode": st.integers(0, 3),
    "dconv_depth": st.integers(1, 3),
    "dconv_comp": st.sampled_from([2, 4]),
    "segment": st.sampled_from([0.25, 0.7]),
}
TRANSFORMER = {
    "bottom_channels": st.sampled_from([0, 8, 16]),
    "t_layers": st.integers(0, 3),
    "t_heads": st.sampled_from([1, 2, 4]),
    "t_hidden_scale": st.sampled_from([1, 2.0]),
    "t_norm_in": st.booleans(),
    "t_norm_in_group": st.sampled_from([False, 2]),
    "t_group_norm": st.sampled_from([False, 4]),
    "t_norm_first": st.booleans(),
    "t_norm_out": st.booleans(),
    "t_layer_scale": st.booleans(),
    "t_gelu": st.booleans(),
    "t_weight_pos_embed": st.sampled_from([0.5, 1.0]),
    "t_max_period": st.sampled_from([100.0, 10000.0]),
    "t_cross_first": st.booleans(),
}
SMALL = [
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
    {"depth": 4, "t_weight_pos_embed": 0.5, "t_max_period": 100.0},
    {"audio_channels": 1},
    {"segment": 0.7, "t_norm_out": False, "emb_scale": 3},
]


@pytest.mark.parametrize("options", SMALL, ids=str)
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 4000])
def test_small_models_equal_the_reference(options: dict, length: int) -> None:
    assert_equal_models(HTDemucs, {**TINY, **options}, length)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(options=st.fixed_dictionaries({}, optional={**OPTIONS, **TRANSFORMER}))
def test_random_options_equal_the_reference(options: dict) -> None:
    assert_equal_models(HTDemucs, {**TINY, "t_norm_first": True, **options})


def test_without_a_training_length_windows_are_not_padded() -> None:
    theirs, ours = pair(HTDemucs, **TINY, use_train_segment=False)
    with torch.no_grad():
        assert_close(ours(noise(2, 5003)[None]), theirs(noise(2, 5003)[None]))
    assert ours.valid_length(5003) == 5003


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


def test_network_maps_real_tensors_of_the_shapes_of_a_window() -> None:
    model = HTDemucs(**TINY).eval()
    with torch.no_grad():
        x, xt = model.network(torch.randn(1, 4, 512, 16), torch.randn(1, 2, 4000))
    assert x.shape == (1, 16, 512, 16)
    assert xt.shape == (1, 8, 4000)
