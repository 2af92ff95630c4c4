from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from demucs_infer.apply import BagOfModels
from demucs_infer.errors import ModelLoadingError
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.pretrained import (
    add_model_flags,
    demucs_unittest,
    get_model,
    get_model_from_args,
    list_models,
)
from demucs_infer.repo import AnyModelRepo, BagOnlyRepo, LocalRepo, RemoteRepo, check_checksum
from demucs_infer.states import save_with_checksum

from .helpers import TINY


@pytest.fixture
def folder(repo: Path, tmp_path: Path) -> Path:
    """A copy of `repo` that a test may change."""
    return Path(shutil.copytree(repo, tmp_path / "models"))


def test_models_and_bags_of_a_folder(repo: Path) -> None:
    assert isinstance(get_model("tiny", repo), HTDemucs)
    bag = get_model("pair", repo)
    assert isinstance(bag, BagOfModels)
    assert len(bag.models) == 2
    assert not bag.training
    listed = list_models(repo)
    assert listed == {"single": {"tiny": repo / "tiny.th"}, "bag": {"pair": repo / "pair.yaml"}}


def test_flags(repo: Path) -> None:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    for flag in ("-s", "--sig", "-n", "--name"):
        args = parser.parse_args([flag, "tiny", "--repo", str(repo)])
        assert isinstance(get_model_from_args(args), HTDemucs)


def test_the_unittest_model() -> None:
    assert isinstance(demucs_unittest(), HDemucs)
    model = get_model("demucs_unittest")
    assert model.sources == ["drums", "bass", "other", "vocals"]
    assert not model.training


def test_checksums_are_checked(folder: Path) -> None:
    package = {"klass": HTDemucs, "args": (), "kwargs": TINY, "state": {}}
    path = save_with_checksum(package, folder / "b.th")
    check_checksum(path, path.stem.partition("-")[2])
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelLoadingError, match="is damaged"):
        get_model("b", folder)


def test_two_files_of_one_signature(folder: Path) -> None:
    shutil.copy(folder / "tiny.th", folder / "tiny-01234567.th")
    with pytest.raises(ModelLoadingError, match="two files are the model tiny"):
        get_model("tiny", folder)


def test_unknown_names_suggest_the_nearest(repo: Path) -> None:
    for name, message in (("tiyn", "Did you mean tiny"), ("xyz", "There is: pair, tiny")):
        with pytest.raises(ModelLoadingError, match=message):
            get_model(name, repo)
    with pytest.raises(ModelLoadingError, match="Did you mean htdemucs"):
        get_model("htdemuks")
    with pytest.raises(RuntimeError):
        get_model("htdemuks")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadingError, match="is not a folder"):
        get_model("tiny", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "not valid YAML"),
        ("- tiny", "does not list its models"),
        ("models: [tinny]", "Did you mean tiny"),
        ("models: [tiny]\nweights: [[1, 2]]", "weights"),
        ("models: []", "at least one"),
        ("models: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_bags_that_make_no_sense(folder: Path, text: str, message: str) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(ModelLoadingError, match=message):
        get_model("bad", folder)


def test_released_models_are_found_in_the_cache_of_demucs(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ModelLoadingError, match=r"fetch https://.*/955717e8-.*\.th into .*--repo"):
        get_model("htdemucs")
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(repo / "tiny.th", checkpoints / "tiny.th")
    models = RemoteRepo({"tiny": "https://host.invalid/folder/tiny.th"})
    assert models.has_model("tiny")
    either = AnyModelRepo(models, BagOnlyRepo(repo, models))
    assert isinstance(either.get_model("pair"), BagOfModels)
    with pytest.raises(ModelLoadingError, match="no model"):
        models.get_model("other")


def test_local_repo_scans_again(folder: Path) -> None:
    models = LocalRepo(folder)
    shutil.copy(folder / "tiny.th", folder / "more.th")
    assert not models.has_model("more")
    models.scan()
    assert list(models.list_model()) == ["more", "tiny"]
