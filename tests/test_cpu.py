from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.blocks import DConv, LocalState
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


@torch.no_grad()
def error_of_norm(norm: nn.GroupNorm, x: Tensor) -> float:
    """Return the largest error of `norm` against float64."""
    exact = copy.deepcopy(norm).double()
    weight, bias = exact.weight, exact.bias
    expected = nn.functional.group_norm(x.double().contiguous(), norm.num_groups, weight, bias)
    result = norm(x)
    assert result.stride(1) == x.stride(1)  # channels are still last
    return (result - expected).abs().max().item()


@pytest.mark.parametrize("shape", [(2, 8, 5000), (2, 8, 3, 2001), (1, 16, 200_000)])
def test_norm_of_any_length_is_exact(shape: tuple[int, ...]) -> None:
    norm = shake(FastGroupNorm(4, shape[1]))
    # One sum of all steps in float32 would be wrong by 2e-5.
    assert error_of_norm(norm, channels_last(random(*shape))) < 5e-6


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("length", [400, 5000])
def test_norm_of_nearly_constant_items_is_exact(channels: int, length: int) -> None:
    norm = shake(FastGroupNorm(1, channels))
    # With four channels, a difference of squares would be wrong by 4e-4 or more.
    assert error_of_norm(norm, channels_last(1 + 1e-3 * random(3, channels, length))) < 1e-4


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


@pytest.mark.parametrize("by_onednn", [True, False])
def test_products_by_either_library(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "onednn_is_faster", lambda: by_onednn)
    theirs, ours = pair(HTDemucs, **TINY)
    mix = random(1, 2, 4000)
    with torch.no_grad():
        assert_close(fast_copy(ours)(mix), theirs(mix))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (HDemucs, SPECTRAL),
        (Demucs, {**SMALL, "depth": 4}),
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


def test_hooks_get_the_whole_output_of_a_layer_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(Demucs, **{**SMALL, "depth": 4})
    mix, seen = random(1, 2, 20_000), []
    monkeypatch.setattr(cpu, "TILE_BYTES", 2**14)
    for model in (theirs, ours):
        model.decoder[-1][0].register_forward_hook(lambda *event: seen.append(event[2].shape))
    with torch.no_grad():
        assert_close(fast_copy(ours)(mix), theirs(mix))
    assert len(seen) == 2
    assert seen[0] == seen[1]


@pytest.mark.parametrize("queries", [7, 50])
def test_local_attention_in_parts_equals_the_whole(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = shake(LocalState(8))
    monkeypatch.setattr(cpu, "TILE_BYTES", queries * 2 * 4 * 50 * 4)
    with torch.no_grad():
        x = random(2, 8, 50)
        assert_close(fast_layer(layer)(x), layer(x))


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


@pytest.mark.parametrize("layer", ["0", "0.0", "0.3", "0.4", "0.5", "0.6"])
def test_hooks_get_the_whole_output_in_a_residual_branch(layer: str) -> None:
    branch, x = shake(DConv(16)), channels_last(random(1, 16, 3000))
    seen: list[torch.Size] = []
    with torch.no_grad():
        expected = branch(x)
        branch.layers.get_submodule(layer).register_forward_hook(
            lambda *event: seen.append(event[2].shape)
        )
        assert_close(fast_layer(branch)(x), expected)
    assert [shape[2] for shape in seen] == [3000]
