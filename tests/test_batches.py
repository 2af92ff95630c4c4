from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.apply import BagOfModels, apply_model
from demucs_infer.engine.model import BatchRunner
from demucs_infer.errors import OptionError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import TINY, assert_close, noise, pair

# An HDemucs without LSTM.
OTHER = {"channels": 8, "segment": 0.4, "samplerate": 8000, "nfft": 1024, "depth": 4}


class Counting(nn.Module):
    """A wrapper that records batch sizes; more windows than `capacity` are out of memory."""

    def __init__(self, model: nn.Module, capacity: int = 1000) -> None:
        super().__init__()
        self.inner, self.capacity, self.sizes = model, capacity, []
        for name in "sources samplerate audio_channels segment valid_length consume_random".split():
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, mix: Tensor) -> Tensor:
        self.sizes.append(len(mix))
        if len(mix) > self.capacity:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.inner(mix)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return pair(HTDemucs, **TINY)[1]


@pytest.mark.parametrize("options", [{"shifts": 2, "seed": 1}, {"num_workers": 2}], ids=str)
def test_batches_equal_single_windows(model: nn.Module, options: dict) -> None:
    mix = torch.stack([noise(2, 10_000, seed) for seed in range(2)])
    options = {"shifts": 0, **options}
    other = pair(HDemucs, 1, sources=model.sources, **OTHER)[1]
    bag = BagOfModels([model, other])
    expected = torch.cat([apply_model(bag, track[None], **options) for track in mix])
    counting = BagOfModels([Counting(member) for member in bag.models])
    assert_close(apply_model(counting, mix, batch_size=3, **options), expected, 2e-6)
    for member in counting.models:
        assert max(member.sizes) == 6  # three windows of two tracks


def test_batches_out_of_memory_are_halved(model: nn.Module) -> None:
    mix = noise(2, 40_000)[None]
    counting = Counting(model, capacity=2)
    events: list[tuple[Any, Any]] = []

    def callback(event: dict[str, Any]) -> None:
        events.append((event["segment_offset"], event["state"]))

    out = apply_model(counting, mix, shifts=0, batch_size=8, callback=callback)
    assert_close(out, apply_model(model, mix, shifts=0), 2e-6)
    assert counting.sizes[:4] == [8, 4, 2, 2]
    # The second half of the first eight windows is still tried at once, larger batches never again.
    assert max(counting.sizes[4:]) == 4
    assert set(counting.sizes[7:]) <= {1, 2}
    starts = [offset for offset, state in events if state == "start"]
    assert starts == [offset for offset, state in events if state == "end"] == sorted(set(starts))


def test_single_window_out_of_memory_is_an_error(model: nn.Module) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        apply_model(Counting(model, capacity=0), noise(2, 9000)[None], batch_size=4)


def test_first_window_determines_the_batch_size(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with 1000 free bytes, where a window takes 100."""
    fakes = {
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 50,
        "max_memory_allocated": lambda device: 150,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (1000, 5000),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(BatchRunner, "_run", lambda self, model, windows, stems: windows)
    batches = BatchRunner(torch.device("cuda"))
    assert (batches.size, batches.most) == (1, 32)
    batches.run(model, [torch.zeros(1, 2, 4)], [0])
    assert (batches.size, batches.most) == (8, 8)


def test_batch_size_is_at_least_one(model: nn.Module) -> None:
    with pytest.raises(OptionError, match="batch_size=0"):
        apply_model(model, noise(2, 9000)[None], batch_size=0)
    assert BatchRunner(torch.device("cpu")).size == 1
