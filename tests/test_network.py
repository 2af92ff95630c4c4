"""The released models as their hosts have them: python -m pytest -m network

The same comparison runs against servers on loopback without a network.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import demucs.apply
import demucs.repo
import pytest
import torch
import yaml
from torch import Tensor

from demucs_infer.apply import BagOfModels, apply_model
from demucs_infer.audio import AudioFile
from demucs_infer.hub import registry
from demucs_infer.states import load_model, save_model
from demucs_infer.storage import http

from .helpers import noise
from .tools import synth
from .tools.hub import serving_hub
from .tools.web import Web

RELEASED = [name for name in registry.bags() if not registry.is_community(name)]
LONGEST = 1e-5  # difference of stems, of the reference's peak


def compare(name: str, folder: Path, mix: Tensor) -> str:
    """Fetch a bag from both hosts into `folder` and compare all of it; returns a row of a table."""
    bag, known = registry.bags()[name], registry.checkpoints()
    limits, sizes = http.LIMITS, []
    models: dict[str, torch.nn.Module] = {}
    for sig in dict.fromkeys(bag["models"]):
        first, *_, second = registry.sources_of(sig, known[sig])
        assert not first.on_hub
        assert second.on_hub
        pickled, _ = first.fetch(folder, limits)
        assert sha256(pickled.read_bytes()).hexdigest() == known[sig].sha256
        twin, _ = second.fetch(folder / "hub", limits)
        assert sha256(twin.read_bytes()).hexdigest().startswith(twin.stem.partition("-")[2])
        models[sig], other = load_model(pickled), load_model(twin).state_dict()
        for key, value in models[sig].state_dict().items():
            assert torch.equal(value, other[key]), (sig, key)
        sizes.append(pickled.stat().st_size)
    settings = [bag.get("weights"), bag.get("segment")]
    ours = BagOfModels([models[sig] for sig in bag["models"]], *settings)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"models": bag["models"]}))
    reference = demucs.repo.LocalRepo(folder)
    theirs = demucs.apply.BagOfModels([reference.get_model(s) for s in bag["models"]], *settings)
    expected = demucs.apply.apply_model(theirs.eval(), mix, shifts=0)
    error = (apply_model(ours, mix, shifts=0) - expected).abs().max() / expected.abs().max()
    assert error <= LONGEST
    return f"{name:24} {len(sizes)} files {sum(sizes) / 1e6:6.0f} MB   stems within {error:.1e}"


@pytest.mark.network
@pytest.mark.parametrize("name", RELEASED)
def test_released_bags_on_both_hosts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synth.write_wav(tmp_path / "song.wav", sum(synth.song(0, 10.0).values()))
    mix = AudioFile(tmp_path / "song.wav").read(streams=0, samplerate=44100, channels=2)
    row = compare(name, tmp_path, mix[None])
    with capsys.disabled():
        print(f"\n{row}")


def test_the_comparison_on_loopback(
    published: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.th").write_bytes(published.content)
    model = load_model(tmp_path / "a.th")
    with serving_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        twin = save_model(model, tmp_path / "a.safetensors").read_bytes()
        homes = {"first": "one", "second": "both"}  # the first bag that has each
        hub.files = {f"adefossez/Demucs-{homes[s]}/{s}.safetensors": twin for s in homes}
        assert "2 files" in compare("both", tmp_path / "fetched", noise(2, 8000)[None])
