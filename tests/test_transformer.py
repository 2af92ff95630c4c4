from __future__ import annotations

import demucs.demucs
import demucs.hdemucs
import demucs.transformer
import pytest
import torch
from torch import nn

from demucs_infer.demucs import rescale_module
from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import pad1d
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
