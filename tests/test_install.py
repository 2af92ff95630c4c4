"""Commands that install the package, and other projects that depend on it by path."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from demucs_infer import __version__

from .helpers import run

ROOT = Path(__file__).parents[1]
TEXTS = (".md", ".py", ".toml", ".yaml", ".yml", ".txt")
# The name with or without extras, as an index would be asked for it.
FROM_AN_INDEX = re.compile(r"""(?<!un)install\s+(-\S+\s+)*["']?demucs[-_]infer\b""")
OTHERS = {"venv", "build", "dist", "shared"}


def texts() -> list[Path]:
    """Return the project's text files, without this one."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in OTHERS]
    own = [path for path in folders if not path.name.startswith(".") or path.name == ".github"]
    paths = [*ROOT.iterdir(), *(path for folder in own for path in folder.rglob("*"))]
    found = [p for p in paths if p.is_file() and (p.suffix in TEXTS or p.name == "LICENSE")]
    return [path for path in found if path != Path(__file__)]


def test_no_text_installs_the_other_project_of_this_name_from_pypi() -> None:
    named = {path.relative_to(ROOT).as_posix() for path in texts()}
    assert {"README.md", "docs/batch.md", "demucs_infer/errors.py", "LICENSE"} <= named
    for path in texts():
        text = path.read_text(encoding="utf-8")
        assert not FROM_AN_INDEX.search(text), path
        if path.name != "pyproject.toml":  # whose extras are made of each other
            assert "demucs-infer[" not in text, path
    assert "not the package\nof that name on PyPI" in (ROOT / "README.md").read_text("utf-8")


def write_project(folder: Path, dependencies: list[str], **paths: Path) -> Path:
    """Write a project of one module, with dependencies that uv finds at `paths`."""
    folder.mkdir()
    (folder / "module.py").touch()
    sources = "".join(f"{n.replace('_', '-')} = {{ path = {str(paths[n])!r} }}\n" for n in paths)
    (folder / "pyproject.toml").write_text(
        f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{folder.name}"
version = "1"
dependencies = {dependencies}
[tool.hatch.build.targets.wheel]
include = ["module.py"]
[tool.uv.sources]
{sources}"""
    )
    return folder


@pytest.mark.slow
def test_pip_accepts_the_package_as_a_later_demucs_4(tmp_path: Path) -> None:
    project = write_project(tmp_path / "other", ["demucs-infer>=4.2"])
    report = tmp_path / "report.json"
    options = ["--dry-run", "--no-index", "--no-build-isolation", "--quiet", "--report", report]
    without_ours = run("-m", "pip", "install", *options, "--ignore-installed", project)
    assert "No matching distribution found for demucs-infer>=4.2" in without_ours.stderr
    result = run("-m", "pip", "install", *options, ROOT, project)
    assert result.returncode == 0, result.stderr
    planned = {item["metadata"]["name"]: item for item in json.loads(report.read_text())["install"]}
    assert planned["demucs-infer"]["metadata"]["version"] == __version__
    assert "other" in planned


@pytest.mark.slow
@pytest.mark.skipif(find_spec("uv") is None, reason="needs uv")
@pytest.mark.parametrize(("wanted", "fits"), [(">=4.2", True), (">=6", False)])
def test_uv_accepts_the_package_as_a_later_demucs_4(
    wanted: str, fits: bool, tmp_path: Path
) -> None:
    other = write_project(tmp_path / "other", [f"demucs-infer{wanted}"])
    app = write_project(tmp_path / "app", ["demucs-infer", "other"], demucs_infer=ROOT, other=other)
    options = ["--dry-run", "--offline", "--no-index", "--no-build-isolation"]
    result = run("-m", "uv", "pip", "install", *options, "--python", sys.executable, app)
    assert (result.returncode == 0) == fits, result.stderr
    planned = f"+ demucs-infer @ {ROOT.as_uri()}" if fits else "No solution found"
    assert planned in result.stderr


def test_links_of_documents_lead_to_files() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
