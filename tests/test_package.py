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

# The modules of `demucs` that the package has, too.
MODULES = (
    "api apply audio demucs hdemucs hf htdemucs pretrained repo separate spec states"
    " transformer utils wdemucs"
)
GONE = {
    # PyAV writes the files.
    "audio": "encode_ffmpeg encode_wav",
    # The same, sparse attention, and a position embedding, which no released model has;
    # `ScaledEmbedding` is that of hdemucs.
    "transformer": "CrossTransformerEncoderLayer MultiheadAttention MyGroupNorm"
    " MyTransformerEncoderLayer dynamic_sparse_attention get_causal_mask get_elementary_mask"
    " get_mask scaled_dot_product_attention scaled_query_key_softmax ScaledEmbedding"
    " create_sin_embedding_cape",
    # `get_model` takes signatures.
    "pretrained": "get_model_from_sig",
    # An alias for annotations.
    "repo": "AnyModel",
    # Helpers of training, and temporary names: files take their name when they are whole.
    "utils": "EMA Subset pull_metric random_subset sizeof_fmt temp_filenames",
}
# Names that programs import from modules that import them in `demucs`, or define them in 4.0.
IMPORTED = {
    "api": "save_audio",
    "apply": "HTDemucs HDemucs Demucs Model DummyPoolExecutor tqdm center_trim",
    "separate": "Separator save_audio BagOfModels HTDemucs ModelLoadingError apply_model"
    " get_model_from_args AudioFile convert_audio list_models add_model_flags load_track",
    "pretrained": "DEFAULT_MODEL SOURCES ROOT_URL REMOTE_ROOT ModelLoadingError"
    " _parse_remote_files",
    "wdemucs": "WDemucs",
    "log": "fatal bold",
    "compat": "",
}
# `fatal` takes messages of any type and a status; `DummyPoolExecutor` no number of workers.
OTHER_PARAMETERS = {"fatal"}


def defined_in(module: Any) -> dict[str, Any]:
    """Return the public objects that a module defines, without those that it imports."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


def assert_extends(ours: Any, theirs: Any, name: str) -> None:
    """Assert that our parameters are those of the reference in their order, then keywords."""
    mine, expected = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    assert [p.name for p in mine[: len(expected)]] == [p.name for p in expected], name
    for extra in mine[len(expected) :]:
        assert extra.kind == inspect.Parameter.KEYWORD_ONLY, name


def test_names_and_parameters_are_those_of_the_reference_or_gone_for_a_reason() -> None:
    for module in MODULES.split():
        theirs = defined_in(importlib.import_module(f"demucs.{module}"))
        ours = vars(importlib.import_module(f"demucs_infer.{module}"))
        assert theirs.keys() - ours == set(GONE.get(module, "").split()) & theirs.keys(), module
        for name in theirs.keys() & ours.keys() - OTHER_PARAMETERS:
            is_error = inspect.isclass(theirs[name]) and issubclass(theirs[name], Exception)
            if callable(theirs[name]) and not is_error:
                assert_extends(ours[name], theirs[name], name)
    for method in ("__init__", "update_parameter", "separate_tensor"):
        assert_extends(getattr(Separator, method), getattr(demucs.api.Separator, method), method)


def test_modules_have_the_names_that_programs_import_from_them() -> None:
    for module, names in IMPORTED.items():
        ours = importlib.import_module(f"demucs_infer.{module}")
        assert [name for name in names.split() if not hasattr(ours, name)] == []


def test_package_requires_no_torchaudio_and_help_imports_no_torch() -> None:
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
    assert "torchaudio" not in " ".join(requires("demucs-infer"))


@pytest.mark.slow
def test_modules_import_no_torchaudio_or_openunmix_and_may_be_commands() -> None:
    modules = ", ".join(f"demucs_infer.{name}" for name in (*MODULES.split(), "log", "compat"))
    code = f"import {modules}, sys; assert not {{'torchaudio', 'openunmix'}} & set(sys.modules)"
    assert run("-c", code).returncode == 0
    result = run("-m", "demucs_infer.convert", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "demucs_infer.convert" in result.stdout


def test_modules_are_commands() -> None:
    outputs = {
        run("-m", "demucs_infer", "--help").stdout,
        run("-m", "demucs_infer.separate", "--help").stdout,
        separate("--help").stdout,
    }
    assert len(outputs) == 1
    assert "--two-stems" in outputs.pop()
    assert separate("--version").stdout == f"demucs-infer {demucs_infer.__version__}\n"


def test_exceptions_have_one_root() -> None:
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, Exception):
            assert issubclass(kind, errors.DemucsInferError), name
    assert issubclass(errors.ModelLoadingError, RuntimeError)
    assert issubclass(errors.OptionError, ValueError)
    assert issubclass(errors.SaveAudioError, OSError)


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
