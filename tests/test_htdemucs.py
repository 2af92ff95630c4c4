from __future__ import annotations

import inspect

import demucs.htdemucs
import pytest
import torch

from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import RELEASED, TINY, assert_close, htdemucs_pair, noise

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
@pytest.mark.parametrize("length", [1, 255, 3001, 4000])
def test_small_models_equal_the_reference(options: dict, length: int) -> None:
    theirs, ours = htdemucs_pair(**{**TINY, **options})
    mix = torch.stack([noise(ours.audio_channels, length, seed) for seed in range(2)])
    with torch.no_grad():
        assert_close(ours(mix), theirs(mix))


def test_released_size_equals_the_reference() -> None:
    theirs, ours = htdemucs_pair(**RELEASED)
    assert sum(p.numel() for p in ours.parameters()) == 41_984_456
    assert len(ours.state_dict()) == 533
    with torch.no_grad():
        for length in (343_980, 100_000):
            assert_close(ours(noise(2, length)[None]), theirs(noise(2, length)[None]))


def test_without_a_training_length_any_length_is_run_as_it_is() -> None:
    theirs, ours = htdemucs_pair(**TINY, use_train_segment=False)
    with torch.no_grad():
        assert_close(ours(noise(2, 5003)[None]), theirs(noise(2, 5003)[None]))
    assert ours.valid_length(5003) == 5003


def test_a_window_over_the_training_length_is_refused() -> None:
    model = HTDemucs(**TINY)
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


def test_signature_is_that_of_the_reference() -> None:
    ours = inspect.signature(HTDemucs).parameters
    theirs = inspect.signature(demucs.htdemucs.HTDemucs).parameters
    assert list(ours) == list(theirs)
    for name in theirs:
        default = theirs[name].default
        assert ours[name].default == (tuple(default) if isinstance(default, list) else default)


def test_htdemucs_is_no_hdemucs() -> None:
    assert not isinstance(HTDemucs(**TINY), HDemucs)


def test_network_takes_and_gives_real_tensors_of_the_window_shape() -> None:
    model = HTDemucs(**TINY).eval()
    with torch.no_grad():
        x, xt = model.network(torch.randn(1, 4, 512, 16), torch.randn(1, 2, 4000))
    assert x.shape == (1, 16, 512, 16)
    assert xt.shape == (1, 8, 4000)
