from __future__ import annotations

import copy
import math

import pytest
import torch

from demucs_infer.demucs import Demucs
from demucs_infer.engine import cpu_kernels
from demucs_infer.engine.cpu_kernels import ConvTranspose1d, GroupNorm, channels_last
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import TINY, Largest, assert_close, pair, shake, tone_with_gaps

SMALL = {"sources": ["a", "b"], "channels": 8, "samplerate": 8000}
FAMILIES = [
    (Demucs, {**SMALL, "depth": 4, "norm_starts": 0}),
    (HDemucs, {**SMALL, "depth": 5, "nfft": 1024}),
    (HTDemucs, {**TINY, "segment": 15}),
]


@pytest.mark.parametrize("shape", [(2, 8, 5000), (2, 8, 3, 2001), (1, 16, 200_000)])
def test_a_norm_of_any_length_is_exact(shape: tuple[int, ...]) -> None:
    x = channels_last(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    norm = shake(GroupNorm(4, shape[1]))
    weight, bias = norm.weight.double(), norm.bias.double()
    exact = torch.nn.functional.group_norm(x.double().contiguous(), 4, weight, bias)
    result = norm(x)
    assert result.stride() == x.stride()  # channels are still last
    assert (result - exact).abs().max() < 4e-6


@pytest.mark.parametrize("channels", [1, 4])
def test_a_norm_of_items_that_hardly_change_is_exact(channels: int) -> None:
    x = channels_last(1 + 1e-3 * torch.randn(3, channels, 400))
    norm = shake(GroupNorm(1, channels))
    exact = torch.nn.functional.group_norm(
        x.double().contiguous(), 1, norm.weight.double(), norm.bias.double()
    )
    assert (norm(x) - exact).abs().max() < 1e-4


@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=lambda value: str(value)[:40])
def test_no_further_from_float64_than_the_reference(family: type, options: dict) -> None:
    theirs, ours = pair(family, **options)
    mix = tone_with_gaps(60_000)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(mix)
        error, allowed = ((model(mix.float()) - exact).abs().max() for model in (ours, theirs))
    assert error <= 1.5 * allowed


@pytest.mark.parametrize("by_onednn", [True, False])
def test_products_by_either_library(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def chosen() -> bool:
        nonlocal calls
        calls += 1
        return by_onednn

    monkeypatch.setattr(cpu_kernels, "onednn_is_faster", chosen)
    theirs, ours = pair(HTDemucs, **TINY)
    mix = torch.randn(1, 2, 4000)
    with torch.no_grad():
        assert_close(ours(mix), theirs(mix))
    assert calls


@pytest.mark.parametrize("rows", [1, 7])
def test_layers_in_tiles(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(HDemucs, **{**SMALL, "depth": 4, "nfft": 1024})
    mix = torch.randn(1, 2, 20_000)
    monkeypatch.setattr(cpu_kernels, "TILE_BYTES", rows * 16 * 80 * 4)
    with torch.no_grad():
        assert_close(ours(mix), theirs(mix))


@pytest.mark.parametrize("kernel", [2, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_of_steps(kernel: int, bias: bool) -> None:
    layer = ConvTranspose1d(6, 5, kernel, stride=3, bias=bias)
    for x in (torch.randn(2, 6, 40), channels_last(torch.randn(1, 6, 1))):
        with torch.no_grad():
            result, exact = layer(x), torch.nn.ConvTranspose1d.forward(layer, x)
        assert_close(result, exact)
        assert result.stride(1) == 1  # channels are last


@pytest.mark.parametrize("more", [{}, {"multi_freqs": [0.1, 0.3], "norm_starts": 99}], ids=str)
def test_the_spectra_of_all_sources_are_never_whole(more: dict) -> None:
    theirs, ours = pair(HDemucs, **{**SMALL, "depth": 4, "nfft": 1024, "channels": 4, **more})
    mix = torch.randn(1, 2, 100_000)
    spectra = 2 * 4 * 512 * math.ceil(100_000 / 256)
    with torch.no_grad():
        expected = theirs(mix)
        with Largest() as largest:
            assert_close(ours(mix, stems=[0, 1]), expected)
        assert largest.elements < 0.7 * spectra
        seen: list[int] = []
        ours.decoder[-1].register_forward_hook(lambda *event: seen.append(event[2][0].numel()))
        assert_close(ours(mix), expected)
        assert seen == [spectra]  # who watches the layer sees it whole


def test_a_level_of_steps_that_is_watched_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(Demucs, **{**SMALL, "depth": 4})
    mix, seen = torch.randn(1, 2, 20_000), []
    monkeypatch.setattr(cpu_kernels, "TILE_BYTES", 2**14)
    for model in (theirs, ours):
        model.decoder[-1][0].register_forward_hook(lambda *event: seen.append(event[2].shape))
    with torch.no_grad():
        assert_close(ours(mix), theirs(mix))
    assert len(seen) == 2
    assert seen[0] == seen[1]
