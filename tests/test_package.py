"""The names that other programs import, and the cost of importing them."""

from __future__ import annotations

import importlib
import inspect
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

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


def parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def assert_extends(ours: Any, theirs: Any, name: str) -> None:
    """Our parameters are those of the reference in their order, then keywords."""
    mine, expected = parameters(ours), parameters(theirs)
    assert [p.name for p in mine[: len(expected)]] == [p.name for p in expected], name
    for extra in mine[len(expected) :]:
        assert extra.kind == inspect.Parameter.KEYWORD_ONLY, name


def test_names_and_parameters_are_those_of_the_reference() -> None:
    for module, names in NAMES.items():
        ours = importlib.import_module(f"demucs_infer.{module}")
        for name in names.split():
            mine = getattr(ours, name)
            try:
                theirs = getattr(importlib.import_module(f"demucs.{module}"), name)
            except (ImportError, AttributeError):  # in demucs 4.0 only
                continue
            is_error = inspect.isclass(mine) and issubclass(mine, Exception)
            if callable(mine) and not is_error:
                assert_extends(mine, theirs, name)
    for method in ("__init__", "update_parameter", "separate_tensor"):
        assert_extends(getattr(Separator, method), getattr(demucs.api.Separator, method), method)


def test_help_and_the_list_of_models_import_no_torch() -> None:
    code = """
import sys
import demucs_infer, demucs_infer.log, demucs_infer.errors, demucs_infer.write.stems
from demucs_infer.separate import get_parser, main
get_parser().format_help()
main(["--list-models"])
main(["--list-models", "--json"])
assert not {"torch", "numpy", "av", "requests"} & set(sys.modules)
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_nothing_imports_torchaudio_or_openunmix() -> None:
    modules = ", ".join(f"demucs_infer.{name}" for name in NAMES)
    code = f"import {modules}, sys; assert not {{'torchaudio', 'openunmix'}} & set(sys.modules)"
    assert run("-c", code).returncode == 0


def test_modules_are_commands() -> None:
    outputs = {
        run("-m", "demucs_infer", "--help").stdout,
        run("-m", "demucs_infer.separate", "--help").stdout,
        separate("--help").stdout,
    }
    assert len(outputs) == 1
    assert "--two-stems" in outputs.pop()
    assert separate("--version").stdout == f"demucs-infer {demucs_infer.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["convert"])
def test_modules_that_convert_are_commands(module: str) -> None:
    result = run("-m", f"demucs_infer.{module}", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"demucs_infer.{module}" in result.stdout


def test_exceptions_have_one_root() -> None:
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, Exception):
            assert issubclass(kind, errors.DemucsInferError), name
    assert issubclass(errors.ModelLoadingError, RuntimeError)
    assert issubclass(errors.OptionError, ValueError)
    assert issubclass(errors.SaveAudioError, OSError)


def test_requirements_have_no_torchaudio() -> None:
    names = " ".join(requires("demucs-infer") or [])
    assert "torch>=" in names
    assert "torchaudio" not in names


@pytest.mark.slow
def test_distributions_have_the_registry_and_the_demonstration(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    result = run("-m", "hatchling", "build", "-d", tmp_path, cwd=root)
    assert result.returncode == 0, result.stderr
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert wheel.stat().st_size < 4_000_000
    with tarfile.open(source) as archive:
        assert any(name.endswith("/remote/registry.yml") for name in archive.getnames())
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"demucs_infer"}
    for file in ("remote/registry.yml", "remote/demo.safetensors", "py.typed"):
        assert f"demucs_infer/{file}" in names
