from __future__ import annotations

import demucs.demucs
import pytest
import torch
from torch import nn

from demucs_infer.blocks import BLSTM, DConv, LocalState
from demucs_infer.errors import OptionError

from .helpers import assert_close, shake


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
