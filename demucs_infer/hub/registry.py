"""The registry of models, as data: which there are, their URLs, and where they are cached.

`remote/` has `files.txt` and `NAME.yaml`, in demucs's formats, and `registry.yml` for what those
cannot hold. Reading them needs neither PyTorch nor a network. They are part of the package, so that
a test checks them, and not each start.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ModelLoadingError
from .checkpoints import MAX_YAML, Bag, Content

REMOTE_ROOT = Path(__file__).parent.parent / "remote"
CACHE_VARIABLE = "DEMUCS_INFER_CACHE"  # the folder of checkpoints
MIRROR_VARIABLE = "DEMUCS_INFER_MIRROR"  # a URL to fetch them from
OFFLINE_VARIABLE = "DEMUCS_INFER_OFFLINE"  # never fetch them
NO = ("", "0", "false", "no", "off")
COMMUNITY = "community"  # the group of others' models, and their folder in a mirror
MEGABYTE = 10**6  # bytes
NOT_STATED = "not stated"  # a licence


@dataclass(frozen=True)
class Checkpoint:
    """A published file, or one that comes with the package.

    `origin` is the URL at its own host, `in_mirror` the path below a mirror. `sha256` are the
    leading digits of its digest that are known, in the registry all 64. `size` is in bytes,
    rounded, None if unknown. `architecture` (`klass`, `kwargs`) is that of a file of weights alone.
    `source` is the author of a community checkpoint. `embedded` is the file of one that comes with
    the package, `sources` its stems. `safetensors_sha256` is the digest of the same weights on the
    hub, if it is known.
    """

    origin: str
    sha256: str
    size: int | None = None
    description: str = ""
    source: str | None = None
    licence: str = NOT_STATED
    architecture: Mapping[str, Any] | None = None
    safetensors_sha256: str = ""
    in_mirror: str = ""
    embedded: Path | None = None
    sources: Sequence[str] | None = None

    @property
    def file(self) -> str:
        """The name of the file."""
        return _file_name(self.origin)

    @property
    def urls(self) -> list[str]:
        """The URLs of the file: on the mirror, if one is set, and on its host."""
        mirror = os.environ.get(MIRROR_VARIABLE)
        mirrored = [f"{mirror.rstrip('/')}/{self.in_mirror}"] if mirror and self.in_mirror else []
        return [*mirrored, self.origin]

    @property
    def url(self) -> str:
        """The URL that is tried first."""
        return self.urls[0]


def _file_name(url: str) -> str:
    return re.split("[?#]", url, maxsplit=1)[0].rpartition("/")[2]


@dataclass(frozen=True)
class Registry:
    """Checkpoints by signature, bags by name, and the names of both that are the community's."""

    checkpoints: dict[str, Checkpoint]
    bags: dict[str, dict[str, Any]]
    community: frozenset[str]


@lru_cache(maxsize=1)
def registry() -> Registry:
    """Read the registry. Raises `ModelLoadingError` if the installation is damaged."""
    try:
        return _read()
    except (AttributeError, LookupError, OSError, OverflowError, TypeError, ValueError) as exc:
        text = f"{REMOTE_ROOT}: is damaged ({' '.join(repr(exc).split())[:200]})"
        raise ModelLoadingError(f"{text}: install the package again") from exc


def _read() -> Registry:
    content: Any = Content.read(REMOTE_ROOT / "registry.yml", "registry", MAX_YAML).yaml()
    files, community = released_files(REMOTE_ROOT / "files.txt"), content[COMMUNITY]
    found, bags = {}, {}
    for sig, entry in content["embedded"].items():
        path = (REMOTE_ROOT / entry["file"]).absolute()
        found[sig] = _checkpoint(entry, path.as_uri(), embedded=path, sources=[*entry["sources"]])
    for sig, entry in content["checkpoints"].items():
        found[sig] = _checkpoint(entry, content["root"] + files[sig], in_mirror=files[sig])
    for sig, entry in community["checkpoints"].items():
        in_mirror = f"{COMMUNITY}/{_file_name(entry['url'])}"
        found[sig] = _checkpoint(entry, entry["url"], in_mirror=in_mirror)
    for name, entry in {**content["bags"], **community["bags"]}.items():
        bag = vars(Bag.read(REMOTE_ROOT / f"{name}.yaml"))
        if unknown := set(bag["models"]) - set(found):
            raise LookupError(f"{name}.yaml: no checkpoint {min(unknown)}")
        bags[name] = {"description": str(entry["description"]), "sources": [*entry["sources"]]}
        bags[name] |= {key: value for key, value in bag.items() if value is not None}
    return Registry(found, bags, frozenset((*community["checkpoints"], *community["bags"])))


def _checkpoint(entry: Mapping[str, Any], origin: str, **more: Any) -> Checkpoint:
    size = entry.get("megabytes")
    return Checkpoint(
        str(origin),
        str(entry["sha256"]),
        None if size is None else int(size) * MEGABYTE,
        str(entry["description"]),
        entry.get("source"),
        str(entry.get("licence", NOT_STATED)),
        entry.get("architecture"),
        str(entry.get("safetensors_sha256", "")),
        **more,
    )


def released_files(file_list: Path) -> dict[str, str]:
    """Read a list of files in demucs's format: `FOLDER/FILE` of each checkpoint, by signature.

    A line `root: FOLDER/` is for the files that follow; `#` starts a comment. Raises
    `ModelLoadingError` for two files of one signature.
    """
    folder, files = "", {}
    for line in map(str.strip, file_list.read_text(encoding="utf-8").splitlines()):
        key, _, value = line.partition(":")
        if key == "root":
            folder = value.strip()
        elif line and not line.startswith("#"):
            signature = line.partition("-")[0]
            if signature in files:
                raise ModelLoadingError(f"{file_list}: two files are the model {signature}")
            files[signature] = folder + line
    return files


def checkpoints() -> dict[str, Checkpoint]:
    """Return every checkpoint by signature: of the package, the published, the community's."""
    return dict(registry().checkpoints)


def bags() -> dict[str, dict[str, Any]]:
    """Return the description, sources, models, weights and segment of every bag, by name."""
    return dict(registry().bags)


def bags_with(signature: str) -> list[str]:
    """Return the released bags that a checkpoint is in."""
    found = bags().items()
    return [name for name, bag in found if signature in bag["models"] and not is_community(name)]


def is_community(name: str) -> bool:
    """Return True if a bag or checkpoint is not by the authors of Demucs."""
    return name in registry().community


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of checkpoints: `folder`, `DEMUCS_INFER_CACHE`, or PyTorch's hub.

    A program may have chosen the latter with `torch.hub.set_dir`. Raises `ModelLoadingError` for a
    user without a home.
    """
    chosen = folder or os.environ.get(CACHE_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub: Any = Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch") / "hub"
    if not chosen and (torch_hub := getattr(sys.modules.get("torch"), "hub", None)):
        hub = torch_hub.get_dir()
    try:
        return Path(chosen or Path(hub) / "checkpoints").expanduser()
    except RuntimeError as exc:
        raise ModelLoadingError(
            f"the home folder, for the cache, is not known: set {CACHE_VARIABLE} or --cache-dir"
        ) from exc


def is_offline(offline: bool | None = None) -> bool:
    """Return True if fetching is forbidden: by `offline`, or if that is None by the environment."""
    if offline is not None:
        return offline
    return os.environ.get(OFFLINE_VARIABLE, "").strip().lower() not in NO
