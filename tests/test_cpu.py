from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.blocks import DConv
from demucs_infer.demucs import Demucs
from demucs_infer.engine import cpu
from demucs_infer.engine.cpu import (
    FastConvTranspose1d,
    FastGroupNorm,
    channels_last,
    fast_copy,
    fast_layer,
)
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import TINY, Largest, assert_close, pair, shake, tone_with_gaps

SMALL = {"sources": ["a", "b"], "channels": 8, "samplerate": 8000}
SPECTRAL = {**SMALL, "depth": 4, "nfft": 1024}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("x", "groups", "allowed"),
    [
        (random(2, 8, 5000), 4, 5e-6),
        (random(2, 8, 3, 2001), 4, 5e-6),
        # One sum of all steps in float32 would be wrong by 2e-5.
        (random(1, 16, 200_000), 4, 5e-6),
        # Nearly constant: a difference of squares would be wrong by 4e-4 or more.
        (1 + 1e-3 * random(3, 4, 5000), 1, 1e-4),
        (1 + 1e-3 * random(3, 1, 400), 1, 1e-4),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, Tensor) else str(value),
)
def test_norm_is_exact_and_leaves_channels_last(x: Tensor, groups: int, allowed: float) -> None:
    norm = shake(FastGroupNorm(groups, x.shape[1]))
    exact = copy.deepcopy(norm).double()
    x = channels_last(x)
    with torch.no_grad():
        result = norm(x)
        expected = nn.GroupNorm.forward(exact, x.double().contiguous())
    assert (result - expected).abs().max() < allowed
    assert result.stride(1) == x.stride(1)


@pytest.mark.parametrize(
    ("family", "options", "length"),
    [
        (Demucs, {**SMALL, "channels": 16, "depth": 4, "norm_starts": 0}, 60_000),
        (HDemucs, {**SPECTRAL, "depth": 5, "dconv_lstm": 9}, 24_000),
        (HTDemucs, {**TINY, "segment": 3}, 24_000),
    ],
    ids=["demucs", "hdemucs", "htdemucs"],
)
def test_error_against_float64_is_that_of_the_reference(
    family: type, options: dict, length: int
) -> None:
    mix, ratios = tone_with_gaps(length), []
    for seed in range(4):
        theirs, ours = pair(family, seed, **options)
        with torch.no_grad():
            exact = copy.deepcopy(theirs).double()(mix)
            errors = [
                float((model(mix.float()) - exact).abs().max())
                for model in (theirs, ours, fast_copy(ours))
            ]
        ratios.append([error / errors[0] for error in errors[1:]])
    # The mean is 0.9 to 1.4 with each instruction set and one or two threads. It is 6 for Demucs if
    # norms sum all steps in float32, and 30 for each family if products have ten bits.
    for column in zip(*ratios):
        assert math.exp(sum(map(math.log, column)) / len(column)) < 2.5, ratios


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (HDemucs, {**SPECTRAL, "dconv_attn": 2}),
        (Demucs, {**SMALL, "depth": 4, "dconv_attn": 2}),
        (HTDemucs, {**TINY, "multi_freqs": [0.3], "multi_freqs_depth": 2}),
        (HTDemucs, {**TINY, "rewrite": False, "norm_starts": 1}),
        (HTDemucs, {**TINY, "context": 0, "context_enc": 1, "cac": False}),
    ],
    ids=["hdemucs", "demucs", "bands", "no rewrite", "context"],
)
def test_layers_in_tiles_equal_the_reference(
    family: type, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large models are cut into tiles of 16 MB.
    monkeypatch.setattr(cpu, "TILE_BYTES", 2**13)
    theirs, ours = pair(family, **options)
    mix = random(1, 2, 4000)
    with torch.no_grad():
        assert_close(fast_copy(ours)(mix), theirs(mix))


@pytest.mark.parametrize(("kernel", "bias"), [(2, True), (3, True), (8, True), (9, False)])
def test_transposed_convolution_leaves_channels_last(kernel: int, bias: bool) -> None:
    layer = FastConvTranspose1d(6, 5, kernel, stride=3, bias=bias)
    for x in (random(2, 6, 40), channels_last(random(1, 6, 1))):
        with torch.no_grad():
            result, exact = layer(x), nn.ConvTranspose1d.forward(layer, x)
        assert_close(result, exact)
        assert result.stride(1) == 1


@pytest.mark.parametrize("more", [{}, {"multi_freqs": [0.1, 0.3], "norm_starts": 99}], ids=str)
def test_spectra_of_all_sources_are_never_in_memory_at_once(more: dict) -> None:
    theirs, ours = pair(HDemucs, **{**SPECTRAL, "channels": 4, **more})
    mix = random(1, 2, 60_000)
    spectra = 2 * 4 * 512 * math.ceil(60_000 / 256)
    with torch.no_grad():
        expected = theirs(mix)
        with Largest() as largest:
            assert_close(fast_copy(ours)(mix, stems=[0, 1]), expected)
        assert largest.elements < 0.8 * spectra
        # A hook gets the whole output.
        seen: list[int] = []
        ours.decoder[-1].register_forward_hook(lambda *event: seen.append(event[2][0].numel()))
        assert_close(fast_copy(ours)(mix), expected)
        assert seen == [spectra]


@pytest.mark.parametrize("options", [{}, {"compress": 4, "lstm": True}], ids=str)
def test_long_residual_branches_are_exact_and_need_little_memory(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 5001 if options else 70_001
    branch, x = shake(DConv(16, **options)), random(3, 16, length)
    x[-1, :, 2000:] = 0
    with torch.no_grad():
        exact = copy.deepcopy(branch).double()(x.double())
    monkeypatch.setattr(cpu, "TILE_BYTES", 2**18)
    with torch.no_grad(), Largest() as largest:
        y = fast_layer(branch)(channels_last(x))
    assert y.stride() == channels_last(x).stride()
    # With a covariance by a difference of squares in float32, the error would be 5e-6.
    assert_close(y.double(), exact, 1e-6)
    # The input of the norm has twice the channels of x.
    assert options or largest.elements < 1.5 * x.numel()
