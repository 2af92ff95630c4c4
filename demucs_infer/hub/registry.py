"""The registry of models, as data: what exists, where it is, and where it is kept here.

Reading it needs neither PyTorch nor a network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from ..errors import ModelLoadingError

REMOTE_ROOT = Path(__file__).parent.parent / "remote"
CACHE_VARIABLE = "DEMUCS_INFER_CACHE"  # the folder of checkpoints
MIRROR_VARIABLE = "DEMUCS_INFER_MIRROR"  # an address to fetch them from
OFFLINE_VARIABLE = "DEMUCS_INFER_OFFLINE"  # never fetch them
NO = ("", "0", "false", "no", "off")
EMBEDDED = "embedded"  # the group of models that come with the package
COMMUNITY = "community"  # the folder of a mirror for checkpoints that have none in the registry
MEGABYTE = 10**6  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A published file, or one that comes with the package.

    `sha256` are the leading digits of its digest that are known: of the registry's, all 64. `size`
    is in bytes, rounded, and None where it is not known. `architecture` (`klass`, `kwargs`) is that
    of a file with nothing but weights. `source` and `license` are those of community checkpoints.
    `embedded` is the file of one that comes with the package, and `sources` are its stems.
    """

    url: str
    sha256: str
    size: int | None = None
    description: str = ""
    source: str | None = None
    license: str | None = None
    architecture: Mapping[str, Any] | None = None
    embedded: Path | None = None
    sources: Sequence[str] | None = None

    @property
    def file(self) -> str:
        """The name of the file."""
        return _last_part(self.url)

    @classmethod
    def at(cls, url: str) -> Checkpoint:
        """What the address alone tells: the checksum in `SIGNATURE-CHECKSUM.th`, if any."""
        return cls(url, PurePosixPath(_last_part(url)).stem.partition("-")[2])


def _last_part(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name


@lru_cache(maxsize=1)
def registry() -> dict[str, Any]:
    """The content of `remote/registry.yaml`: `root`, `checkpoints`, `bags` and so on."""
    return dict(yaml.safe_load((REMOTE_ROOT / "registry.yaml").read_text(encoding="utf-8")))


def checkpoints() -> dict[str, Checkpoint]:
    """Every checkpoint by signature: those of the package, the published, the community's."""
    entries = {**registry()["checkpoints"], **registry()[COMMUNITY]["checkpoints"]}
    published = {signature: _checkpoint(entry) for signature, entry in entries.items()}
    return {**{name: _embedded(entry) for name, entry in registry()[EMBEDDED].items()}, **published}


def bags() -> dict[str, dict[str, Any]]:
    """Every published bag by name, the community's last."""
    return {**registry()["bags"], **registry()[COMMUNITY]["bags"]}


def is_community(name: str) -> bool:
    """Whether a bag or checkpoint is of others than the authors of Demucs."""
    group = registry()[COMMUNITY]
    return name in group["bags"] or name in group["checkpoints"]


def checkpoint_urls() -> dict[str, str]:
    """The address of each checkpoint, by signature."""
    return {signature: checkpoint.url for signature, checkpoint in checkpoints().items()}


def _embedded(entry: Mapping[str, Any]) -> Checkpoint:
    path = (REMOTE_ROOT / entry["file"]).absolute()
    return Checkpoint(
        path.as_uri(),
        entry["sha256"],
        description=entry["description"],
        embedded=path,
        sources=entry["sources"],
    )


def _checkpoint(entry: Mapping[str, Any]) -> Checkpoint:
    size = entry.get("megabytes")
    return Checkpoint(
        _url(entry),
        entry["sha256"],
        None if size is None else size * MEGABYTE,
        entry["description"],
        entry.get("source"),
        entry.get("license"),
        entry.get("architecture"),
    )


def _url(entry: Mapping[str, Any]) -> str:
    """The address, which is below `DEMUCS_INFER_MIRROR` if that is set."""
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror and "url" in entry:
        return str(entry["url"])
    root = mirror or registry()["root"]
    file = entry["file"] if "file" in entry else _last_part(entry["url"])
    return f"{root.rstrip('/')}/{entry.get('folder', COMMUNITY)}/{file}"


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Where checkpoints are kept: `folder`, `DEMUCS_INFER_CACHE`, or where `demucs` keeps them.

    The last is the folder of PyTorch's hub. Raises `ModelLoadingError` for a user without a home.
    """
    chosen = folder or os.environ.get(CACHE_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("TORCH_HOME") or Path(cache) / "torch"
    try:
        return Path(chosen or Path(hub) / "hub" / "checkpoints").expanduser()
    except RuntimeError as exc:
        raise ModelLoadingError(
            f"there is no home folder to keep models in: set {CACHE_VARIABLE} or --cache-dir"
        ) from exc


def is_offline(offline: bool | None = None) -> bool:
    """Whether fetching is forbidden: by `offline`, or by `DEMUCS_INFER_OFFLINE` if that is None."""
    if offline is not None:
        return offline
    return os.environ.get(OFFLINE_VARIABLE, "").strip().lower() not in NO
