"""`Separator` for programs, beside the one of the reference."""

from __future__ import annotations

import io
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import demucs.api
import numpy as np
import pytest
import torch

from demucs_infer import resample
from demucs_infer.api import LoadAudioError, Separator
from demucs_infer.audio import AudioFile
from demucs_infer.engine.backends import pytorch
from demucs_infer.errors import OptionError

from .helpers import SOURCES, assert_close, noise


@pytest.mark.parametrize(("model", "rate"), [("tiny", 8000), ("tiny", 11_025), ("pair", None)])
def test_tensors_are_separated_as_in_the_reference(
    repo: Path, model: str, rate: int | None
) -> None:
    wav, results = noise(2, 6000) + 0.1, []
    for kind in (demucs.api.Separator, Separator):
        random.seed(5)
        separator = kind(model=model, repo=repo, device="cpu", shifts=2, overlap=0.4)
        results.append(separator.separate_tensor(wav.clone(), rate))
    (their_mix, theirs), (our_mix, ours) = results
    assert_close(our_mix, their_mix)
    assert list(ours) == list(theirs) == SOURCES
    for name in theirs:
        assert_close(ours[name], theirs[name])


def test_files_are_separated_as_in_the_reference(
    separator: Separator, fast_repo: Path, track: Path
) -> None:
    reference = demucs.api.Separator(model="tiny", repo=fast_repo, device="cpu", shifts=0)
    ours = separator.separate_audio_file(track)[1]
    for name, theirs in reference.separate_audio_file(track)[1].items():
        assert_close(ours[name], theirs)
    with track.open("rb") as file:
        for given in (os.fsencode(track), io.BytesIO(track.read_bytes()), file):
            for name, stem in separator.separate_audio_file(given)[1].items():
                assert torch.equal(stem, ours[name])
    with track.open("r", encoding="latin-1") as text, pytest.raises(LoadAudioError, match="binary"):
        separator.separate_audio_file(text)
    with pytest.raises(LoadAudioError, match=r"none\.wav: no such file"):
        separator.separate_audio_file("none.wav")
    assert (separator.samplerate, separator.audio_channels) == (8000, 2)
    with Separator("tiny", fast_repo, device="auto") as other:
        assert other.model is not None
    assert other.model is None  # when it is closed


def test_mono_is_repeated(separator: Separator) -> None:
    wav = noise(1, 5000)
    mixture, stems = separator.separate_tensor(wav)
    assert torch.equal(mixture, wav.expand(2, -1))
    for other in (mixture, wav[0]):
        assert torch.equal(stems["bass"], separator.separate_tensor(other)[1]["bass"])


def test_samples_of_every_type_and_layout_are_taken_and_left_alone(separator: Separator) -> None:
    wav = noise(2, 5000)
    expected = separator.separate_tensor(wav).stems["bass"]
    integers = (wav * 32767).short()
    forms: dict[str, Any] = {
        "float64": wav.double(),
        "numpy": wav.numpy(),
        "numpy, by columns": np.asfortranarray(wav.numpy().astype(">f8")),
        "backwards and back": wav.flip(1).numpy()[:, ::-1],
        "not contiguous": wav.t().contiguous().t(),
        "int16": integers,
        "int32": integers.int() * 65_538,
    }
    for form, samples in forms.items():
        before = samples.copy() if isinstance(samples, np.ndarray) else samples.clone()
        origin, stems = separator.separate_tensor(samples)
        assert origin.dtype == stems["bass"].dtype == torch.float32
        assert_close(stems["bass"], expected, 3e-3 if "int" in form else 1e-6)
        assert (before == samples).all(), form


@pytest.mark.parametrize(
    "wav",
    [
        torch.full((2, 5000), 0.5),
        torch.tensor([[1.0], [-1.0]]).expand(-1, 5000),
        torch.full((2, 5000), 1e-30),
        torch.full((2, 5000), 1e6),
        torch.zeros(2, 1),
    ],
    ids=["constant", "opposite", "tiny", "huge", "one zero"],
)
def test_silence_stays_silent_and_a_constant_is_in_each_stem(repo: Path, wav: torch.Tensor) -> None:
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    for stem in separator.separate_tensor(wav)[1].values():
        assert stem.isfinite().all()
        if not wav.any():
            assert torch.equal(stem, wav)
        elif torch.equal(wav, torch.full((2, 5000), 0.5)):
            assert (stem - 0.5).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (torch.full((2, 10), torch.nan), "finite"),
        (torch.full((2, 10), torch.inf), "finite"),
        (torch.full((2, 10), 1e10), "loud"),
        (torch.zeros(2, 0), "empty"),
        (torch.zeros(2, 2, 10), r"\[2, 2, 10\]"),
        (torch.zeros(2, 10, dtype=torch.bool), "bool"),
    ],
)
def test_wrong_tensors_are_refused(separator: Separator, wav: torch.Tensor, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        separator.separate_tensor(wav)


def test_update_parameter_changes_the_next_calls(repo: Path) -> None:
    calls: list[dict] = []
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    separator.update_parameter(callback=calls.append, segment=0.25, overlap=0.5)
    separator.separate_tensor(noise(2, 4000))
    assert [call["segment_offset"] for call in calls[::2]] == [0, 1000, 2000, 3000]
    assert {call["audio_length"] for call in calls} == {4000}
    separator.update_parameter(callback=None, segment=None)
    separator.separate_tensor(noise(2, 4000))
    assert len(calls) == 8
    separator.update_parameter(stems=["vocals"])
    assert list(separator.separate_tensor(noise(2, 4000)).stems) == ["vocals"]
    separator.update_parameter(stems=None)
    assert list(separator.separate_tensor(noise(2, 4000)).stems) == SOURCES


def test_options_are_checked_when_they_are_set(repo: Path) -> None:
    separator = Separator("pair", repo, device="cpu")
    for options in (
        {"overlap": 1},
        {"shifts": -1},
        {"segment": 0},
        {"segment": 0.6},
        {"jobs": -1},
        {"device": "gpu"},
        {"device": "cuda:99"},
        {"stems": ["voice"]},
        {"precision": "float16"},
        {"engine": "abacus"},
        {"batch_size": 0},
    ):
        (value,) = options.values()
        word = value[0] if isinstance(value, list) else str(value)
        for change in (separator.update_parameter, partial(Separator, "pair", repo)):
            with pytest.raises(OptionError, match=word):
                change(**{"device": "cpu", **options})
    separator.separate_tensor(noise(2, 4000))


def test_precision_is_an_option(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "why_no_bfloat16", lambda: None)  # whatever the processor has
    mix = noise(2, 6000)
    separator = Separator("tiny", repo=repo, device="cpu", shifts=0)
    exact = separator.separate_tensor(mix).stems["vocals"]
    separator.update_parameter(precision="bfloat16", batch_size=2)
    half = separator.separate_tensor(mix).stems["vocals"]
    error = (half - exact).square().mean() / exact.square().mean()
    assert 0 < error < 1e-4
    separator.update_parameter(precision="float32")
    again = separator.separate_tensor(mix).stems["vocals"]
    assert (again - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.slow
def test_openvino_is_a_device(repo: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    mix = noise(2, 6000)
    exact = Separator("tiny", repo=repo, device="cpu", shifts=0).separate_tensor(mix).stems
    separator = Separator("tiny", repo=repo, device="openvino", shifts=0, cache_dir=tmp_path)
    for name, stem in separator.separate_tensor(mix).stems.items():
        assert (stem - exact[name]).abs().max() <= 1e-5 * exact[name].abs().max()
    assert list((tmp_path / "openvino").glob("*-float32.blob"))
    with pytest.raises(OptionError, match="QPU"):
        Separator("tiny", repo=repo, device="openvino:QPU")


@pytest.mark.parametrize("default", ["meta", torch.bfloat16], ids=str)
def test_defaults_of_the_caller_change_no_stem(
    default: str | torch.dtype, fast_repo: Path, track: Path, tmp_path: Path
) -> None:
    separator = Separator("tiny", fast_repo, device="cpu", shifts=0)
    expected = separator.separate_audio_file(track).stems
    resample._filters.cache_clear()  # so that they are made under the caller's defaults
    dtype = torch.get_default_dtype()
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        separator = Separator("tiny", fast_repo, device="cpu", shifts=0)
        stems = separator.separate_audio_file(track).stems
        separator.separate_to_files(track, tmp_path / "out", keep_rate=True, format="flac")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
        resample._filters.cache_clear()
    assert all(torch.equal(stems[name], expected[name]) for name in expected)
    for path in (tmp_path / "out").rglob("*.flac"):
        assert AudioFile(path).read().shape[-1] == 96_000
    assert len(list((tmp_path / "out").rglob("*.flac"))) == len(expected)
