from __future__ import annotations

import inspect
import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import demucs.htdemucs
import pytest
import yaml

from demucs_infer.errors import ModelLoadingError
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.hub import registry

# The SHA-256 of the addresses, digests, origins and sizes of all checkpoints, and of all bags.
FACTS = "c3db39608455b17db820574ac0e24004598b0c125ed27e80c474f34187723c2e"


def published() -> dict:
    return yaml.safe_load((registry.REMOTE_ROOT / "registry.yml").read_text())


def urls() -> dict[str, str]:
    return {sig: checkpoint.urls[0] for sig, checkpoint in registry.checkpoints().items()}


def test_what_was_published() -> None:
    """If a model is added, its facts are checked below, and the digest is renewed."""
    facts = {
        sig: [c.origin, c.in_mirror, c.sha256, c.size, c.source, c.licence, c.architecture]
        for sig, c in registry.checkpoints().items()
        if not c.embedded
    }
    keys = ("models", "weights", "segment", "sources")
    facts |= {name: [bag.get(key) for key in keys] for name, bag in registry.bags().items()}
    assert sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest() == FACTS


TYPES = {"sources": list, "megabytes": int, "architecture": dict}  # others are texts
FIELDS = {  # of each group: those that are needed, and the optional ones
    "embedded": ("description sha256 sources file licence", ""),
    "checkpoints": ("description sha256", "megabytes safetensors_sha256"),
    "bags": ("description sources", ""),
    "community": ("description sha256 url source licence", "architecture"),
}


def test_every_field_is_valid() -> None:
    content = published()
    community = content.pop("community")
    assert content.pop("root").startswith("https://")
    assert content.keys() == FIELDS.keys() - {"community"}
    assert community.keys() == {"checkpoints", "bags"}
    content["bags"] |= community["bags"]
    content["community"] = community["checkpoints"]
    for group, (needed, optional) in FIELDS.items():
        for name, entry in content[group].items():
            assert isinstance(name, str)
            assert {*needed.split()} <= entry.keys() <= {*needed.split(), *optional.split()}, name
            for field, value in entry.items():
                assert isinstance(value, TYPES.get(field, str)), (name, field)
                assert not field.endswith("sha256") or re.fullmatch("[0-9a-f]{64}", value), name
                assert field != "url" or value.startswith("https://"), name
                assert field != "sources" or {*map(type, value)} == {str}, name
                assert field != "file" or (registry.REMOTE_ROOT / value).is_file(), name


def test_checkpoints_and_bags() -> None:
    found, bags = registry.checkpoints(), registry.bags()
    demo = found.pop("demo")
    assert sha256(demo.embedded.read_bytes()).hexdigest() == demo.sha256
    assert len({checkpoint.file for checkpoint in found.values()}) == len(found) == 34
    for sig, checkpoint in found.items():
        checksum = re.fullmatch(rf"{sig}-([0-9a-f]{{8}})\.th", checkpoint.file)
        assert checksum or registry.is_community(sig)
        assert not checksum or checkpoint.sha256.startswith(checksum[1])
        assert registry.is_community(sig) == bool(checkpoint.source)
    assert {sig for bag in bags.values() for sig in bag["models"]} == set(found)
    for name, bag in bags.items():
        assert len(bag.get("weights", bag["models"])) == len(bag["models"])
        assert all(len(row) == len(bag["sources"]) for row in bag.get("weights", []))
        for sig in bag["models"]:
            assert registry.is_community(sig) == registry.is_community(name)
    # Two bytes for each parameter, of those whose number is known.
    assert found["955717e8"].size == 84_000_000
    assert sum(checkpoint.size is not None for checkpoint in found.values()) == 15
    (weights,) = (c.architecture for c in found.values() if c.architecture)
    assert weights["klass"] == "demucs.htdemucs.HTDemucs"
    for family in (demucs.htdemucs.HTDemucs, HTDemucs):
        assert set(weights["kwargs"]) <= set(inspect.signature(family).parameters)


def test_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    before = urls()
    root = "https://dl.fbaipublicfiles.com/demucs"
    assert before["955717e8"] == f"{root}/hybrid_transformer/955717e8-8726e21a.th"
    assert before["49469ca8"].startswith("https://github.com/")
    for mirror in ("https://host.invalid/a/b", "https://host.invalid/a/b/"):
        monkeypatch.setenv("DEMUCS_INFER_MIRROR", mirror)
        mirrored = urls()
        assert mirrored.pop("demo") == before["demo"]
        assert all(url.startswith("https://host.invalid/a/b/") for url in mirrored.values())
        assert mirrored["955717e8"].endswith("/a/b/hybrid_transformer/955717e8-8726e21a.th")
        assert mirrored["49469ca8"].endswith("/a/b/community/model_drumsep.th")
    monkeypatch.setenv("DEMUCS_INFER_MIRROR", "")
    assert urls() == before


def test_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("XDG_CACHE_HOME", "TORCH_HOME", "DEMUCS_INFER_CACHE")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, "home")
    for values, folder, expected in (
        (["", "", ""], None, "home/.cache/torch/hub/checkpoints"),
        (["xdg", "", ""], None, "xdg/torch/hub/checkpoints"),
        (["xdg", "~/torch", ""], None, "home/torch/hub/checkpoints"),
        (["", "torch", "own"], None, "own"),
        (["", "", "~/own"], None, "home/own"),
        (["", "", "own"], "given", "given"),
    ):
        for name, value in zip(names, values):
            monkeypatch.setenv(name, value)
            # PyTorch takes an empty one for a folder.
            if not value:
                monkeypatch.delenv(name)
        assert registry.cache_folder(folder) == Path(expected)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(ModelLoadingError, match="set DEMUCS_INFER_CACHE"):
        registry.cache_folder()


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, offline in (("1", True), ("yes", True), ("0", False), ("", False), ("False", False)):
        monkeypatch.setenv("DEMUCS_INFER_OFFLINE", value)
        assert registry.is_offline() is offline
        assert registry.is_offline(not offline) is not offline


def test_it_is_read_on_call_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(registry.REMOTE_ROOT, tmp_path / "remote")
    text = (folder / "registry.yml").read_text()
    (folder / "registry.yml").write_text(text.replace("htdemucs_6s", "renamed"))
    (folder / "htdemucs_6s.yaml").rename(folder / "renamed.yaml")
    monkeypatch.setattr(registry, "REMOTE_ROOT", folder)
    registry.registry.cache_clear()
    assert "renamed" in registry.bags()
    (folder / "renamed.yaml").write_text("models: ['12345678']\n")
    registry.registry.cache_clear()
    with pytest.raises(ModelLoadingError, match=r"renamed\.yaml: no checkpoint 12345678"):
        registry.bags()
    registry.registry.cache_clear()
