from __future__ import annotations

import copy

import demucs.demucs
import pytest
import torch
from torch import nn

from demucs_infer.blocks import BLSTM, DConv, DConvOptions, LocalState
from demucs_infer.engine import cpu_kernels
from demucs_infer.engine.cpu_kernels import channels_last
from demucs_infer.errors import OptionError

from .helpers import Largest, assert_close, shake


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


@pytest.mark.parametrize("queries", [7, 50])
def test_local_attention_equals_the_reference(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = like(LocalState(8), demucs.demucs.LocalState(8, nfreqs=0))
    monkeypatch.setattr(cpu_kernels, "TILE_BYTES", queries * 2 * 4 * 50 * 4)
    with torch.no_grad():
        x = random(2, 8, 50)
        assert_close(ours(x), theirs(x))


def test_attention_needs_channels_that_its_heads_divide() -> None:
    with pytest.raises(OptionError, match="multiple of 4 channels, not 6"):
        LocalState(6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": -2, "kernel": 5, "comp": 2},
        {"attn": True, "lstm": True},
        {"norm": False, "gelu": False},
    ],
    ids=str,
)
def test_residual_branch_equals_the_reference(options: dict) -> None:
    theirs_options = {"compress" if k == "comp" else k: v for k, v in options.items()}
    ours, theirs = like(
        DConv(16, DConvOptions(**options)), demucs.demucs.DConv(16, **theirs_options)
    )
    with torch.no_grad():
        x = random(2, 16, 300)
        assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("options", [{}, {"comp": 4, "lstm": True}], ids=str)
def test_long_residual_branches_are_exact_and_need_little_memory(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 5001 if options else 70_001
    branch, x = shake(DConv(16, DConvOptions(**options))), random(3, 16, length)
    x[-1, :, 2000:] = 0
    with torch.no_grad():
        exact = copy.deepcopy(branch).double()(x.double())
    monkeypatch.setattr(cpu_kernels, "TILE_BYTES", 2**18)
    with torch.no_grad(), Largest() as largest:
        y = branch(channels_last(x))
    assert y.stride() == channels_last(x).stride()
    # With a covariance by a difference of squares in float32, the error would be 5e-6.
    assert_close(y.double(), exact, 1e-6)
    # The input of the norm has twice the channels of x.
    assert options or largest.elements < 1.5 * x.numel()


@pytest.mark.parametrize("layer", ["0", "0.0", "0.3", "0.4", "0.5", "0.6"])
def test_hooks_get_the_whole_output_in_a_residual_branch(layer: str) -> None:
    branch, x = shake(DConv(16, DConvOptions())), channels_last(random(1, 16, 3000))
    seen: list[torch.Size] = []
    with torch.no_grad():
        expected = branch(x)
        branch.layers.get_submodule(layer).register_forward_hook(
            lambda *event: seen.append(event[2].shape)
        )
        assert_close(branch(x), expected)
    assert [shape[2] for shape in seen] == [3000]
