from __future__ import annotations

import demucs.spec
import pytest
import torch

from demucs_infer.engine.cpu import istft_of_parts
from demucs_infer.spec import ispectro, phase_of, spectro

from .helpers import assert_close, noise


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("hop", [None, 100])
def test_spectrograms_equal_the_reference(pad: int, hop: int | None) -> None:
    x = noise(2, 3000)[None]
    ours, theirs = spectro(x, 400, hop, pad), demucs.spec.spectro(x, 400, hop, pad)
    assert_close(torch.view_as_real(ours), torch.view_as_real(theirs), 1e-6)
    back = ispectro(ours, hop, 2900, pad)
    assert_close(back, x[..., :2900])
    # Without a hop, the reference does not invert its own padding.
    if hop or not pad:
        assert_close(back, demucs.spec.ispectro(theirs, hop, 2900, pad), 1e-6)


def test_phase_of_the_mixture() -> None:
    out = 3 * phase_of(torch.tensor([1j, -2.0, 0.0]))
    assert torch.allclose(out, torch.tensor([3j, -3.0, 3.0]), atol=1e-6)


@pytest.mark.parametrize(("start", "length"), [(0, 1100), (192, 700), (5, 1)])
def test_inverse_of_parts_equals_that_of_the_whole_with_silence_around_it(
    start: int, length: int
) -> None:
    z = torch.randn(2, 257, 6, dtype=torch.complex64)
    whole = ispectro(torch.nn.functional.pad(z, (2, 2)), 128, 1152)
    out = istft_of_parts(z.split(4, -1), 128, 6, start, length)
    assert_close(out, whole[:, start : start + length], 1e-6)
