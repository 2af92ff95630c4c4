"""A name becomes a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelLoadingError
from .registry import REMOTE_ROOT, checkpoint_urls, registry
from .repo import AnyModelRepo, BagOnlyRepo, LocalRepo, RegistryBagRepo, RemoteRepo

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
    "get_model",
    "get_model_from_args",
    "list_models",
    "open_repo",
]

DEFAULT_MODEL = "htdemucs"
SOURCES = ["drums", "bass", "other", "vocals"]
ROOT_URL = "https://dl.fbaipublicfiles.com/demucs/"
UNITTEST_MODEL = "demucs_unittest"


def demucs_unittest() -> HDemucs:
    """A tiny model with random weights, for tests."""
    from .hdemucs import HDemucs

    return HDemucs(channels=4, sources=SOURCES)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options that `get_model_from_args` reads."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-s", "--sig", metavar="SIG", help="signature of a single model")
    group.add_argument(
        "-n", "--name", metavar="NAME", help=f"name of a model or bag (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--repo",
        type=Path,
        metavar="DIR",
        help="folder of checkpoints (SIGNATURE[-CHECKSUM].th or .safetensors) and bags (NAME.yaml)"
        " to use instead of the released models",
    )


def open_repo(repo: Path | None = None) -> AnyModelRepo:
    """The released models, or those in the folder `repo`. Raises `ModelLoadingError`."""
    if repo is None:
        remote = RemoteRepo(checkpoint_urls())
        return AnyModelRepo(remote, RegistryBagRepo(registry()["bags"], remote))
    if not repo.is_dir():
        raise ModelLoadingError(f"{repo}: is not a folder of models")
    local = LocalRepo(repo)
    return AnyModelRepo(local, BagOnlyRepo(repo, local))


def get_model(name: str, repo: Path | None = None) -> nn.Module:
    """Build a model or a bag in evaluation mode.

    Args:
        name: a bag (`htdemucs`), a signature (`955717e8`), or `demucs_unittest`.
        repo: a folder of checkpoints and bags, instead of the released ones.

    Raises `ModelLoadingError` (a `RuntimeError`) if there is none, or it cannot be read.
    """
    if name == UNITTEST_MODEL:
        return demucs_unittest().eval()
    return open_repo(None if repo is None else Path(repo)).get_model(name).eval()


def get_model_from_args(args: argparse.Namespace) -> nn.Module:
    """The model that the options of `add_model_flags` ask for."""
    return get_model(name=args.sig or args.name or DEFAULT_MODEL, repo=args.repo)


def list_models(repo: Path | None = None) -> dict[str, dict[str, str | Path]]:
    """Single models and bags, as `{"single": {name: origin}, "bag": {name: origin}}`.

    The origin is an address or a file. Raises `ModelLoadingError` if `repo` is no folder.
    """
    models = open_repo(None if repo is None else Path(repo))
    return {
        "single": dict(models.model_repo.list_model()),
        "bag": dict(models.bag_repo.list_model()),
    }
