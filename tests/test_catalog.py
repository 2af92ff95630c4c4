"""The commands `--list-models` and `--download`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from demucs_infer.api import list_models
from demucs_infer.catalog import catalog
from demucs_infer.hub import registry

from .helpers import SOURCES, assert_one_line, separate
from .tools import web as answers
from .tools.web import Web


def line_of(name: str, text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
    return line


def test_released_models_are_listed_with_size_and_stems() -> None:
    text = separate("--list-models", "--cache-dir", "nowhere").stdout
    for name, words in {
        "htdemucs": ["84 MB", "drums, bass, other, vocals", "default"],
        "htdemucs_ft": ["336 MB"],
        "htdemucs_6s": ["guitar, piano"],
        "mdx_q": ["size unknown"],
        "uvr_demucs_model_1": ["size unknown"],
        "demo": ["3 MB", "drums, bass, other, vocals"],
    }.items():
        for word in words:
            assert word in line_of(name, text)
    assert text.replace("not on disk", "").count("on disk") == 1
    assert " on disk" in line_of("demo", text).replace("not on disk", "")
    assert text.index("htdemucs_6s") < text.index("community") < text.index("drumsep")
    assert "TRvlvr/model_repo" in text and "licence: not stated" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "955717e8" not in text
    assert "955717e8" in separate("--list-models", "--verbose", "--cache-dir", "nowhere").stdout


def test_python_lists_the_models_of_the_catalog() -> None:
    listed = list_models()
    assert set(listed) == {"single", "bag"}
    assert len(listed["bag"]) == 17
    for kind, names in listed.items():
        assert list(names) == [entry.name for entry in catalog() if entry.kind == kind]


def test_json_describes_models_and_their_files(
    published: Web, checkpoint: bytes, tmp_path: Path
) -> None:
    separate("--download", "first")
    content = json.loads(separate("--list-models", "--json").stdout)
    assert content["folder"] == str(tmp_path / "cache")
    models = {model["name"]: model for model in content["models"]}
    assert list(models) == ["one", "both", "foreign", "first", "second", "foreign_state"]
    both = models["both"]
    assert (both["kind"], both["group"], both["stems"]) == ("bag", "released", SOURCES)
    assert (both["size"], both["on_disk"]) == (None, False)
    assert both["models"] == ["first", "second"]
    first = models["first"]
    assert (first["size"], first["on_disk"]) == (len(checkpoint), True)
    (file,) = first["files"]
    assert Path(file["path"]).read_bytes() == checkpoint
    assert file["url"].startswith(f"{published.url}/models/first-")
    foreign = models["foreign"]
    assert foreign["group"] == "community"
    assert (foreign["files"][0]["source"], foreign["files"][0]["licence"]) == ("someone", "MIT")
    assert (foreign["licence"], first["licence"]) == ("MIT", "not stated")
    assert "not on disk" not in line_of("one", separate("--list-models").stdout)


def test_models_of_a_folder_are_listed(repo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repo, tmp_path / "models"))
    (folder / "broken.yaml").write_text("models: [tiny, absent]")
    (folder / f"{'long' * 20}.yaml").write_text("models: [tiny]")
    content = json.loads(separate("--list-models", "--json", "--repo", folder).stdout)
    models = {model["name"]: model for model in content["models"]}
    size = (repo / "tiny.th").stat().st_size
    assert {name: (m["size"], m["on_disk"]) for name, m in models.items()} == {
        "pair": (size, True),
        "tiny": (size, True),
        "broken": (None, False),
        "long" * 20: (size, True),
    }
    assert models["tiny"]["stems"] is None
    text = separate("--list-models", "--repo", folder).stdout
    assert max(map(len, text.splitlines())) <= 100
    line = line_of("broken", text)
    assert "not on disk" in line and "size unknown" in line


def test_download_prints_paths_and_replaces_damaged_files(
    published: Web, track: Path, tmp_path: Path
) -> None:
    result = separate("--download", "both", "first", "foreign")
    assert (result.returncode, result.stderr) == (0, "")
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert sorted(paths) == sorted((tmp_path / "cache").iterdir())
    assert len(published.paths) == 3
    whole = paths[0].read_bytes()
    paths[0].write_bytes(b"damaged")
    assert_one_line(separate("--download", "both", "--offline"), paths[0].name, "damaged")
    again = separate("--download", "both")
    assert (again.returncode, again.stdout.count("\n")) == (0, 2)
    assert paths[0].name in again.stderr
    assert paths[0].read_bytes() == whole
    assert len(published.paths) == 4
    options = ["-n", "one", "-o", tmp_path / "out", "--cache-dir", tmp_path / "here"]
    assert separate(*options, track).returncode == 0
    assert len(list((tmp_path / "out").rglob("*.wav"))) == 4
    assert len(list((tmp_path / "here").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("--download bothh", 1, ["'bothh'", "Did you mean both?"]),
        ("--download one --offline", 1, ["/models/first-", "SHA-256", "--repo"]),
        ("--download both --offline", 1, ["/models/first-", "/models/second-"]),
        ("--download one", 1, ["404", "SHA-256", "--repo"]),
        ("--download one --repo .", 2, ["--repo"]),
        ("--download", 2, ["--download"]),
        (f"-n one --offline {__file__}", 1, ["/models/first-", "SHA-256"]),
    ],
)
def test_models_that_cannot_be_fetched_are_one_line(
    options: str, status: int, words: list[str], published: Web, tmp_path: Path
) -> None:
    published.always = answers.status(404)
    result = separate(*options.split(), "-o", tmp_path / "out")
    assert (result.returncode, result.stdout) == (status, "")
    assert_one_line(result, *words)


def test_model_in_the_package_needs_no_network_and_no_cache(track: Path, tmp_path: Path) -> None:
    absent = ["--cache-dir", tmp_path / "absent"]
    content = json.loads(separate("--list-models", "--json", *absent).stdout)
    (demo,) = (model for model in content["models"] if model["name"] == "demo")
    assert (demo["group"], demo["stems"], demo["on_disk"]) == ("embedded", SOURCES, True)
    (file,) = demo["files"]
    assert Path(file["path"]).stat().st_size == demo["size"] < 3_000_000
    result = separate("--download", "demo", "--offline", *absent)
    assert result.stdout == f"{file['path']}\n"
    result = separate("-n", "demo", "--offline", *absent, "-o", tmp_path / "out", track)
    assert result.returncode == 0, result.stderr
    assert {p.stem for p in (tmp_path / "out/demo/track").iterdir()} == set(SOURCES)
    assert not (tmp_path / "absent").exists()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the files in the package, which is used in their place."""
    copy = Path(shutil.copytree(registry.REMOTE_ROOT, tmp_path / "remote"))
    monkeypatch.setattr(registry, "REMOTE_ROOT", copy)
    registry.registry.cache_clear()
    yield copy
    registry.registry.cache_clear()


def test_damaged_package_is_to_be_installed_again(package: Path) -> None:
    path = package / "demo.safetensors"
    path.write_bytes(b"")
    assert_one_line(separate("--download", "demo"), path.name, "damaged", "Install")
    path.unlink()
    for options in ([], ["--offline"]):
        missing = separate("--download", "demo", *options)
        assert_one_line(missing, path.name, "Install")
        assert missing.stdout == ""
