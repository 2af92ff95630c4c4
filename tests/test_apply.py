from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import demucs.apply
import demucs.demucs
import demucs.hdemucs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from demucs_infer.apply import (
    BagOfModels,
    SeparationOptions,
    TensorChunk,
    apply_model,
    separate_blocks,
    tensor_chunk,
)
from demucs_infer.demucs import Demucs
from demucs_infer.errors import DemucsInferError, ModelLoadingError, OptionError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import FAMILIES, SMALL, TINY, assert_close, noise, pair

# A part of a window, a window and one sample, and several windows and a rest.
LENGTHS = [1, 4001, 9011]
HDEMUCS = {**SMALL, "nfft": 1024, "depth": 5, "dconv_lstm": 9}
TIME_DOMAIN = {**SMALL, "sources": ["a", "b"], "depth": 5, "segment": 0.7}


class Identity(nn.Module):
    """A model whose sources are the mixture."""

    sources = ("a", "b")
    samplerate = 1000
    audio_channels = 2
    segment = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, mix: Tensor) -> Tensor:
        self.calls += 1
        return mix[:, None].expand(-1, 2, -1, -1)


def seeded(function, *args, **kwargs):
    """Return the result, and the state of the random generator after it."""
    random.seed(3)
    return function(*args, **kwargs), random.getstate()


@pytest.fixture(scope="module")
def tiny():
    return pair(HTDemucs, **TINY)


@pytest.fixture(scope="module")
def time_domain():
    return pair(Demucs, **TIME_DOMAIN)


@pytest.fixture(scope="module")
def bags(tiny):
    """Bags of the reference and ours, with weights and a segment that only HDemucs can use."""
    theirs, ours = pair(HDemucs, **{**HDEMUCS, "segment": 2})
    weights = [[1, 0, 2, 1], [1, 1, 1, 0], [0.5, 0.5, 0, 1]]
    members = [tiny[0], theirs, tiny[0]]
    return (
        demucs.apply.BagOfModels(members, weights, 0.6),
        BagOfModels([tiny[1], ours, tiny[1]], weights, 0.6),
    )


@pytest.mark.parametrize("which", ["tiny", "time_domain", "bags"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "options",
    [
        {"shifts": 0},
        {"shifts": 2, "overlap": 0.4},
        {"segment": 0.3, "transition_power": 2.0},
        {"num_workers": 2},
    ],
    ids=str,
)
def test_same_stems_as_the_reference_under_the_same_seed(which, length, options, request) -> None:
    theirs, ours = request.getfixturevalue(which)
    mix = torch.stack([noise(2, length, seed) for seed in range(2)])
    if which == "time_domain" and length == 1:
        pytest.skip("the deviation of one sample makes the reference's result NaN")
    # The reference's LSTM is not safe for threads, whose number does not change the result.
    alone = {**options, "num_workers": 0}
    expected, state = seeded(demucs.apply.apply_model, theirs, mix, **alone)
    actual, our_state = seeded(apply_model, ours, mix, **options)
    assert_close(actual, expected)
    assert our_state == state


@pytest.mark.parametrize("length", [1, 4000])
def test_one_window_without_split_equals_the_reference(tiny, length: int) -> None:
    mix = noise(2, length)[None]
    for options in ({"shifts": 0}, {"shifts": 0, "segment": 0.5}):
        expected = demucs.apply.apply_model(tiny[0], mix, split=False, **options)
        assert_close(apply_model(tiny[1], mix, split=False, **options), expected)


@settings(max_examples=25, deadline=None)
@given(
    length=st.one_of(st.integers(1, 4000), st.sampled_from([999, 1000, 1001])),
    overlap=st.floats(0, 0.95),
    shifts=st.integers(0, 3),
    segment=st.floats(0.05, 3),
    power=st.floats(1, 20),
)
def test_identity_model_returns_its_input_with_any_options(
    length, overlap, shifts, segment, power
) -> None:
    mix = noise(2, length)[None]
    options = SeparationOptions(shifts=shifts, overlap=overlap, segment=segment)
    for in_lockstep in (False, True):
        bag = BagOfModels([Identity(), Identity()], [[1, 3], [1, 0]])
        how = {"in_lockstep": in_lockstep, "transition_power": power}
        blocks = separate_blocks(bag, tensor_chunk(mix), options=options, **how)
        assert (torch.cat(list(blocks), -1) - mix[:, None]).abs().max() <= 1e-6


class Recorder:
    """A silent track that records the ranges that are read."""

    length = 5000

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> Tensor:
        self.reads.append((start, stop))
        return torch.zeros(1, 2, stop - start)


def test_track_is_read_and_its_stems_are_yielded_window_by_window() -> None:
    model, source = Identity(), Recorder()
    sizes, calls, ends = [], [], []
    for block in separate_blocks(model, source, options=SeparationOptions(shifts=2)):
        sizes.append(block.shape[-1])
        calls.append(model.calls)
        ends.append(max(stop for _, stop in source.reads))
    assert sum(sizes) == 5000
    assert max(sizes) <= 1000
    assert calls[0] <= 4 < calls[-1] == model.calls
    assert ends[0] <= 3000
    starts = [start for start, _ in source.reads]
    assert starts == sorted(starts)


@pytest.mark.parametrize("which", ["tiny", "bags"])
@pytest.mark.parametrize("options", [{"shifts": 2}, {"shifts": 0}], ids=str)
def test_callback_is_called_as_by_the_reference(which, options, request) -> None:
    theirs, ours = request.getfixturevalue(which)
    mix, expected, actual = noise(2, 9000)[None], [], []
    seeded(demucs.apply.apply_model, theirs, mix, callback=expected.append, **options)
    arguments = {"callback": actual.append, "callback_arg": {"mine": 1}}
    seeded(apply_model, ours, mix, **arguments, **options)
    extra = {"audio_length": 9000, "mine": 1}
    assert actual == [{**call, **extra} for call in expected]


@pytest.mark.parametrize("workers", [0, 3])
def test_raising_in_the_callback_stops_the_separation(workers: int) -> None:
    model, seen = Identity(), []

    def stop_at_third(info: dict) -> None:
        seen.append(info)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_model(model, noise(2, 9000)[None], num_workers=workers, callback=stop_at_third)
    assert len(seen) == 3
    assert model.calls <= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_exceptions_of_a_model_reach_the_caller(workers: int) -> None:
    model = Identity()
    model.forward = mock.Mock(side_effect=RuntimeError("the model failed"))
    with pytest.raises(RuntimeError, match="model failed"):
        apply_model(model, noise(2, 5000)[None], num_workers=workers)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_that_share_a_model_get_identical_stems(family: str) -> None:
    model_class, options = FAMILIES[family]
    model = pair(model_class, **options)[1]
    mixes = [noise(2, 6000, seed)[None] for seed in range(4)]
    alone = [apply_model(model, mix, shifts=0) for mix in mixes]
    start = threading.Barrier(4)

    def separated(mix: Tensor) -> Tensor:
        start.wait(60)
        return apply_model(model, mix, shifts=0)

    with ThreadPoolExecutor(4) as pool:
        for together, expected in zip(pool.map(separated, mixes), alone):
            assert torch.equal(together, expected)
        in_pool = apply_model(model, mixes[0], shifts=0, pool=pool)
    assert torch.equal(in_pool, alone[0])
    assert torch.equal(apply_model(model, mixes[0], shifts=0, num_workers=4), alone[0])


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": 1},
        {"overlap": -0.1},
        {"shifts": -1},
        {"shifts": 1.5},
        {"segment": 0},
        {"segment": 0.6},
        {"transition_power": 0.5},
        {"overlap": 0.9999999},
        {"split": False},
    ],
    ids=str,
)
def test_error_about_an_option_has_its_value(tiny, options: dict) -> None:
    (name, value), *_ = options.items()
    wanted = "longer than the model" if name == "split" else str(value)
    with pytest.raises(OptionError, match=wanted):
        apply_model(tiny[1], noise(2, 5000)[None], **options)


@pytest.mark.parametrize(
    "mix",
    [
        torch.zeros(2, 100),
        torch.zeros(1, 1, 100),
        torch.zeros(1, 2, 100, dtype=torch.int16),
        torch.full((1, 2, 100), torch.nan),
        torch.full((1, 2, 100), torch.inf),
    ],
)
def test_invalid_mixtures_are_rejected(mix: Tensor) -> None:
    with pytest.raises(OptionError):
        apply_model(Identity(), mix)


def test_stems_that_are_not_finite_are_an_error() -> None:
    model = HTDemucs(**TINY).eval()
    for parameter in model.decoder[-1].parameters():
        parameter.data.fill_(1e38)
    with pytest.raises(DemucsInferError, match="gives values that are not finite"):
        apply_model(model, noise(2, 4000)[None], shifts=0)


def test_an_empty_mixture_gives_empty_stems() -> None:
    assert apply_model(Identity(), torch.zeros(1, 2, 0)).shape == (1, 2, 2, 0)


def test_bag_rejects_invalid_members_and_changes_none(tiny) -> None:
    model, other = tiny[1], Identity()
    with pytest.raises(ModelLoadingError, match="sources"):
        BagOfModels([model, other])
    with pytest.raises(ModelLoadingError, match="at least one"):
        BagOfModels([])
    nan = float("nan")
    for weights in ([[1, 1]], [[1, 1, 1, 1]], [[0, 0], [0, 1]], [[1, nan]] * 2, 3, [["x", 1]] * 2):
        with pytest.raises(ModelLoadingError, match="weights"):
            BagOfModels([other, other], weights)
    for segment in (0, -1, float("nan"), "10"):
        with pytest.raises(ModelLoadingError, match="segment"):
            BagOfModels([other], segment=segment)
    bag = BagOfModels([other], segment=0.25)
    assert (bag.segment, other.segment) == (0.25, 1.0)
    assert bag.max_allowed_segment == float("inf")
    assert BagOfModels([model], segment=9).max_allowed_segment == 0.5


def test_tensor_chunk_pads_with_its_surroundings() -> None:
    chunk = TensorChunk(torch.arange(10.0), offset=3, length=4)
    assert chunk.shape == (4,)
    assert chunk.padded(7).tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert TensorChunk(chunk, 1).padded(3).tolist() == [4, 5, 6]
    assert tensor_chunk(torch.ones(2)).padded(5).tolist() == [0, 1, 1, 0, 0]
    assert tensor_chunk(chunk) is chunk
    assert chunk.read(20, 22).tolist() == chunk.read(-9, -7).tolist() == [0, 0]
    with pytest.raises(OptionError):
        TensorChunk(torch.ones(2), offset=3)


def test_separation_of_a_chunk_equals_the_reference(tiny) -> None:
    mix = noise(2, 9000)[None]
    expected = demucs.apply.apply_model(
        tiny[0], demucs.apply.TensorChunk(mix, 1000, 5000), shifts=0
    )
    assert_close(apply_model(tiny[1], TensorChunk(mix, 1000, 5000), shifts=0), expected)


FT_WEIGHTS = [[float(row == column) for column in range(4)] for row in range(4)]


class FourStems(Identity):
    """A model with a gain for each of four sources."""

    sources = ("drums", "bass", "other", "vocals")

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, mix: Tensor) -> Tensor:
        self.calls += 1
        return self.gain * mix[:, None] * torch.arange(1, 5).view(1, 4, 1, 1)


@pytest.mark.parametrize("stem", [0, 3])
def test_one_stem_of_a_bag_runs_one_model_with_the_same_result(stem: int) -> None:
    models = [FourStems(gain) for gain in (0.5, 1, 2, 3)]
    bag = BagOfModels(models, FT_WEIGHTS)
    mix = noise(2, 5000)[None]
    everything, state = seeded(apply_model, bag, mix, shifts=2)
    runs = [model.calls for model in models]
    name = bag.sources[stem]
    one, one_state = seeded(apply_model, bag, mix, shifts=2, stems=[name])
    assert torch.equal(one, everything[:, [stem]])
    assert one_state == state
    again = [model.calls - before for model, before in zip(models, runs)]
    assert again == [runs[i] if i == stem else 0 for i in range(4)]


def test_selected_stems_equal_those_of_all(tiny, bags) -> None:
    mix = noise(2, 9000)[None]
    for model in (tiny[1], bags[1]):
        everything, _ = seeded(apply_model, model, mix)
        some, _ = seeded(apply_model, model, mix, stems=["vocals", "bass"])
        assert_close(some, everything[:, [3, 1]], 1e-6)
    with pytest.raises(OptionError, match="'voice': choose among drums"):
        apply_model(tiny[1], mix, stems=["voice"])
