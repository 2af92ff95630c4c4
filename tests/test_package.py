"""What other programs import, and what importing costs."""

from __future__ import annotations

import importlib
import inspect
import zipfile
from importlib.metadata import requires
from pathlib import Path

import demucs.api
import pytest

import demucs_infer
from demucs_infer import errors
from demucs_infer.api import Separator

from .helpers import run, separate

NAMES = {
    "api": "Separator save_audio list_models LoadAudioError LoadModelError",
    "apply": "apply_model BagOfModels TensorChunk tensor_chunk",
    "audio": "AudioFile save_audio convert_audio convert_audio_channels encode_mp3 prevent_clip"
    " i16_pcm f32_pcm as_dtype_pcm",
    "pretrained": "get_model get_model_from_args add_model_flags demucs_unittest DEFAULT_MODEL"
    " SOURCES ROOT_URL REMOTE_ROOT ModelLoadingError",
    "repo": "RemoteRepo LocalRepo ModelOnlyRepo BagOnlyRepo AnyModelRepo ModelLoadingError"
    " check_checksum",
    "states": "load_model get_state set_state save_with_checksum capture_init",
    "separate": "main get_parser load_track",
    "utils": "center_trim unfold",
    "spec": "spectro ispectro",
    "demucs": "Demucs",
    "hdemucs": "HDemucs",
    "htdemucs": "HTDemucs",
    "wdemucs": "WDemucs",
    "transformer": "CrossTransformerEncoder",
    "log": "fatal bold",
    "compat": "",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_and_parameters_are_those_of_the_reference(module: str) -> None:
    ours = importlib.import_module(f"demucs_infer.{module}")
    for name in NAMES[module].split():
        mine = getattr(ours, name)
        try:
            reference = getattr(importlib.import_module(f"demucs.{module}"), name)
        except (ImportError, AttributeError):  # in demucs 4.0 only
            continue
        if not callable(mine) or (inspect.isclass(mine) and issubclass(mine, Exception)):
            continue
        expected = list(inspect.signature(reference).parameters.values())
        actual = list(inspect.signature(mine).parameters.values())
        assert [p.name for p in actual[: len(expected)]] == [p.name for p in expected], name
        for extra in actual[len(expected) :]:
            assert extra.kind == inspect.Parameter.KEYWORD_ONLY, name


@pytest.mark.parametrize("method", ["__init__", "update_parameter", "separate_tensor"])
def test_separator_has_the_parameters_of_the_reference(method: str) -> None:
    ours, theirs = getattr(Separator, method), getattr(demucs.api.Separator, method)
    expected = list(inspect.signature(theirs).parameters)
    names, extra = list(inspect.signature(ours).parameters), inspect.signature(ours).parameters
    assert names[: len(expected)] == expected
    assert all(
        extra[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names[len(expected) :]
    )


def test_public_functions_are_typed() -> None:
    for module in NAMES:
        ours = importlib.import_module(f"demucs_infer.{module}")
        for name, function in vars(ours).items():
            local = getattr(function, "__module__", "") == ours.__name__
            if inspect.isfunction(function) and local and not name.startswith("_"):
                signature = inspect.signature(function)
                assert signature.return_annotation is not inspect.Signature.empty, name
                for parameter in signature.parameters.values():
                    assert parameter.annotation is not inspect.Parameter.empty, name


@pytest.mark.parametrize(
    "code",
    [
        "import demucs_infer, demucs_infer.log, demucs_infer.errors",
        "from demucs_infer.separate import main; main(['--list-models'])",
        "from demucs_infer.separate import main; main(['--list-models', '--json'])",
        "from demucs_infer.separate import get_parser; get_parser().format_help()",
    ],
)
def test_what_does_not_import_torch(code: str) -> None:
    check = "; import sys; assert not {'torch', 'numpy', 'av', 'requests'} & set(sys.modules)"
    result = run("-c", code + check)
    assert result.returncode == 0, result.stderr


def test_nothing_imports_torchaudio_or_openunmix() -> None:
    modules = ", ".join(f"demucs_infer.{name}" for name in NAMES)
    code = f"import {modules}, sys; assert not {{'torchaudio', 'openunmix'}} & set(sys.modules)"
    assert run("-c", code).returncode == 0


def test_three_ways_to_call_the_command() -> None:
    outputs = {
        run("-m", "demucs_infer", "--help").stdout,
        run("-m", "demucs_infer.separate", "--help").stdout,
        run("-c", "from demucs_infer.separate import main; main(['--help'])").stdout,
    }
    assert len(outputs) == 1
    assert "--two-stems" in outputs.pop()
    assert separate("--version").stdout == f"demucs-infer {demucs_infer.__version__}\n"


def test_one_exception_tree() -> None:
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, Exception):
            assert issubclass(kind, errors.DemucsInferError), name
    assert issubclass(errors.ModelLoadingError, RuntimeError)
    assert issubclass(errors.OptionError, ValueError)


def test_requirements_have_no_torchaudio() -> None:
    names = " ".join(requires("demucs-infer") or [])
    assert "torch>=" in names
    assert "torchaudio" not in names


def test_the_wheel(tmp_path: Path) -> None:
    """It has the registry and the demonstration, nothing but the package, and is small."""
    root = Path(__file__).parents[1]
    result = run("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=root)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.stat().st_size < 4_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"demucs_infer"}
    for file in ("remote/registry.yml", "remote/demo.safetensors", "py.typed"):
        assert f"demucs_infer/{file}" in names
