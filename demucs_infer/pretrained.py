"""Load pretrained models by name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .engine.options import DEFAULT_MODEL, ModelOptions
from .errors import ModelLoadingError
from .fields import add_flags
from .hub import hf, registry
from .hub.registry import REMOTE_ROOT, is_offline, released_files
from .repo import CHECKPOINT_SUFFIXES, AnyModelRepo, BagOnlyRepo, LocalRepo, RemoteRepo

if TYPE_CHECKING:
    from torch import nn

    from .hdemucs import HDemucs

__all__ = [
    "DEFAULT_MODEL",
    "REMOTE_ROOT",
    "ROOT_URL",
    "SOURCES",
    "ModelLoadingError",
    "add_model_flags",
    "demucs_unittest",
    "find_model",
    "get_model",
    "get_model_from_args",
    "list_models",
    "model_label",
    "open_repo",
]

SOURCES = ["drums", "bass", "other", "vocals"]
ROOT_URL = "https://dl.fbaipublicfiles.com/demucs/"
UNITTEST_MODEL = "demucs_unittest"
BAG_SUFFIX = ".yaml"


def demucs_unittest() -> HDemucs:
    """Build a tiny model with random weights, for tests."""
    from .hdemucs import HDemucs

    return HDemucs(channels=4, sources=SOURCES)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `get_model_from_args` reads."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-s", "--sig", metavar="SIG", help="signature of a single model")
    group.add_argument(
        "-n",
        "--name",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="name of a model or bag, its file (MODEL.th, MODEL.safetensors, BAG.yaml), or"
        " hf://[NAMESPACE/]NAME[@REVISION] (default: %(default)s)",
    )
    add_flags(parser, ModelOptions)


def open_repo(
    repo: Path | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> AnyModelRepo:
    """Open the published models, or those in the folder `repo`. Raises `ModelLoadingError`."""
    if repo is None:
        remote = RemoteRepo(cache_dir=cache_dir, offline=offline)
        bags = {name: registry.REMOTE_ROOT / f"{name}.yaml" for name in registry.bags()}
        return AnyModelRepo(remote, BagOnlyRepo.of_files(bags, remote))
    if not repo.is_dir():
        raise ModelLoadingError(f"{repo}: is not a folder of models")
    local = LocalRepo(repo)
    return AnyModelRepo(local, BagOnlyRepo(repo, local))


def find_model(
    name: str | os.PathLike[str],
    repo: Path | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> tuple[AnyModelRepo, str]:
    """Return a repository that has the model `name`, and the model's name there.

    Names that are neither a file nor on the hub are those of `open_repo`. Raises
    `ModelLoadingError`.
    """
    name = os.fspath(name)
    if name.startswith(hf.SCHEME):
        model = hf.HubModel.parse(name)
        return AnyModelRepo.of_hub(model, is_offline(offline)), model.name
    if file := _file_of(name):
        return AnyModelRepo.of_file(file), file.stem
    return open_repo(repo, cache_dir=cache_dir, offline=offline), name


def _file_of(name: str) -> Path | None:
    """Return the file that a model's name is, or None. Raises `ModelLoadingError` for a lost path.

    A name without a folder that is not a file may still be a model's name.
    """
    path = Path(name)
    if path.suffix not in (*CHECKPOINT_SUFFIXES, BAG_SUFFIX):
        return None
    if path.is_file():
        return path
    if path.name != name:
        raise ModelLoadingError(f"{name}: no such file")
    return None


def model_label(name: str | os.PathLike[str]) -> str:
    """Name a model in the paths of its stems: without the folder, suffix or host of its file."""
    name = os.fspath(name)
    if name.startswith(hf.SCHEME):
        return hf.HubModel.parse(name).name
    file = _file_of(name)
    return file.stem if file else name


def get_model(
    name: str | os.PathLike[str],
    repo: Path | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> nn.Module:
    """Build a model or a bag in evaluation mode. Files that are not cached are fetched.

    Args:
        name: a bag (`htdemucs`), a signature (`955717e8`), or `demucs_unittest`; a file (`mine.th`,
            `mine.safetensors`, or `bag.yaml`, whose models lie beside it); or a model on the hub of
            Hugging Face (`hf://[NAMESPACE/]NAME[@REVISION]`), which is kept in that hub's cache.
        repo: a folder of checkpoints and bags, instead of the published ones.
        cache_dir: the folder to keep published checkpoints in (default: `DEMUCS_INFER_CACHE`, else
            that of PyTorch's hub, where `demucs` keeps them).
        offline: never fetch models (default: the variable `DEMUCS_INFER_OFFLINE`). Cached models
            need no connection anyway.

    Raises `ModelLoadingError` (a `RuntimeError`) for an unknown model or one that cannot be read,
    its subclass `DownloadError` for one that is not cached and cannot be fetched.
    """
    if name == UNITTEST_MODEL:
        return demucs_unittest().eval()
    folder = None if repo is None else Path(repo)
    models, found = find_model(name, folder, cache_dir=cache_dir, offline=offline)
    return models.get_model(found).eval()


def get_model_from_args(args: argparse.Namespace) -> nn.Module:
    """Build the model that options ask for: those of `add_model_flags`, or some of them."""
    # Programs replace `get_model` by functions that know only the older options.
    given = {name: getattr(args, name, None) for name in ("repo", "cache_dir", "offline")}
    given = {name: value for name, value in given.items() if value is not None}
    name = getattr(args, "sig", None) or getattr(args, "name", None) or DEFAULT_MODEL
    return get_model(name, **given)


def _parse_remote_files(remote_file_list: Path) -> dict[str, str]:
    """Read the list `REMOTE_ROOT / "files.txt"`: the address of each released checkpoint."""
    return {sig: ROOT_URL + file for sig, file in released_files(Path(remote_file_list)).items()}


def list_models(repo: Path | None = None) -> dict[str, dict[str, str | Path]]:
    """Single models and bags, as `{"single": {name: origin}, "bag": {name: origin}}`.

    The origin is an address or a file, and of a bag the YAML file that lists its models. Raises
    `ModelLoadingError` if `repo` is not a folder.
    """
    models = open_repo(None if repo is None else Path(repo))
    return {
        "single": dict(models.model_repo.list_model()),
        "bag": dict(models.bag_repo.list_model()),
    }
