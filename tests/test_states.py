from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import demucs.hdemucs
import demucs.hf
import demucs.htdemucs
import demucs.repo
import demucs.states
import diffq
import pytest
import torch
from safetensors.torch import save_file

import demucs_infer.hf
from demucs_infer import convert
from demucs_infer.apply import apply_model
from demucs_infer.demucs import Demucs
from demucs_infer.errors import MissingDependencyError, ModelLoadingError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.states import (
    copy_state,
    get_quantizer,
    get_state,
    load_model,
    save_model,
    save_with_checksum,
    serialize_model,
    set_state,
    swap_state,
)

from .helpers import (
    TINY,
    archive,
    assert_close,
    noise,
    released_pair,
    run,
    save_package,
    separate,
    shake,
)

SHORT = {"samplerate": 64, "segment": 0.25}  # windows of 16 samples
TIME = {"sources": ["a", "b"], "channels": 4, "depth": 3, "growth": 1}
HYBRID = {"sources": ["a", "b"], "channels": 8, "nfft": 1024, "depth": 5, "samplerate": 8000}


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(0)
    return shake(demucs.htdemucs.HTDemucs(**{**TINY, "segment": Fraction(1, 2)}))


@pytest.mark.parametrize("half", [False, True])
def test_a_checkpoint_of_the_reference(half: bool, theirs: torch.nn.Module, tmp_path: Path) -> None:
    model = load_model(save_package(tmp_path / "a.th", theirs, half))
    assert type(model) is HTDemucs
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert not model.training
    assert model.segment == Fraction(1, 2)
    mix = noise(2, 4000)[None]
    with torch.no_grad():
        assert_close(model(mix), theirs(mix), 1e-2 if half else 1e-5)


def test_the_installed_reference_is_not_imported(theirs: torch.nn.Module, tmp_path: Path) -> None:
    code = "import sys; from demucs_infer.states import load_model; load_model(sys.argv[1]);"
    code += "sys.exit(any(name.partition('.')[0] == 'demucs' for name in sys.modules))"
    assert run("-c", code, save_package(tmp_path / "a.th", theirs)).returncode == 0


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_model_is_read_here_and_by_the_reference(half: bool, tmp_path: Path) -> None:
    model = shake(HTDemucs(**{**TINY, "segment": Fraction(1, 2)}))
    path = save_model(model, tmp_path / "a.safetensors", half)
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "opened").touch()
    assert path.stat().st_mode == (tmp_path / "opened").stat().st_mode  # others may read it, too
    ours, theirs = (package.hf.load_safetensors_model(path) for package in (demucs_infer, demucs))
    assert ours.segment == theirs.segment == Fraction(1, 2)
    mix = noise(2, 4000)[None]
    with torch.no_grad():
        assert_close(ours(mix), model(mix), 1e-2 if half else 1e-6)
        assert_close(ours(mix), theirs.eval()(mix))
    with pytest.raises(ModelLoadingError, match="Linear is not a model"):
        save_model(torch.nn.Linear(1, 1), path)


@pytest.mark.parametrize(
    "quantizer",
    [None, pytest.param(diffq.UniformQuantizer, marks=pytest.mark.slow), diffq.DiffQuantizer],
)
def test_conversion(quantizer: type | None, tmp_path: Path) -> None:
    reference, packed = (demucs.hdemucs.HDemucs(**HYBRID).eval() for _ in range(2))
    state = demucs.states.get_state(packed, quantizer and quantizer(packed, min_size=0.01))
    path = save_package(tmp_path / "a.th", reference, state=state)
    convert.main([str(path), str(tmp_path / "b.safetensors")])
    expected = load_model(path).state_dict()
    for name, tensor in load_model(tmp_path / "b.safetensors").state_dict().items():
        assert torch.equal(tensor, expected[name])
    theirs = demucs.hf.load_safetensors_model(tmp_path / "b.safetensors").state_dict()
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)


def changed(theirs: torch.nn.Module, change: Callable[[dict], None]) -> dict:
    args, kwargs = theirs._init_args_kwargs
    package = {"klass": HTDemucs, "args": args, "kwargs": dict(kwargs)}
    package["state"] = dict(theirs.state_dict())
    change(package)
    return package


BIAS = "encoder.0.conv.bias"
MISFITS: list[tuple[Callable[[dict], object], str]] = [
    (lambda p: p["state"].pop(BIAS), f"{BIAS} is missing"),
    (lambda p: p["state"].update(x=torch.zeros(1)), "x is unexpected"),
    (lambda p: p["state"].update({BIAS: torch.zeros(3)}), r"has the shape \[3\] and not \[8\]"),
    (lambda p: p["kwargs"].update(new_layer=True), "no option new_layer"),
    (lambda p: p["kwargs"].update(t_emb="cape"), "emb='cape'"),
    (lambda p: p["kwargs"].update(depth="four"), "does not describe a model"),
    (lambda p: p.pop("state"), "state"),
    (lambda p: p.update(klass=dict), "builtins.dict is not a model class"),
    (lambda p: p.update(klass="os.system"), "os.system"),
    (lambda p: p["kwargs"].update(depth=10**9), "depth"),
    (lambda p: p["kwargs"].update(t_layers=10**9), "t_layers"),
    (lambda p: p["kwargs"].update(channels=10**12), "do not fit"),
    (lambda p: p["kwargs"].update(sources=["../../etc/cron.d/x"]), "names of files"),
    (lambda p: p["kwargs"].update(sources=["a", "a"]), "names of files"),
    (lambda p: p["kwargs"].update(sources=[]), "names of files"),
    (lambda p: p["kwargs"].update(samplerate=0), "samplerate"),
    (lambda p: p["kwargs"].update(segment=float("inf")), "segment"),
]


def test_packages_that_do_not_fit(theirs: torch.nn.Module) -> None:
    for change, message in MISFITS:
        with pytest.raises(ModelLoadingError, match=message):
            load_model(changed(theirs, change))


def test_unknown_options_without_effect_are_dropped_with_a_warning(
    theirs: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    package = changed(theirs, lambda p: p["kwargs"].update(dropout=0.3, future=None))
    load_model(package)
    assert "no option dropout" in caplog.text
    assert "no option future" in caplog.text
    with pytest.raises(ModelLoadingError, match="dropout"):
        load_model(package, strict=True)


class Reduce:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def hostile_pickles(proof: Path) -> dict[str, bytes]:
    command = f"touch {proof}"
    calls = {
        "os.system": Reduce(os.system, command),
        "open": Reduce(open, str(proof), "w"),
        "torch.load": Reduce(torch.load, str(proof)),
    }
    handmade = {
        "inst": f"(S'{command}'\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nS'{command}'\no.".encode(),
        "other class": b"\x80\x02}X\x05\x00\x00\x00klassccollections\nCounter\ns.",
        "path as class": b"\x80\x02}X\x05\x00\x00\x00klassc../../etc/demucs\nHTDemucs\ns.",
        "build": b"cdemucs.htdemucs\nHTDemucs\n}S'x'\nI1\nsb.",
        "newobj": b"cdemucs.htdemucs\nHTDemucs\n)\x81.",
        "nested name": b"\x80\x04\x8c\x13demucs_infer.states\x8c\tos.system\x93.",
    }
    return {name: pickle.dumps({"state": call}) for name, call in calls.items()} | handmade


def test_a_folder_of_hostile_files(theirs: torch.nn.Module, tmp_path: Path, track: Path) -> None:
    """Each is refused by the command with one line, and nothing runs."""
    proof, folder = tmp_path / "proof", tmp_path / "models"
    folder.mkdir()
    for number, content in enumerate(hostile_pickles(proof).values()):
        archive(folder / f"pickle{number}.th", content)
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(TINY)}
    system = {
        "_dict": [["__quantized", True], ["meta", {"_dict": [["klass", {"_class": "os.system"}]]}]]
    }
    for number, change in enumerate(
        (
            {"klass": "os.system"},
            {"klass": "../../x.Y"},
            {"kwargs": '{"sources": {"_type": "fraction", "numerator": "1e9", "denominator": 1}}'},
            {"structure": json.dumps(system)},
            {"structure": '{"_call": "os.system"}'},
            {"structure": "[" * 100_000},
        )
    ):
        save_file(
            {"x": torch.zeros(1)}, folder / f"metadata{number}.safetensors", {**metadata, **change}
        )
    whole = save_package(folder / "whole.th", theirs).read_bytes()
    (folder / "whole.th").unlink()
    for name, content in {"cut": whole[: len(whole) // 2], "byte": b"x", "nothing": b""}.items():
        (folder / f"{name}.th").write_bytes(content)
        (folder / f"{name}2.safetensors").write_bytes(content)
    hostile = sorted(path.stem for path in folder.iterdir())
    assert len(hostile) > 20
    for name in hostile:
        failed = separate("--repo", folder, "-n", name, track)
        assert failed.returncode == 1
        lines = failed.stderr.splitlines()
        assert len(lines) == 1
        assert name in lines[0]
    assert not proof.exists()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (HTDemucs, {**TINY, "segment": 1000}),
        (HDemucs, {**HYBRID, "segment": 1000}),
        (Demucs, {**TIME, "segment": 10**5}),
        (Demucs, {**TIME, "stride": 2**31}),
        (HDemucs, {**HYBRID, "freq_emb": 0, "stride": 2**31}),
    ],
)
def test_windows_that_are_too_large_for_the_weights(family: type, changes: dict) -> None:
    """The weights fit, and the window would take gigabytes."""
    package = {"klass": family, "args": (), "kwargs": changes}
    package["state"] = family(**changes).state_dict()
    with pytest.raises(ModelLoadingError, match="segment or stride is too long"):
        load_model(package)


@pytest.mark.parametrize(
    ("family", "options", "length"),
    [
        (HTDemucs, {**TINY, "kernel_size": 3}, 4000),  # less than the stride
        (
            HDemucs,
            {**HYBRID, "channels": 4, "nfft": 256, "depth": 3, "norm_starts": 1, **SHORT},
            16,
        ),
    ],
)
def test_a_model_that_cannot_run_fails_in_a_window(
    family: type, options: dict, length: int
) -> None:
    """In the first, or in the last if only that is too short."""
    package = {"klass": family, "args": (), "kwargs": options}
    model = load_model({**package, "state": family(**options).state_dict()})
    with pytest.raises(ModelLoadingError, match="the package: describes a model that cannot run"):
        apply_model(model, noise(2, length)[None], shifts=0)


def test_quantized_states_that_do_not_fit() -> None:
    packed = demucs.hdemucs.HDemucs(**HYBRID).eval()
    state = demucs.states.get_state(packed, diffq.UniformQuantizer(packed, min_size=0.01))
    others, quantized = state["others"], state["quantized"]
    for change, message in (
        ({"others": others[:-1]}, "embedding.weight is missing"),
        ({"others": [*others, torch.zeros(1)]}, "one of others is unexpected"),
        ({"others": [torch.zeros(1), *others[1:]]}, r"has the shape \[1\]"),
        ({"quantized": quantized[:-1]}, "does not describe"),
        ({"quantized": [*quantized, quantized[0]]}, "does not describe"),
        ({"quantized": [(torch.zeros(1, 8, 7).long(), (0, 1))]}, "packed weights"),
        ({"quantized": [], "others": []}, "bits for"),
        ({"meta": {**state["meta"], "klass": os.system}}, "system> is not a quantizer"),
        ({"meta": None}, "does not describe"),
    ):
        package = {"klass": HDemucs, "args": (), "kwargs": HYBRID, "state": {**state, **change}}
        with pytest.raises(ModelLoadingError, match=message):
            load_model(package)


MEMORY = """
import re, sys
from pathlib import Path
from demucs_infer.states import load_model
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
load_model(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak where Linux tells it")
@pytest.mark.slow
@pytest.mark.parametrize("half", [True, False])
def test_loading_needs_little_more_memory_than_the_weights(half: bool, tmp_path: Path) -> None:
    reference, _ = released_pair("955717e8")
    path = save_package(tmp_path / "a.th", reference, half)
    weights = sum(4 * parameter.numel() for parameter in reference.parameters())
    result = run("-c", MEMORY, path)
    assert result.returncode == 0, result.stderr
    assert 0.9 * weights <= int(result.stdout) * 1024 <= 2.2 * weights


def test_files_that_are_no_packages(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadingError, match="no such checkpoint"):
        load_model(tmp_path / "b.th")
    with pytest.raises(ModelLoadingError, match=r"is a \.th or"):
        load_model(tmp_path / "b.txt")
    torch.save([1, 2], tmp_path / "a.th")
    with pytest.raises(ModelLoadingError, match="holds a list"):
        load_model(tmp_path / "a.th")


class Configuration(dict):
    """Stands in for one of OmegaConf, which only trainings have."""

    __module__ = "omegaconf.dictconfig"

    def to_container(self, resolve: bool) -> dict:
        assert resolve
        return dict(self)


def test_a_package_that_is_saved_as_the_reference_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same is in it, and it is read again."""
    monkeypatch.setitem(sys.modules, "omegaconf", SimpleNamespace(OmegaConf=Configuration))
    model = shake(HTDemucs(**{**TINY, "segment": Fraction(1, 2)}))
    ours = serialize_model(model, {"epochs": 1})
    theirs = demucs.states.serialize_model(model, Configuration(epochs=1))
    assert ours.keys() == theirs.keys()
    assert {**ours, "state": 0} == {**theirs, "state": 0}
    assert {tensor.dtype for tensor in ours["state"].values()} == {torch.float16}
    assert all(torch.equal(tensor, theirs["state"][k]) for k, tensor in ours["state"].items())
    package = serialize_model(model, Configuration(epochs=1), half=False)
    assert package["training_args"] == {"epochs": 1}
    assert type(package["training_args"]) is dict
    path = save_with_checksum(package, tmp_path / "a.th")
    assert path.name.startswith("a-")
    demucs.repo.check_checksum(path, path.stem.partition("-")[2])
    other = HTDemucs(**TINY)
    assert set_state(other, get_state(model)) is not None
    for loaded in (load_model(path), other):
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"diffq": 0, "qat": 0}, None),
        ({"diffq": 1e-4, "qat": 0, "group_size": 4}, "DiffQuantizer"),
        ({"diffq": 0, "qat": 4}, "UniformQuantizer"),
    ],
)
def test_the_quantizer_of_a_training(options: dict, kind: str | None, tmp_path: Path) -> None:
    args = SimpleNamespace(min_size=0.01, **options)
    model, other = HDemucs(**HYBRID), demucs.hdemucs.HDemucs(**HYBRID)
    other.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters()) if kind == "DiffQuantizer" else None
    ours = get_quantizer(model, args, optimizer)
    theirs = demucs.states.get_quantizer(other, args)
    assert type(ours) is type(theirs) is (type(None) if kind is None else getattr(diffq, kind))
    if kind is None:
        return
    assert optimizer is None or len(optimizer.param_groups) == 2
    assert ours.min_size == theirs.min_size
    package = serialize_model(model, {}, ours)
    assert package["state"]["__quantized"]
    loaded = load_model(save_with_checksum(package, tmp_path / "a.th")).state_dict()
    fresh = demucs.hdemucs.HDemucs(**HYBRID)
    demucs.states.set_state(fresh, package["state"])
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in fresh.state_dict().items())


def test_a_quantizer_without_diffq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffq", None)
    model = torch.nn.Linear(1, 1)
    assert get_quantizer(model, SimpleNamespace(diffq=0, qat=0)) is None
    package = {"klass": HDemucs, "args": (), "kwargs": HYBRID, "state": {"__quantized": True}}
    with pytest.raises(MissingDependencyError, match="pip install diffq"):
        load_model(package)
    for options in ({"diffq": 1, "qat": 0, "group_size": 8}, {"diffq": 0, "qat": 8}):
        with pytest.raises(MissingDependencyError, match="pip install diffq"):
            get_quantizer(model, SimpleNamespace(min_size=1, **options))


def test_states_that_are_copied_and_swapped() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = copy_state(model.state_dict())
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(before["weight"] + 1, model.weight)  # of memory of their own
    inside = copy_state(model.state_dict())
    with pytest.raises(KeyError), swap_state(model, other.state_dict()):
        assert torch.equal(model.weight, other.weight)
        raise KeyError
    assert torch.equal(model.weight, inside["weight"])
    with swap_state(model, {"bias": torch.zeros(2)}):  # as the reference, some of them
        assert torch.equal(model.bias, torch.zeros(2))
        assert torch.equal(model.weight, inside["weight"])
    assert torch.equal(model.bias, inside["bias"])


@pytest.mark.parametrize(("family", "options"), [(HDemucs, {"depth": 5}), (Demucs, {"depth": 3})])
def test_a_truth_value_is_a_number_too(family: type, options: dict, tmp_path: Path) -> None:
    small = {"sources": ["a", "b"], "channels": 8, "norm_starts": 1}
    model = family(**small, **options, norm_groups=True)
    loaded = load_model(save_model(model, tmp_path / "a.safetensors"))
    with torch.no_grad():
        assert loaded(torch.randn(1, 2, 30_000)).isfinite().all()
