"""Released architectures at their full size, and bags of narrow ones, with random weights."""

from __future__ import annotations

import demucs.apply
import pytest
import torch

from demucs_infer.apply import BagOfModels, apply_model
from demucs_infer.engine.cpu import fast_copy
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.hub.registry import bags, is_community

from .helpers import RELEASED, assert_close, noise, released_pair

PARAMETERS = {  # in millions
    "955717e8": 42.0,
    "5c90dfd2": 27.4,
    "75fc33f5": 83.6,
    "a1d90b5c": 83.6,
    "5d2d6c55": 83.6,
    "c511e2ab": 83.6,
    "7d865c68": 83.9,
    "0d19c1c6": 89.0,
}
QUICK, WHOLE = "0d19c1c6", "955717e8"
# The models of the others have the same architectures, and their weights come from diffq.
BAGS = [name for name, bag in bags().items() if set(bag["models"]) <= set(RELEASED)]


@pytest.mark.parametrize(
    "signature",
    [pytest.param(s, marks=() if s == QUICK else pytest.mark.slow) for s in PARAMETERS],
)
def test_released_architectures_equal_the_reference(signature: str) -> None:
    """The plain network and the fast copy. `WHOLE` runs a window of the released length."""
    # HTDemucs pads windows to its segment, which has no weights.
    changes = {"segment": 1} if RELEASED[signature][0] is HTDemucs and signature != WHOLE else {}
    theirs, ours = released_pair(signature, **changes)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert round(count / 1e6, 1) == PARAMETERS[signature]
    mix = noise(2, 343_980 if signature == WHOLE else 40_001)[None]
    with torch.no_grad():
        expected = theirs(mix)
        assert_close(ours(mix), expected)
        assert_close(fast_copy(ours)(mix), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", BAGS)
def test_released_bags_equal_the_reference(name: str) -> None:
    bag = bags()[name]
    narrow: dict[str, object] = {"channels": 16}
    if RELEASED[bag["models"][0]][0] is HTDemucs:
        narrow |= {"segment": 1, "bottom_channels": 64}
    pairs = {signature: released_pair(signature, **narrow) for signature in set(bag["models"])}
    theirs, ours = zip(*(pairs[signature] for signature in bag["models"]))
    rest = (bag.get("weights"), bag.get("segment"))
    mix = noise(2, 50_000)[None]  # two windows of HTDemucs
    expected = demucs.apply.apply_model(demucs.apply.BagOfModels([*theirs], *rest), mix, shifts=0)
    assert_close(apply_model(BagOfModels(ours, *rest), mix, shifts=0), expected)
    assert [model.segment for model in ours] == [pairs[s][1].segment for s in bag["models"]]


def test_every_bag_has_been_tried() -> None:
    assert {*BAGS, "mdx_q", "mdx_extra_q"} == {name for name in bags() if not is_community(name)}
