from __future__ import annotations

import demucs.demucs
import demucs.hdemucs
import demucs.transformer
import pytest
import torch
from torch import nn

from demucs_infer.demucs import rescale_module
from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import HDemucs, pad1d
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.transformer import create_2d_sin_embedding, create_sin_embedding

from .helpers import TINY, assert_close, noise, pair


@pytest.mark.parametrize("shift", [0, 3])
def test_embeddings_equal_the_reference(shift: int) -> None:
    theirs = demucs.transformer.create_sin_embedding(50, 16, shift, max_period=100)
    assert_close(create_sin_embedding(50, 16, shift, max_period=100), theirs, 1e-6)
    theirs = demucs.transformer.create_2d_sin_embedding(16, 5, 9)
    assert_close(create_2d_sin_embedding(16, 5, 9), theirs, 1e-6)
    with pytest.raises(OptionError, match="d_model=6"):
        create_2d_sin_embedding(6, 5, 9)


@pytest.mark.parametrize(
    "options", [{}, {"cac": False}, {"cac": False, "wiener_iters": -1, "end_iters": -1}]
)
@pytest.mark.parametrize("family", [HTDemucs, HDemucs])
def test_transforms_equal_the_reference(family: type, options: dict) -> None:
    small = TINY if family is HTDemucs else {"sources": ["a", "b"], "nfft": 1024, "depth": 5}
    theirs, ours = pair(family, **{**small, "channels": 8, **options})
    mix = noise(2, 4000)[None]
    spectra = [model._spec(mix) for model in (ours, theirs)]
    assert_close(*map(torch.view_as_real, spectra))
    magnitudes = [model._magnitude(z) for model, z in zip((ours, theirs), spectra)]
    assert_close(*magnitudes)
    if options.get("wiener_iters", 0) == 0 and options:
        # The whole model has a test of the Wiener filter without iterations.
        return
    sources = [torch.stack([m, 2 * m], dim=1) for m in magnitudes]
    masked = [model._mask(spectra[1], m) for model, m in zip((ours, theirs), sources)]
    assert_close(*map(torch.view_as_real, masked))
    assert_close(*(model._ispec(z, 4000) for model, z in zip((ours, theirs), masked)))


def test_padding_and_rescaling_equal_the_reference() -> None:
    x = noise(2, 5)
    for padding in ((2, 3), (7, 6)):
        assert torch.equal(
            pad1d(x, padding, "reflect"), demucs.hdemucs.pad1d(x, padding, "reflect")
        )
        assert torch.equal(pad1d(x, padding), demucs.hdemucs.pad1d(x, padding))
    ours, theirs = nn.Conv1d(2, 3, 4), nn.Conv1d(2, 3, 4)
    theirs.load_state_dict(ours.state_dict())
    rescale_module(ours, 0.1)
    demucs.demucs.rescale_module(theirs, 0.1)
    assert torch.equal(ours.weight, theirs.weight)


def test_short_windows_are_not_padded_in_training() -> None:
    theirs, ours = pair(HTDemucs, **TINY)
    mix = noise(2, 2000)[None]
    results = [model.train()(mix) for model in (ours, theirs)]
    assert_close(*results)
