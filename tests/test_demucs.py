from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demucs_infer.demucs import Demucs

from .helpers import assert_equal_models, merged, pair

TINY = {"sources": ["a", "b"], "channels": 8, "depth": 5, "samplerate": 8000}
OPTIONS = [
    {},
    {"rewrite": False},
    {"rewrite": False, "dconv_mode": 3},
    {"dconv_mode": 0},
    {"normalize": False, "resample": False},
    {"lstm_layers": 2, "gelu": False, "glu": False},
    {"context": 0, "kernel_size": 6, "stride": 3},
    {"norm_starts": 1, "norm_groups": 2, "dconv_comp": 2, "dconv_depth": 3},
    {"audio_channels": 1, "dconv_attn": 3, "dconv_lstm": 4},
    {"growth": 1, "stride": 2, "context": 2, "depth": 3, "dconv_mode": 1, "lstm_layers": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [2, 9001])
def test_small_models_equal_the_reference(options: dict, length: int) -> None:
    assert_equal_models(Demucs, {**TINY, **options}, length)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.lists(st.sampled_from(OPTIONS), max_size=4), length=st.integers(2, 5000))
def test_options_of_several_rows_equal_the_reference(rows: list[dict], length: int) -> None:
    assert_equal_models(Demucs, TINY | merged(rows), length)


def test_stems_of_one_sample_are_finite() -> None:
    with torch.no_grad():
        assert Demucs(**TINY).eval()(torch.ones(1, 2, 1)).isfinite().all()


@pytest.mark.parametrize("resample", [True, False])
def test_valid_length_is_that_of_the_reference(resample: bool) -> None:
    theirs, ours = pair(Demucs, resample=resample, **TINY)
    for length in (1, 2, 100, 5000, 44_100, 100_001):
        assert ours.valid_length(length) == theirs.valid_length(length) >= length


def test_states_with_the_names_of_older_checkpoints_are_loaded() -> None:
    options = {**TINY, "dconv_mode": 0}
    model = Demucs(**options)
    state = model.state_dict()
    older = {re.sub(r"^(encoder\.\d)\.3\.", r"\1.2.", name): state[name] for name in state}
    assert set(older) != set(state)
    before = dict(older)
    other = Demucs(**options)
    other.load_state_dict(older)
    assert older == before
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_current_names_in_a_state_are_kept() -> None:
    model = Demucs(**TINY, rewrite=False, dconv_mode=3)
    model.load_state_dict(state := dict(model.state_dict()))
    assert list(model.current_names(state)) == list(state)
