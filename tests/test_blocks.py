"""Blocks, embeddings, padding and rescaling, which networks of several modules are made of."""

from __future__ import annotations

import demucs.demucs
import demucs.hdemucs
import demucs.transformer
import pytest
import torch
from torch import nn

from demucs_infer.blocks import BLSTM, DConv, LocalState
from demucs_infer.demucs import rescale_module
from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import pad1d
from demucs_infer.transformer import create_2d_sin_embedding, create_sin_embedding

from .helpers import assert_close, noise, shake


def like(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return both in evaluation mode, with the same weights."""
    shake(theirs)
    ours.eval().load_state_dict(theirs.state_dict())
    return ours, theirs


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 200, 201, 450])
def test_lstm_in_frames_equals_the_reference(length: int) -> None:
    options = {"layers": 2, "max_steps": 200, "skip": True}
    ours, theirs = like(BLSTM(6, **options), demucs.demucs.BLSTM(6, **options))
    with torch.no_grad():
        x = random(2, 6, length)
        assert_close(ours(x), theirs(x))


def test_attention_needs_channels_that_its_heads_divide() -> None:
    with pytest.raises(OptionError, match="multiple of 4 channels, not 6"):
        LocalState(6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": -2, "kernel": 5, "compress": 2},
        {"attn": True, "lstm": True},
        {"norm": False, "gelu": False},
    ],
    ids=str,
)
def test_residual_branch_equals_the_reference(options: dict) -> None:
    ours, theirs = like(DConv(16, **options), demucs.demucs.DConv(16, **options))
    with torch.no_grad():
        x = random(2, 16, 300)
        assert_close(ours(x), theirs(x))


def test_embeddings_equal_the_reference() -> None:
    for shift in (0, 3):
        theirs = demucs.transformer.create_sin_embedding(50, 16, shift, max_period=100)
        assert_close(create_sin_embedding(50, 16, shift, max_period=100), theirs, 1e-6)
    theirs = demucs.transformer.create_2d_sin_embedding(16, 5, 9)
    assert_close(create_2d_sin_embedding(16, 5, 9), theirs, 1e-6)
    with pytest.raises(OptionError, match="d_model=6"):
        create_2d_sin_embedding(6, 5, 9)


def test_padding_and_rescaling_equal_the_reference() -> None:
    x = noise(2, 5)
    for padding in ((2, 3), (7, 6)):
        for mode in ("reflect", "constant"):
            theirs = demucs.hdemucs.pad1d(x, padding, mode)
            assert torch.equal(pad1d(x, padding, mode), theirs)
    layer, theirs = nn.Conv1d(2, 3, 4), nn.Conv1d(2, 3, 4)
    theirs.load_state_dict(layer.state_dict())
    rescale_module(layer, 0.1)
    demucs.demucs.rescale_module(theirs, 0.1)
    assert torch.equal(layer.weight, theirs.weight)
