from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.apply import BagOfModels, apply_model
from demucs_infer.demucs import Demucs
from demucs_infer.engine.backends import EngineOptions, on_engine, pytorch
from demucs_infer.errors import MissingDependencyError, OptionError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs

from .helpers import SOURCES, TINY, assert_close, noise, pair

SMALL = {"sources": SOURCES, "channels": 8, "samplerate": 8000, "segment": 0.5}
FAMILIES = {
    "htdemucs": (HTDemucs, TINY),
    "hdemucs": (HDemucs, {**SMALL, "nfft": 1024, "depth": 4, "dconv_lstm": 3, "dconv_attn": 3}),
    "bands": (HDemucs, {**SMALL, "nfft": 1024, "multi_freqs": [0.3], "dconv_mode": 3}),
    "demucs": (Demucs, {**SMALL, "depth": 4, "dconv_lstm": 3, "dconv_attn": 3}),
}
# Family, engine, precision, and decibels that the error must lie below the signal.
FLOORS = [
    ("htdemucs", "torch", "bfloat16", 40),
    ("hdemucs", "torch", "bfloat16", 40),
    ("bands", "torch", "bfloat16", 35),
    ("demucs", "torch", "bfloat16", 40),
    ("htdemucs", "openvino", "float32", 75),
    ("htdemucs", "openvino", "bfloat16", 40),
    ("demucs", "openvino", "float32", 75),
]


def decibels(ours: Tensor, theirs: Tensor) -> float:
    """How far the difference lies below the signal."""
    return float(10 * torch.log10(theirs.square().mean() / (ours - theirs).square().mean()))


@pytest.mark.parametrize(("family", "engine", "precision", "floor"), FLOORS)
def test_engines_and_precisions_stay_above_their_floors(
    family: str, engine: str, precision: str, floor: float
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    model_class, options = FAMILIES[family]
    theirs, ours = pair(model_class, **options)
    mix = noise(2, 4000)[None]
    model = on_engine(ours, EngineOptions(engine=engine, precision=precision))
    with torch.no_grad():
        expected, out = theirs(mix), model(mix, [2, 0])
        assert_close(ours(mix), expected)  # what was given is as it was
    assert out.dtype == torch.float32
    assert floor < decibels(out, expected[:, [2, 0]]) < 160


def test_a_bag_runs_on_an_engine() -> None:
    _, ours = pair(HTDemucs, **TINY)
    bag = BagOfModels([ours, ours], [[1, 1, 0, 1], [0, 1, 1, 1]], segment=0.25)
    half = on_engine(bag, EngineOptions(precision="bfloat16"))
    mix = noise(2, 9000)[None]
    options = {"shifts": 1, "seed": 3, "stems": ["vocals", "drums"]}
    out, expected = apply_model(half, mix, **options), apply_model(bag, mix, **options)
    assert half.segment == 0.25
    assert 40 < decibels(out, expected) < 100


def test_openvino_runs_other_lengths_in_pytorch_and_many_threads_at_once() -> None:
    pytest.importorskip("openvino")
    model_class, options = FAMILIES["hdemucs"]
    ours = pair(model_class, **options)[1]
    model = on_engine(ours, EngineOptions(engine="openvino"))
    mix = noise(2, 14_500)[None]  # ends in a shorter window
    expected = apply_model(ours, mix, shifts=0)
    assert_close(apply_model(model, mix, shifts=0, num_workers=3), expected)


def test_what_openvino_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    ours = pair(HTDemucs, **TINY)[1]
    mix = noise(2, 4000)[None]
    options = EngineOptions(engine="openvino", cache=tmp_path)

    def separated(model: nn.Module, options: EngineOptions = options) -> Tensor:
        with torch.no_grad():
            return on_engine(model, options)(mix)

    first = separated(ours)
    (kept,) = (tmp_path / "openvino").glob("*.blob")
    with monkeypatch.context() as patch:  # nothing needs to be converted again
        patch.setattr(openvino, "convert_model", None)
        assert torch.equal(separated(copy.deepcopy(ours)), first)
    kept.write_bytes(b"damaged")
    assert torch.equal(separated(ours), first)
    assert kept.stat().st_size > 1000
    # What another could have put there is not even read.
    with monkeypatch.context() as patch:
        patch.setattr(openvino.Core, "import_model", None)
        kept.write_bytes(kept.read_bytes()[:-1] + b"?")
        assert torch.equal(separated(ours), first)
        kept.parent.chmod(0o777)
        assert torch.equal(separated(ours), first)
    kept.parent.chmod(0o700)

    other = copy.deepcopy(ours)
    nn.init.zeros_(other.decoder[-1].conv_tr.weight)
    assert not torch.equal(separated(other), first)
    (tmp_path / "blocked").write_text("")
    blocked = EngineOptions(engine="openvino", cache=tmp_path / "blocked")
    assert torch.equal(separated(ours, blocked), first)


def test_without_openvino_the_message_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install openvino$"):
        on_engine(HTDemucs(**TINY), EngineOptions(engine="openvino"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, "choose from torch, openvino"),
        ({"precision": "int8"}, "choose from float32, bfloat16, float16"),
        ({"precision": "float16"}, "a CPU takes 'bfloat16'"),
        ({"precision": "float16", "engine": "openvino"}, "a CPU takes 'bfloat16'"),
        ({"precision": "bfloat16", "device": "mps"}, "not supported on MPS"),
        ({"engine": "openvino", "compile": True}, "compiles by itself"),
        ({"engine": "openvino", "device": "cuda"}, "'openvino:GPU'"),
    ],
    ids=str,
)
def test_combinations_that_do_not_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        on_engine(HTDemucs(**TINY), EngineOptions(**options))


def test_a_device_that_openvino_lacks_is_named() -> None:
    pytest.importorskip("openvino")
    options = EngineOptions(device="openvino:QPU")
    with pytest.raises(OptionError, match="no device 'QPU' here, but CPU"):
        on_engine(HTDemucs(**TINY), options)


def test_a_gpu_multiplies_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its autocast is tried on the CPU, where it takes bfloat16."""
    theirs, ours = pair(HTDemucs, **TINY)
    options = EngineOptions(precision="bfloat16", device="cuda")
    monkeypatch.setattr(pytorch, "_usable", torch.device)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: autocast("cpu", dtype))
    mix = noise(2, 4000)[None]
    with torch.no_grad():
        assert 40 < decibels(on_engine(ours, options)(mix), theirs(mix)) < 100
