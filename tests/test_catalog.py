"""`--list-models` and `--download`, in processes of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from demucs_infer.api import list_models
from demucs_infer.catalog import catalog
from demucs_infer.hub import registry
from demucs_infer.separate import main

from . import web as answers
from .helpers import SOURCES, run, separate
from .web import Web

MAIN = "from demucs_infer.separate import main; import sys; main(sys.argv[1:])"


def command(web: Web, *options: object):
    """Run the command line with the registry of `web`."""
    return run("-c", f"{web.code}{MAIN}", *options)


def line_of(name: str, text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
    return line


def test_the_released_models() -> None:
    text = separate("--list-models", "--cache-dir", "nowhere").stdout
    assert "84 MB  drums, bass, other, vocals: the default" in line_of("htdemucs", text)
    assert "336 MB" in line_of("htdemucs_ft", text)
    assert "guitar, piano" in line_of("htdemucs_6s", text)
    assert "size unknown" in line_of("mdx_q", text)
    assert "TRvlvr/model_repo, licence: not stated" in line_of("uvr_demucs_model_1", text)
    assert "3 MB  drums, bass, other, vocals: a demonstration" in line_of("demo", text)
    assert text.replace("not on disk", "").count("on disk") == 1  # the demo
    community = text.index("of the community")
    assert text.index("955717e8") < community < text.index("drumsep")


def test_python_lists_what_json_lists() -> None:
    listed = list_models()
    assert set(listed) == {"single", "bag"}
    assert len(listed["bag"]) == 17
    for kind, names in listed.items():
        assert list(names) == [entry.name for entry in catalog() if entry.kind == kind]


def test_json(published: Web, checkpoint: bytes, tmp_path: Path) -> None:
    command(published, "--download", "first")
    content = json.loads(command(published, "--list-models", "--json").stdout)
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
    assert "\n    one   on disk  " in command(published, "--list-models").stdout


def test_a_local_folder(repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(repo, tmp_path / "models"))
    (folder / "broken.yaml").write_text("models: [tiny, absent]")
    main(["--list-models", "--json", "--repo", str(folder)])
    models = {m["name"]: m for m in json.loads(capsys.readouterr().out)["models"]}
    size = (repo / "tiny.th").stat().st_size
    assert {name: (m["size"], m["on_disk"]) for name, m in models.items()} == {
        "pair": (size, True),
        "tiny": (size, True),
        "broken": (None, False),
    }
    assert models["tiny"]["stems"] is None
    main(["--list-models", "--repo", str(folder)])
    assert "not on disk  size unknown" in line_of("broken", capsys.readouterr().out)


def test_download(published: Web, tmp_path: Path) -> None:
    result = command(published, "--download", "both", "first", "foreign")
    assert (result.returncode, result.stderr) == (0, "")
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert sorted(paths) == sorted((tmp_path / "cache").iterdir())
    assert len(published.paths) == 3
    paths[0].write_bytes(b"damaged")
    again = command(published, "--download", "both", "--offline")
    assert again.returncode == 1
    assert "is damaged" in again.stderr
    again = command(published, "--download", "both")
    assert (again.returncode, again.stdout.count("\n")) == (0, 2)
    assert "downloaded again" in again.stderr
    assert len(published.paths) == 4


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--download", "bothh"], 1, ["no model is named 'bothh'", "Did you mean both?"]),
        (["--download", "one", "--offline"], 1, ["not on this machine", "SHA-256", "--repo"]),
        (["--download", "both", "--offline"], 1, ["/models/first-", "/models/second-"]),
        (["--download", "one"], 1, ["404 Not Found", "SHA-256", "--repo"]),
        (["--download", "one", "--repo", "."], 2, ["leave out --repo"]),
        (["--download"], 2, ["--download"]),
        (["-n", "one", "--offline", "song.wav"], 1, ["not on this machine", "SHA-256"]),
    ],
    ids=str,
)
def test_one_line_says_what_is_wrong(
    options: list, status: int, words: list, published: Web, tmp_path: Path
) -> None:
    published.always = answers.status(404)
    result = command(published, "-o", tmp_path / "out", *options)
    assert (result.returncode, result.stdout) == (status, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("demucs-infer: error: ")
    for word in words:
        assert word in line


def test_a_track_with_a_fetched_model(published: Web, track: Path) -> None:
    options = ["-n", "one", "-o", track.parent / "out", "--cache-dir", track.parent / "here"]
    result = command(published, *options, track)
    assert result.returncode == 0, result.stderr
    assert len(list((track.parent / "out").rglob("*.wav"))) == 4
    assert len(list((track.parent / "here").iterdir())) == 1
    assert len(published.paths) == 1


def test_the_model_in_the_package(
    track: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs no network, no cache and no home, and is verified like any other."""
    main(["--list-models", "--json", "--cache-dir", str(tmp_path / "absent")])
    (demo,) = (m for m in json.loads(capsys.readouterr().out)["models"] if m["name"] == "demo")
    assert (demo["group"], demo["stems"], demo["on_disk"]) == ("embedded", SOURCES, True)
    (file,) = demo["files"]
    assert Path(file["path"]).stat().st_size == demo["size"] < 3_000_000
    offline = ["--offline", "--cache-dir", str(tmp_path / "absent")]
    main(["--download", "demo", *offline])
    assert capsys.readouterr().out == f"{file['path']}\n"
    result = separate("-n", "demo", *offline, "-o", tmp_path / "out", track)
    assert result.returncode == 0, result.stderr
    assert {p.stem for p in (tmp_path / "out/demo/track").iterdir()} == set(SOURCES)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda path: path.write_bytes(b""), "is damaged"), (Path.unlink, "not on this machine")],
)
@pytest.mark.parametrize("options", [[], ["--offline"]])
def test_a_damaged_package(damage, words: str, options: list, tmp_path: Path) -> None:
    package = shutil.copytree(registry.REMOTE_ROOT, tmp_path / "remote")
    damage(package / "demo.safetensors")
    elsewhere = (
        f"from demucs_infer.hub import registry; registry.REMOTE_ROOT = Path({str(package)!r});"
    )
    result = run(
        "-c", f"from pathlib import Path; {elsewhere}{MAIN}", "--download", "demo", *options
    )
    (line,) = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (1, "")
    assert words in line
    assert "install this package again" in line
