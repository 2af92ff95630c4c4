"""A name becomes a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .engine.options import DEFAULT_MODEL, ModelOptions, add_flags
from .errors import ModelLoadingError
from .hub.registry import REMOTE_ROOT, bags, checkpoint_urls, checkpoints
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
    "open_remote",
    "open_repo",
]

SOURCES = ["drums", "bass", "other", "vocals"]
ROOT_URL = "https://dl.fbaipublicfiles.com/demucs/"
UNITTEST_MODEL = "demucs_unittest"


def demucs_unittest() -> HDemucs:
    """A tiny model with random weights, for tests."""
    from .hdemucs import HDemucs

    return HDemucs(channels=4, sources=SOURCES)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `get_model_from_args` reads."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-s", "--sig", metavar="SIG", help="signature of a single model")
    group.add_argument(
        "-n", "--name", metavar="NAME", help=f"name of a model or bag (default: {DEFAULT_MODEL})"
    )
    add_flags(parser, ModelOptions)


def open_repo(
    repo: Path | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> AnyModelRepo:
    """The published models, or those in the folder `repo`. Raises `ModelLoadingError`."""
    if repo is None:
        remote = open_remote(cache_dir=cache_dir, offline=offline)
        return AnyModelRepo(remote, RegistryBagRepo(bags(), remote))
    if not repo.is_dir():
        raise ModelLoadingError(f"{repo}: is not a folder of models")
    local = LocalRepo(repo)
    return AnyModelRepo(local, BagOnlyRepo(repo, local))


def open_remote(
    *, cache_dir: str | os.PathLike[str] | None = None, offline: bool | None = None
) -> RemoteRepo:
    """The published checkpoints."""
    return RemoteRepo(
        checkpoint_urls(), checkpoints=checkpoints(), cache_dir=cache_dir, offline=offline
    )


def get_model(
    name: str,
    repo: Path | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> nn.Module:
    """Build a model or a bag in evaluation mode, from files that are fetched if need be.

    Args:
        name: a bag (`htdemucs`), a signature (`955717e8`), or `demucs_unittest`.
        repo: a folder of checkpoints and bags, instead of the published ones.
        cache_dir: the folder to keep published checkpoints in (default: `DEMUCS_INFER_CACHE`, else
            that of PyTorch's hub, where `demucs` keeps them).
        offline: never fetch (default: what `DEMUCS_INFER_OFFLINE` says). What is in the cache
            needs no connection anyway.

    Raises `ModelLoadingError` (a `RuntimeError`) if there is none, or it cannot be read; its
    subclass `DownloadError` if it is not there and cannot be fetched.
    """
    if name == UNITTEST_MODEL:
        return demucs_unittest().eval()
    models = open_repo(None if repo is None else Path(repo), cache_dir=cache_dir, offline=offline)
    return models.get_model(name).eval()


def get_model_from_args(args: argparse.Namespace) -> nn.Module:
    """The model that the options of `add_model_flags` ask for."""
    return get_model(
        name=getattr(args, "sig", None) or args.name or DEFAULT_MODEL,
        repo=args.repo,
        cache_dir=getattr(args, "cache_dir", None),
        offline=getattr(args, "offline", None),
    )


def list_models(repo: Path | None = None) -> dict[str, dict[str, str | Path]]:
    """Single models and bags, as `{"single": {name: origin}, "bag": {name: origin}}`.

    The origin is an address or a file, and of a published bag its definition. Raises
    `ModelLoadingError` if `repo` is no folder.
    """
    models = open_repo(None if repo is None else Path(repo))
    return {
        "single": dict(models.model_repo.list_model()),
        "bag": dict(models.bag_repo.list_model()),
    }
