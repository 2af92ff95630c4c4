from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demucs_infer.convert import export, main

from .helpers import FAMILIES, assert_close, assert_one_line, noise, pair, separate


@pytest.mark.slow
@pytest.mark.parametrize("family", ["htdemucs", "hdemucs", "demucs"])
def test_onnx_runtime_computes_the_network(family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model_class, options = FAMILIES[family]
    theirs, ours = pair(model_class, **options)
    session = onnxruntime.InferenceSession(export(ours, tmp_path / "net.onnx"))

    def network(*inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs)}
        return tuple(map(torch.from_numpy, session.run(None, feed)))

    mix = noise(2, 4000)[None]
    with torch.no_grad():
        assert_close(ours(mix, network=network), theirs(mix))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["sources"]) == ours.sources
    assert json.loads(metadata["samples"]) == 4000
    assert "normalize" in metadata["recipe"]


def test_command_wants_a_name_that_ends_with_onnx(fast_repo: Path, tmp_path: Path) -> None:
    result = separate(fast_repo / "tiny.th", tmp_path / "a.txt", main=main)
    assert result.returncode == 1
    assert_one_line(result, "a.txt", ".onnx")


@pytest.mark.slow
def test_command_writes_onnx(fast_repo: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    result = separate(fast_repo / "tiny.th", tmp_path / "a.onnx", main=main)
    assert (result.returncode, result.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").stat().st_size > (fast_repo / "tiny.th").stat().st_size / 2
