from __future__ import annotations

import random
from pathlib import Path

import demucs.api
import demucs.htdemucs
import pytest
import soundfile
import torch
import yaml

from demucs_infer.api import LoadAudioError, LoadModelError, Separator
from demucs_infer.engine.backends import pytorch
from demucs_infer.errors import OptionError
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.hub.registry import bags

from .helpers import SOURCES, TINY, assert_close, noise, save_package, shake


@pytest.fixture(scope="module")
def separator(repo: Path) -> Separator:
    return Separator("tiny", repo, device="cpu", shifts=0)


@pytest.mark.parametrize("model", ["tiny", "pair"])
@pytest.mark.parametrize("rate", [8000, 11_025, None])
def test_tensors_as_by_the_reference(repo: Path, model: str, rate: int | None) -> None:
    wav, results = noise(2, 10_000) + 0.1, []
    for package in (demucs.api, None):
        kind = package.Separator if package else Separator
        random.seed(5)
        separator = kind(model=model, repo=repo, device="cpu", shifts=2, overlap=0.4)
        results.append(separator.separate_tensor(wav.clone(), rate))
    (their_mix, theirs), (our_mix, ours) = results
    assert_close(our_mix, their_mix)
    assert list(ours) == list(theirs) == SOURCES
    for name in theirs:
        assert_close(ours[name], theirs[name])


def test_files_as_by_the_reference(repo: Path, track: Path) -> None:
    results = []
    for kind in (demucs.api.Separator, Separator):
        separator = kind(model="tiny", repo=repo, device="cpu", shifts=0)
        results.append(separator.separate_audio_file(track))
    for name, theirs in results[0][1].items():
        assert_close(results[1][1][name], theirs)


def test_mono_is_repeated(separator: Separator) -> None:
    wav = noise(1, 5000)
    mixture, stems = separator.separate_tensor(wav)
    assert torch.equal(mixture, wav.expand(2, -1))
    _, stereo = separator.separate_tensor(mixture)
    assert torch.equal(stems["bass"], stereo["bass"])


def test_the_input_is_left_alone(separator: Separator) -> None:
    wav = noise(2, 5000)
    before = wav.clone()
    separator.separate_tensor(wav)
    assert torch.equal(wav, before)


@pytest.mark.parametrize("length", [1, 2, 4000, 9000])
def test_silence_gives_silence(separator: Separator, length: int) -> None:
    for stem in separator.separate_tensor(torch.zeros(2, length))[1].values():
        assert torch.equal(stem, torch.zeros(2, length))


@pytest.mark.parametrize(
    "wav",
    [
        torch.full((2, 1), 0.5),
        torch.full((2, 5000), 0.5),
        torch.tensor([[1.0], [-1.0]]).expand(-1, 5000),
        torch.full((2, 5000), 1e-30),
        torch.full((2, 5000), 1e6),
    ],
    ids=["one sample", "constant", "opposite", "tiny", "huge"],
)
def test_no_input_gives_nan(separator: Separator, wav: torch.Tensor) -> None:
    for stem in separator.separate_tensor(wav)[1].values():
        assert stem.isfinite().all()


def test_a_constant_is_part_of_each_stem(separator: Separator) -> None:
    for stem in separator.separate_tensor(torch.full((2, 5000), 0.5))[1].values():
        assert (stem - 0.5).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (torch.full((2, 10), torch.nan), "not finite"),
        (torch.full((2, 10), torch.inf), "not finite"),
        (torch.full((2, 10), 1e10), "louder"),
        (torch.zeros(2, 0), "not empty"),
        (torch.zeros(2, 2, 10), r"\[2, 2, 10\]"),
        (torch.zeros(2, 10, dtype=torch.bool), "bool"),
    ],
)
def test_tensors_that_are_refused(separator: Separator, wav: torch.Tensor, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        separator.separate_tensor(wav)


def test_a_file_with_nan_is_refused(separator: Separator, tmp_path: Path) -> None:
    wav = noise(2, 1000)
    wav[0, 5] = torch.nan
    soundfile.write(tmp_path / "nan.wav", wav.T.numpy(), 8000, subtype="FLOAT")
    with pytest.raises(LoadAudioError, match="not finite"):
        separator.separate_audio_file(tmp_path / "nan.wav")
    with pytest.raises(LoadAudioError, match="no such file"):
        separator.separate_audio_file(tmp_path / "none.wav")


def test_properties(separator: Separator) -> None:
    assert (separator.samplerate, separator.audio_channels) == (8000, 2)
    assert separator.model.sources == SOURCES


def test_update_parameter(repo: Path) -> None:
    calls: list[dict] = []
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    separator.update_parameter(callback=calls.append, segment=0.25, overlap=0.5)
    separator.separate_tensor(noise(2, 4000))
    assert [call["segment_offset"] for call in calls[::2]] == [0, 1000, 2000, 3000]
    assert {call["audio_length"] for call in calls} == {4000}
    separator.update_parameter(callback=None, segment=None)
    separator.separate_tensor(noise(2, 4000))
    assert len(calls) == 8
    with pytest.raises(OptionError, match=r"longer than the 0\.5 s"):
        separator.update_parameter(segment=0.6)
    with pytest.raises(OptionError, match="overlap=2"):
        separator.update_parameter(overlap=2)
    separator.separate_tensor(noise(2, 4000))


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": 1},
        {"shifts": -1},
        {"segment": 0},
        {"segment": 0.6},
        {"jobs": -1},
        {"device": "gpu"},
        {"device": "cuda:99"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["tiny", "pair"])
def test_options_are_checked_when_a_separator_is_made(
    repo: Path, model: str, options: dict
) -> None:
    with pytest.raises(OptionError, match=str(next(iter(options.values())))):
        Separator(model, repo, **{"device": "cpu", **options})


def test_unknown_models(repo: Path) -> None:
    with pytest.raises(LoadModelError, match="tinny"):
        Separator("tinny", repo)


def test_only_some_stems(repo: Path) -> None:
    wav = noise(2, 9000)
    every = Separator("tiny", repo, device="cpu", shifts=0).separate_tensor(wav)[1]
    separator = Separator("tiny", repo, device="cpu", shifts=0, stems=["vocals"])
    ((name, stem),) = separator.separate_tensor(wav)[1].items()
    assert name == "vocals"
    assert_close(stem, every["vocals"], 1e-6)
    separator.update_parameter(stems=None)
    assert list(separator.separate_tensor(wav)[1]) == SOURCES
    with pytest.raises(OptionError, match="'voice'"):
        separator.update_parameter(stems=["voice"])
    with pytest.raises(OptionError, match="'voice'"):
        Separator("tiny", repo, stems=["voice"])


def test_one_stem_of_htdemucs_ft_runs_a_quarter_of_the_windows(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag = bags()["htdemucs_ft"]
    for signature in bag["models"]:
        torch.manual_seed(int(signature[:4], 16))
        save_package(tmp_path / f"{signature}.th", shake(demucs.htdemucs.HTDemucs(**TINY)))
    (tmp_path / "ft.yaml").write_text(yaml.safe_dump(bag))
    runs: list[object] = []
    monkeypatch.setattr(
        HTDemucs,
        "network",
        lambda *args, run=HTDemucs.network, **more: runs.append(1) or run(*args, **more),
    )
    wav, counts, drums = noise(2, 15_000), [], []
    for stems in (None, ["drums"]):
        separator = Separator("ft", tmp_path, device="cpu", shifts=0, stems=stems)
        runs.clear()  # of loading, which plans a window
        drums.append(separator.separate_tensor(wav)[1]["drums"])
        counts.append(len(runs))
    assert counts[0] == 4 * counts[1]
    assert torch.equal(*drums)


def test_precision_and_engine_are_options(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for wrong in ({"precision": "float16"}, {"engine": "abacus"}, {"batch_size": 0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            separator.update_parameter(**wrong)
        with pytest.raises(OptionError, match=next(iter(wrong))):
            Separator("tiny", repo=repo, device="cpu", **wrong)


def test_openvino_is_a_device_too(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    mix = noise(2, 6000)
    exact = Separator("tiny", repo=repo, device="cpu", shifts=0).separate_tensor(mix).stems
    separator = Separator("tiny", repo=repo, device="openvino", shifts=0, cache_dir=tmp_path)
    for name, stem in separator.separate_tensor(mix).stems.items():
        assert (stem - exact[name]).abs().max() <= 1e-5 * exact[name].abs().max()
    assert list((tmp_path / "openvino").glob("*-float32.blob"))
    with pytest.raises(OptionError, match="no device 'QPU'"):
        Separator("tiny", repo=repo, device="openvino:QPU")
