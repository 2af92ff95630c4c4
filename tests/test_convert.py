"""Checkpoints become safetensors or ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from demucs_infer.convert import export, main
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.states import load_model

from .helpers import (
    FAMILIES,
    SOURCES,
    TINY,
    assert_close,
    assert_one_line,
    decibels,
    noise,
    pair,
    save_package,
    separate,
)


def write_config(path: Path, kind: str, options: dict[str, Any]) -> Path:
    own = {n: v for n, v in options.items() if n not in ("sources", "samplerate", "segment")}
    training = {"instruments": SOURCES, "channels": 2, "samplerate": 8000, "segment": 0.5}
    path.write_text(yaml.safe_dump({"model": kind, "training": training, kind: own}))
    return path


@pytest.mark.parametrize(
    ("family", "key"), [("htdemucs", None), ("hdemucs", "state"), ("demucs", "state_dict")]
)
def test_checkpoints_of_the_training_toolkit_are_converted(
    family: str, key: str | None, tmp_path: Path
) -> None:
    model_class, options = FAMILIES[family]
    theirs, _ = pair(model_class, **options)
    state: dict[str, Any] = theirs.state_dict()
    content = state if key is None else {key: state, "epoch": 3, "optimizer": {"lr": 1e-4}}
    torch.save(content, tmp_path / "in.ckpt")
    config = write_config(tmp_path / "config.yaml", family, options)
    out = tmp_path / "out.safetensors"
    main(["--config", str(config), str(tmp_path / "in.ckpt"), str(out)])
    mix = noise(2, 4000)[None]
    with torch.no_grad():
        assert_close(load_model(out)(mix), theirs(mix))


def test_refused_conversions_write_nothing(repo: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "in.ckpt")
    config = write_config(tmp_path / "config.yaml", "mel_band_roformer", {})
    out = tmp_path / "out.safetensors"
    (tmp_path / "bad.th").write_text("no checkpoint")
    for arguments, words in (
        ([tmp_path / "bad.th", out], ["bad.th"]),
        (["--config", config, tmp_path / "in.ckpt", out], ["mel_band_roformer"]),
        ([repo / "tiny.th", tmp_path / "out.txt"], ["out.txt", ".safetensors", ".onnx"]),
        (["--dynamic", repo / "tiny.th", out], ["onnx"]),
    ):
        result = separate(*arguments, main=main)
        assert result.returncode in (1, 2)
        error = result.stderr.splitlines()[-1]
        assert "error: " in error
        assert all(word in error for word in words)
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("rate", "size"), [(0, 4000), (-1, 4000), (8000, 10**400), (8000, 10**12), (10**400, 1)]
)
def test_absurd_numbers_in_a_configuration_are_refused(
    rate: int, size: int, tmp_path: Path
) -> None:
    torch.save(HTDemucs(**TINY).state_dict(), tmp_path / "in.ckpt")
    config = write_config(tmp_path / "config.yaml", "htdemucs", TINY)
    values = yaml.safe_load(config.read_text())
    training = {"instruments": SOURCES, "channels": 2, "samplerate": rate}
    values |= {"training": training, "audio": {"chunk_size": size}}
    config.write_text(yaml.safe_dump(values))
    out = tmp_path / "out.safetensors"
    result = separate("--config", config, tmp_path / "in.ckpt", out, main=main)
    assert_one_line(result)
    assert len(result.stderr) < 2000
    assert not out.exists()


def run_onnx(model: nn.Module, mix: torch.Tensor, path: Path) -> tuple[torch.Tensor, Any]:
    """Return the stems of `model` with its network in ONNX Runtime, and the session."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path)

    def network(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs)}
        return tuple(map(torch.from_numpy, session.run(None, feed)))

    with torch.no_grad():
        return model(mix, network=network), session


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hdemucs", "demucs"])
def test_onnx_computes_the_network_and_describes_it(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model_class, options = FAMILIES[family]
    theirs, ours = pair(model_class, **options)
    mix = noise(2, 4000)[None]
    stems, session = run_onnx(ours, mix, export(ours, tmp_path / "net.onnx"))
    with torch.no_grad():
        assert_close(stems, theirs(mix))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["sources"]) == ours.sources
    assert json.loads(metadata["samples"]) == 4000
    assert "normalize" in metadata["recipe"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "floor"), [(["--precision", "float16"], 50), (["--dynamic"], 100)], ids=str
)
def test_onnx_in_half_precision_or_for_any_batch(
    flags: list[str], floor: float, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    theirs, model = pair(HTDemucs, **{**TINY, "depth": 2})
    save_package(tmp_path / "in.th", theirs)
    result = separate(*flags, tmp_path / "in.th", tmp_path / "out.onnx", main=main)
    assert (result.returncode, result.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"in.th", "out.onnx"}
    batch = 3 if "--dynamic" in flags else 1
    mix = torch.stack([noise(2, 4000, seed) for seed in range(batch)])
    stems, session = run_onnx(model, mix, tmp_path / "out.onnx")
    ends = [*session.get_inputs(), *session.get_outputs()]
    assert {node.type for node in ends} == {"tensor(float)"}
    with torch.no_grad():
        assert floor < decibels(stems, model(mix)) < 150
