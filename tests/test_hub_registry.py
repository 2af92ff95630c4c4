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

# The SHA-256 of names, addresses, digests and weights as they were published.
FACTS = "7eecd067b697f4fd33b621ff8ea1642dce37878329929714db274dd5c5f85c14"


def published() -> dict:
    return yaml.safe_load((registry.REMOTE_ROOT / "registry.yml").read_text())


def urls() -> dict[str, str]:
    return {sig: checkpoint.url for sig, checkpoint in registry.checkpoints().items()}


def test_what_was_published() -> None:
    content = published()
    community = content["community"]
    bags = {
        name: {**bag, **yaml.safe_load((registry.REMOTE_ROOT / f"{name}.yaml").read_text())}
        for name, bag in registry.bags().items()
    }
    files = registry.released_files(registry.REMOTE_ROOT / "files.txt")
    facts = {
        "root": content["root"],
        "checkpoints": {
            sig: [*files[sig].split("/"), entry["sha256"]]
            for sig, entry in content["checkpoints"].items()
        },
        "bags": {
            name: [bag["models"], bag.get("weights"), bag.get("segment")]
            for name, bag in bags.items()
            if not registry.is_community(name)
        },
        "community": {
            sig: [entry[key] for key in ("url", "sha256", "licence", "source")]
            for sig, entry in community["checkpoints"].items()
        },
        "community bags": {
            name: [bags[name]["models"], bags[name]["sources"]] for name in community["bags"]
        },
    }
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


def test_checkpoints() -> None:
    found = registry.checkpoints()
    demo = found.pop("demo")
    assert sha256(demo.embedded.read_bytes()).hexdigest() == demo.sha256
    assert len({checkpoint.file for checkpoint in found.values()}) == len(found) == 34
    for sig, checkpoint in found.items():
        checksum = re.search(r"-([0-9a-f]{8})\.th$", checkpoint.file)
        if not registry.is_community(sig):
            assert checkpoint.file.startswith(f"{sig}-")
            assert checksum
        if checksum:
            assert checkpoint.sha256.startswith(checksum[1])
        assert registry.is_community(sig) == bool(checkpoint.source)


def test_bags() -> None:
    found, known = registry.bags(), registry.checkpoints()
    assert {sig for bag in found.values() for sig in bag["models"]} == set(known) - {"demo"}
    for name, bag in found.items():
        assert len(bag.get("weights", bag["models"])) == len(bag["models"])
        assert all(len(row) == len(bag["sources"]) for row in bag.get("weights", []))
        for sig in bag["models"]:
            assert registry.is_community(sig) == registry.is_community(name)


def test_sizes_are_two_bytes_for_each_parameter() -> None:
    sizes = {sig: checkpoint.size for sig, checkpoint in registry.checkpoints().items()}
    assert sizes["955717e8"] == 84_000_000  # of 41 984 456 parameters
    assert sizes["5c90dfd2"] == 55_000_000
    assert sum(size is not None for size in sizes.values()) == 15
    assert not any(sizes[sig] for sig in registry.bags()["mdx_q"]["models"])


def test_the_architecture_of_weights_alone() -> None:
    (found,) = (c.architecture for c in registry.checkpoints().values() if c.architecture)
    assert found["klass"] == "demucs.htdemucs.HTDemucs"
    kwargs = found["kwargs"]
    assert kwargs["sources"] == ["vocals", "other"]
    assert (kwargs["segment"], kwargs["bottom_channels"], kwargs["dconv_mode"]) == (11, 512, 3)
    parameters = inspect.signature(demucs.htdemucs.HTDemucs).parameters
    assert set(kwargs) <= set(parameters) & set(inspect.signature(HTDemucs).parameters)


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


@pytest.mark.parametrize(
    ("environment", "folder", "expected"),
    [
        ({}, None, "home/.cache/torch/hub/checkpoints"),
        ({"XDG_CACHE_HOME": "xdg"}, None, "xdg/torch/hub/checkpoints"),
        ({"XDG_CACHE_HOME": "xdg", "TORCH_HOME": "~/torch"}, None, "home/torch/hub/checkpoints"),
        ({"TORCH_HOME": "torch", "DEMUCS_INFER_CACHE": "own"}, None, "own"),
        ({"DEMUCS_INFER_CACHE": "~/own"}, None, "home/own"),
        ({"DEMUCS_INFER_CACHE": "own"}, "given", "given"),
        ({"DEMUCS_INFER_CACHE": ""}, None, "home/.cache/torch/hub/checkpoints"),
    ],
)
def test_the_cache(
    environment: dict, folder: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "TORCH_HOME", "DEMUCS_INFER_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, "home")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert registry.cache_folder(folder) == Path(expected)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(ModelLoadingError, match="set DEMUCS_INFER_CACHE"):
        registry.cache_folder()


@pytest.mark.parametrize(
    ("value", "offline"), [("1", True), ("yes", True), ("0", False), ("", False), ("False", False)]
)
def test_offline(value: str, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
