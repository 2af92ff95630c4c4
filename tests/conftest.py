from __future__ import annotations

from pathlib import Path

import demucs.htdemucs
import pytest
import soundfile
import torch

from .helpers import TINY, noise, save_package, shake


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `tiny`, and the bag `pair` that runs it twice."""
    folder = tmp_path_factory.mktemp("repo")
    torch.manual_seed(0)
    save_package(folder / "tiny.th", shake(demucs.htdemucs.HTDemucs(**TINY)))
    (folder / "pair.yaml").write_text("models: [tiny, tiny]\n")
    return folder


@pytest.fixture
def track(tmp_path: Path) -> Path:
    """Two seconds of stereo noise, at 48 kHz."""
    path = tmp_path / "track.wav"
    soundfile.write(path, noise(2, 96_000).T.numpy(), 48_000, subtype="FLOAT")
    return path
