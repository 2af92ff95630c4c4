from __future__ import annotations

import copy
import importlib
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from demucs_infer.apply import BagOfModels, apply_model
from demucs_infer.demucs import Demucs
from demucs_infer.engine.backends import backend_of, on_engine, pytorch
from demucs_infer.engine.backends.compiled import CompiledCache
from demucs_infer.engine.machine import X86
from demucs_infer.engine.options import SeparationOptions
from demucs_infer.errors import MissingDependencyError, OptionError
from demucs_infer.htdemucs import HTDemucs

from .helpers import (
    FAMILIES,
    SMALL,
    TINY,
    assert_close,
    decibels,
    environment,
    limited_file_size,
    noise,
    pair,
    run,
)

# This network is converted within a second and takes windows of any length.
LIGHT = (Demucs, {**SMALL, "depth": 2, "dconv_mode": 0, "lstm_layers": 0})
# Family, engine, precision, and the lowest ratio of signal to error in decibels. In `test_convert`,
# ONNX Runtime runs the networks of the other families.
FLOORS = [
    ("htdemucs", "torch", "bfloat16", 40),
    ("hdemucs", "torch", "bfloat16", 40),
    ("bands", "torch", "bfloat16", 35),
    ("demucs", "torch", "bfloat16", 40),
    ("light", "openvino", "float32", 75),
    ("light", "onnxruntime", "float32", 75),
    ("htdemucs", "openvino", "float32", 75),
    ("htdemucs", "openvino", "bfloat16", 40),
    ("htdemucs", "onnxruntime", "float32", 75),
    ("demucs", "openvino", "float32", 75),
]
# The functions that convert a network for an engine. Tests replace them to forbid it.
COMPILERS = {"openvino": ("openvino", "convert_model"), "onnxruntime": ("torch.onnx", "export")}


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bfloat16 run on processors without instructions for it."""
    monkeypatch.setattr(pytorch, "why_no_bfloat16", lambda: None)


@pytest.fixture(params=COMPILERS)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine that compiles; skip if it is not installed."""
    pytest.importorskip(request.param)
    return request.param


@pytest.mark.parametrize(
    ("family", "engine", "precision", "floor"),
    [*FLOORS[:5], *(pytest.param(*row, marks=pytest.mark.slow) for row in FLOORS[5:])],
)
def test_signal_to_error_ratio_of_engines_and_precisions(
    family: str, engine: str, precision: str, floor: float, with_bfloat16: None
) -> None:
    pytest.importorskip(engine)
    if TorchVersion(torch.__version__) < (2, 5) and family != "htdemucs":
        pytest.skip("needs a PyTorch with the exporter, and LSTMs in bfloat16")
    model_class, options = {**FAMILIES, "light": LIGHT}[family]
    theirs, ours = pair(model_class, **options)
    mix = noise(2, 4000)[None]
    model = on_engine(ours, SeparationOptions(engine=engine, precision=precision))
    with torch.no_grad():
        expected, out = theirs(mix), model(mix, stems=[2, 0])
        # The given model has not changed.
        assert_close(ours(mix), expected)
    assert out.dtype == torch.float32
    assert floor < decibels(out, expected[:, [2, 0]]) < 160


@pytest.mark.slow
def test_bag_in_bfloat16_keeps_weights_and_segment(with_bfloat16: None) -> None:
    _, ours = pair(HTDemucs, **TINY)
    bag = BagOfModels([ours, ours], [[1, 1, 0, 1], [0, 1, 1, 1]], segment=0.25)
    half = on_engine(bag, SeparationOptions(precision="bfloat16"))
    mix = noise(2, 9000)[None]
    options = {"shifts": 1, "seed": 3, "stems": ["vocals", "drums"]}
    out, expected = apply_model(half, mix, **options), apply_model(bag, mix, **options)
    assert half.segment == 0.25
    assert 40 < decibels(out, expected) < 100


@pytest.mark.slow
def test_windows_of_other_lengths_and_several_threads(engine: str) -> None:
    model_class, options = LIGHT
    ours = pair(model_class, **options)[1]
    model = on_engine(ours, SeparationOptions(engine=engine))
    mix = noise(2, 14_500)[None]
    expected = apply_model(ours, mix, shifts=0)
    assert_close(apply_model(model, mix, shifts=0, num_workers=3), expected)


@pytest.mark.slow
def test_cache_of_compiled_networks(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network is compiled once, and again if its entry is damaged or cannot be kept."""
    model_class, options = LIGHT
    ours, mix = pair(model_class, **options)[1], noise(2, 4000)[None]
    cache = tmp_path / engine

    def separated(model: nn.Module, folder: Path = tmp_path) -> Tensor:
        with torch.no_grad():
            return on_engine(model, SeparationOptions(engine=engine), folder)(mix)

    def files() -> set[Path]:
        return {path for path in cache.iterdir() if path.suffix != ".sha256"}

    first = separated(ours)
    (kept,) = files()
    with monkeypatch.context() as patch:
        module, function = COMPILERS[engine]
        patch.setattr(importlib.import_module(module), function, None)
        assert torch.equal(separated(copy.deepcopy(ours)), first)
    kept.write_bytes(b"damaged")
    assert torch.equal(separated(ours), first)
    assert kept.stat().st_size > 1000

    other = copy.deepcopy(ours)
    nn.init.zeros_(other.decoder[-1][-1].weight)
    assert not torch.equal(separated(other), first)
    assert len(files()) == 2
    # Safe entries alone are used: see below.
    (tmp_path / "blocked").write_text("")
    assert torch.equal(separated(ours, tmp_path / "blocked"), first)


@pytest.mark.parametrize(
    ("engine", "package"),
    [("openvino", "openvino"), ("onnxruntime", "onnxruntime"), ("onnxruntime", "onnxscript")],
)
def test_error_without_the_package_has_the_command_that_installs_it(
    engine: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {package}$"):
        on_engine(HTDemucs(**TINY), SeparationOptions(engine=engine))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, "choose from torch, openvino, onnxruntime"),
        ({"precision": "int8"}, "choose from float32, bfloat16, float16"),
        ({"precision": "float16"}, "a CPU takes 'bfloat16'"),
        ({"precision": "float16", "engine": "openvino"}, "a CPU takes 'bfloat16'"),
        ({"precision": "bfloat16", "device": "mps"}, "not supported on MPS"),
        ({"engine": "openvino", "compile": True}, "compiles by itself"),
        ({"engine": "openvino", "device": "cuda"}, "'openvino:GPU'"),
        ({"engine": "onnxruntime", "precision": "bfloat16"}, "'bfloat16' is not supported"),
        ({"engine": "onnxruntime", "precision": "float16"}, "takes 'float32'"),
        ({"engine": "onnxruntime", "compile": True}, "compiles by itself"),
        ({"device": "openvino:QPU"}, "no device 'QPU' here, but CPU"),
        ({"device": "onnxruntime:QPU"}, "no provider 'QPU', but cpu"),
        ({"device": "onnxruntime:cpu:first"}, "a number must follow"),
    ],
    ids=str,
)
def test_unsupported_combinations_are_rejected(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        on_engine(HTDemucs(**TINY), SeparationOptions(**options))


@pytest.mark.parametrize(
    "name", ["CPU", "cpuexecutionprovider", "onnxruntime:CPUExecutionProvider"]
)
def test_providers_of_onnx_runtime_by_name(name: str) -> None:
    pytest.importorskip("onnxruntime")
    backend = backend_of(SeparationOptions(engine="onnxruntime", device=name))
    assert backend.provider == "CPUExecutionProvider"


@pytest.mark.slow
def test_unusable_provider_is_skipped_or_an_error_if_named(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    found = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)
    model_class, options = LIGHT
    ours, mix = pair(model_class, **options)[1], noise(2, 4000)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(on_engine(ours, SeparationOptions(engine="onnxruntime"))(mix), ours(mix))
        with pytest.raises(OptionError, match="cuda: its libraries are not on this machine"):
            on_engine(ours, SeparationOptions(device="onnxruntime:cuda"))(mix)


@pytest.mark.slow
def test_providers_of_several_gpus_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session on the CPU stands in for the GPU's."""
    onnxruntime = pytest.importorskip("onnxruntime")
    real, given = onnxruntime.InferenceSession, []

    def session(graph: bytes, options: Any, providers: list, **kwargs: object) -> Any:
        given.extend(providers)
        made = real(graph, options, providers=["CPUExecutionProvider"], **kwargs)
        made.get_providers = lambda: [providers[0][0], "CPUExecutionProvider"]
        return made

    found = ["TensorrtExecutionProvider", "DmlExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    ours, mix = pair(LIGHT[0], **LIGHT[1])[1], noise(2, 4000)[None]
    half = on_engine(ours, SeparationOptions(device="onnxruntime:directml:1", precision="float16"))
    with torch.no_grad():
        assert 50 < decibels(half(mix), ours(mix)) < 100
    assert given == [("DmlExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]
    given.clear()
    # TensorRT compiles for minutes, so it is only used by name.
    with torch.no_grad():
        on_engine(ours, SeparationOptions(engine="onnxruntime"))(mix)
    assert given[0] == ("DmlExecutionProvider", {})


NO_BFLOAT16 = """
import sys, torch
from demucs_infer.api import Separator
from tests.helpers import noise
_, repo, device = sys.argv
def vocals(precision):
    separator = Separator("tiny", repo=repo, device=device, shifts=0, precision=precision)
    return separator.separate_tensor(noise(2, 6000)).stems["vocals"]
print(torch.equal(vocals("float32"), vocals("bfloat16")))
"""
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="the variables are for x86")
@pytest.mark.parametrize("limits", [AVX2, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}], ids="-".join)
def test_processor_without_bfloat16_runs_in_float32(limits: dict[str, str], repo: Path) -> None:
    result = run("-c", NO_BFLOAT16, repo, "cpu", env={**environment(), **limits})
    assert result.stdout.split() == ["True"], result.stderr
    (warning,) = result.stderr.splitlines()
    assert "instructions" in warning
    assert warning.endswith("float32 is used instead")


@pytest.mark.skipif(not X86, reason="the variable is for x86")
def test_openvino_without_bfloat16_runs_in_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenVINO does not run here: with this variable, it crashes on some processors with AMX."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    backend = backend_of(SeparationOptions(engine="openvino", precision="bfloat16"))
    assert backend.options.precision == "float32"
    assert caplog.messages[0].endswith("float32 is used instead")


def test_half_precision_on_a_gpu_uses_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast on the CPU stands in for the GPU's."""
    theirs, ours = pair(HTDemucs, **TINY)
    options = SeparationOptions(precision="bfloat16", device="cuda")
    monkeypatch.setattr(pytorch, "_usable", torch.device)
    monkeypatch.setattr(pytorch, "cuda_has_bfloat16", lambda device: True)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: autocast("cpu", dtype))
    mix = noise(2, 4000)[None]
    with torch.no_grad():
        assert 40 < decibels(on_engine(ours, options)(mix), theirs(mix)) < 100
    monkeypatch.setattr(pytorch, "cuda_has_bfloat16", lambda device: False)
    assert on_engine(ours, options) is ours


# The cache of compiled networks, and other users who could exchange its entries.

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs the permissions of POSIX")


@posix
def test_an_entry_is_read_back(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / "cache")
    assert cache.load("a") is None
    before = os.umask(0o002)  # of a user whose files their group may write
    cache.store("a", b"network")
    os.umask(before)
    assert cache.load("a") == b"network"
    with limited_file_size(50):
        cache.store("b", bytes(100))
    assert {path.name for path in cache.folder.iterdir()} == {"a", "a.sha256"}
    (tmp_path / "cache" / "a").write_bytes(b"damaged")
    assert cache.load("a") is None
    CompiledCache(None).store("a", b"network")
    assert CompiledCache(None).load("a") is None


@posix
@pytest.mark.parametrize(
    ("path", "mode"), [("cache", 0o777), ("cache/a", 0o666), ("cache/a.sha256", 0o662), ("", 0o777)]
)
def test_what_others_may_write_is_not_used(
    path: str, mode: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").mkdir()
    cache = CompiledCache(tmp_path / "home/cache")
    cache.store("a", b"network")
    (tmp_path / "home" / path).chmod(mode)
    assert cache.load("a") is None
    assert str(cache.folder) in caplog.text
    if path in ("", "cache"):
        cache.store("b", b"network")
        assert not (cache.folder / "b").exists()
    if not path:  # where each user can remove only their own files
        (tmp_path / "home").chmod(0o1777)
        assert cache.load("a") == b"network"


@posix
@pytest.mark.parametrize("target", ["link", "fifo"])
def test_an_entry_that_is_not_a_file(target: str, tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / "cache")
    cache.store("a", b"network")
    (cache.folder / "a").rename(tmp_path / "elsewhere")
    if target == "link":
        (cache.folder / "a").symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(cache.folder / "a")
    assert cache.load("a") is None


@pytest.mark.skipif(not hasattr(os, "chown") or os.geteuid() != 0, reason="needs another user")
def test_a_folder_that_another_user_exchanges(tmp_path: Path) -> None:
    """The folder that is checked is the one that is read."""
    cache = CompiledCache(tmp_path / "cache")
    cache.store("a", b"network")
    shutil.copytree(cache.folder, tmp_path / "evil")
    CompiledCache(tmp_path / "evil").store("a", b"evil")
    for path in (tmp_path / "evil", *(tmp_path / "evil").iterdir()):
        os.chown(path, 65534, 65534)
    tmp_path.chmod(0o711)
    os.chown(tmp_path, 65534, 65534)
    assert cache.load("a") is None
    os.chown(tmp_path, 0, 0)
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    assert cache.load("a") is None
    os.seteuid(0)
    done = threading.Event()

    def exchange() -> None:
        while not done.is_set():
            for names in ("cache x", "evil cache", "cache evil", "x cache"):
                source, goal = names.split()
                (tmp_path / source).rename(tmp_path / goal)

    thread = threading.Thread(target=exchange)
    thread.start()
    found = {cache.load("a") for _ in range(3000)}
    done.set()
    thread.join()
    assert b"evil" not in found
