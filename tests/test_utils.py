from __future__ import annotations

import demucs.utils
import pytest
import torch

from demucs_infer.utils import capture_init, center_trim, pick_sources, standardize, unfold


def test_center_trim_cuts_an_odd_sample_at_the_end() -> None:
    x = torch.arange(7)
    assert center_trim(x, 4).tolist() == [1, 2, 3, 4]
    assert center_trim(x, torch.zeros(3, 7)).tolist() == x.tolist()
    with pytest.raises(ValueError, match="7 samples to 8"):
        center_trim(x, 8)


@pytest.mark.parametrize("length", [1, 4, 13])
def test_unfold_equals_the_reference(length: int) -> None:
    x = torch.randn(2, 3, length)
    assert torch.equal(unfold(x, 6, 4), demucs.utils.unfold(x, 6, 4))


def test_single_value_is_standardized_to_zero() -> None:
    x, mean, std = standardize(torch.full((1, 1, 1), 5.0), 1e-5)
    assert (x.item(), mean.item(), std.item()) == (0, 5, 0)


def test_capture_init_keeps_the_arguments() -> None:
    class Thing:
        @capture_init
        def __init__(self, a: int, b: int = 2) -> None:
            self.total = a + b

    thing = Thing(1, b=4)
    assert thing.total == 5
    assert thing._init_args_kwargs == ((1,), {"b": 4})


def test_all_sources_are_not_copied() -> None:
    x = torch.arange(12.0).reshape(1, 4, 3)
    assert pick_sources(x, None) is x
    assert pick_sources(x, [0, 1, 2, 3]) is x
    assert pick_sources(x, (3, 1)).tolist() == [[[9, 10, 11], [3, 4, 5]]]
