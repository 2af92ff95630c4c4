from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demucs_infer.export import export

from .helpers import FAMILIES, assert_close, noise, pair, run, save_package


@pytest.mark.parametrize(
    "family",
    ["htdemucs", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hdemucs", "demucs"))],
)
def test_onnx_runtime_gives_what_the_network_gives(family: str, tmp_path: Path) -> None:
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


def test_the_command_writes_a_file_or_says_why_not(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model_class, options = FAMILIES["htdemucs"]
    checkpoint = save_package(tmp_path / "a.th", pair(model_class, **options)[0])
    result = run("-m", "demucs_infer.export", checkpoint, tmp_path / "a.txt")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("a.txt: the name must end with .onnx")
    result = run("-m", "demucs_infer.export", checkpoint, tmp_path / "a.onnx")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "a.onnx").stat().st_size > 100_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.th"]
