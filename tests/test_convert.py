"""Checkpoints of others are converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from demucs_infer.convert import main
from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.states import load_model

from .helpers import SOURCES, TINY, decibels, noise, pair, run

SMALL = {"channels": 8, "depth": 3, "dconv_lstm": 2, "dconv_attn": 2}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "htdemucs": (HTDemucs, {name: value for name, value in TINY.items() if name != "sources"}),
    "hdemucs": (HDemucs, {**SMALL, "nfft": 1024, "depth": 4}),
    "demucs": (Demucs, SMALL),
}


def write_config(path: Path, kind: str, options: dict[str, Any]) -> Path:
    own = {n: v for n, v in options.items() if n not in ("samplerate", "segment")}
    training = {"instruments": SOURCES, "channels": 2, "samplerate": 8000, "segment": 0.5}
    path.write_text(yaml.safe_dump({"model": kind, "training": training, kind: own}))
    return path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", [None, "state", "state_dict"])
def test_checkpoints_of_the_training_toolkit(family: str, key: str | None, tmp_path: Path) -> None:
    model_class, options = FAMILIES[family]
    whole = {**options, "sources": SOURCES, "samplerate": 8000, "segment": 0.5}
    theirs, _ = pair(model_class, **whole)
    state: dict[str, Any] = theirs.state_dict()
    content = state if key is None else {key: state, "epoch": 3, "optimizer": {"lr": 1e-4}}
    torch.save(content, tmp_path / "in.ckpt")
    config = write_config(tmp_path / "config.yaml", family, options)
    out = tmp_path / "out.safetensors"
    convert = ["-m", "demucs_infer.convert", "--config", config, tmp_path / "in.ckpt", out]
    result = run(*convert)
    assert result.returncode == 0, result.stderr
    mix = noise(2, 4000)[None]
    with torch.no_grad():
        expected = theirs(mix)
        assert (load_model(out)(mix) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_other_model_types_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "in.ckpt")
    config = write_config(tmp_path / "config.yaml", "mel_band_roformer", {})
    out = tmp_path / "out.safetensors"
    result = run("-m", "demucs_infer.convert", "--config", config, tmp_path / "in.ckpt", out)
    assert result.returncode == 1
    assert "mel_band_roformer" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_a_name_that_tells_no_format(repo: Path, tmp_path: Path) -> None:
    result = run("-m", "demucs_infer.convert", repo / "tiny.th", tmp_path / "out.txt")
    assert result.returncode == 1
    assert ".safetensors or .onnx" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "floor"), [(["--precision", "float16"], 50), (["--dynamic"], 100)], ids=str
)
def test_onnx_in_half_precision_or_of_any_batch(
    flags: list[str], floor: float, repo: Path, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    main([*flags, str(repo / "tiny.th"), str(tmp_path / "out.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    assert {node.type for node in (*session.get_inputs(), *session.get_outputs())} == {
        "tensor(float)"
    }

    def network(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs)}
        return tuple(map(torch.from_numpy, session.run(None, feed)))

    model = load_model(repo / "tiny.th")
    batch = 3 if "--dynamic" in flags else 1
    mix = torch.stack([noise(2, 4000, seed) for seed in range(batch)])
    with torch.no_grad():
        assert floor < decibels(model(mix, network=network), model(mix)) < 150


def test_options_of_onnx_are_for_onnx(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--dynamic", str(repo / "tiny.th"), str(tmp_path / "out.safetensors")])
    assert not list(tmp_path.glob("out*"))
