"""The registry of models, as data: what exists, where it is, and where it is kept here.

Three kinds of files in `remote/` make it: `files.txt` and `NAME.yaml`, in demucs's formats, and
`registry.yaml` for what those have no room for. Reading them needs neither PyTorch nor a network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ..errors import ModelLoadingError
from .bags import Bag
from .content import Content

REMOTE_ROOT = Path(__file__).parent.parent / "remote"
CACHE_VARIABLE = "DEMUCS_INFER_CACHE"  # the folder of checkpoints
MIRROR_VARIABLE = "DEMUCS_INFER_MIRROR"  # an address to fetch them from
OFFLINE_VARIABLE = "DEMUCS_INFER_OFFLINE"  # never fetch them
NO = ("", "0", "false", "no", "off")
EMBEDDED = "embedded"  # the group of models that come with the package
COMMUNITY = "community"  # the folder of a mirror for checkpoints that have none in the registry
MEGABYTE = 10**6  # bytes
REGISTRY_FILE = "registry.yaml"
LARGEST_REGISTRY = 2**18  # bytes

# Fields of the registry's parts, and their types; one that may be None may be missing.
CONTENT = {"root": str, EMBEDDED: dict, "checkpoints": dict, "bags": dict, COMMUNITY: dict}
GROUP = {"checkpoints": dict, "bags": dict}
CHECKPOINT = {
    "description": str,
    "sha256": str,
    "megabytes": int | None,
    **dict.fromkeys(("url", "source", "licence", "safetensors_sha256"), str | None),
    "architecture": dict | None,
}
BAG = {"description": str, "sources": list}
OWN = {**BAG, "file": str, "licence": str, "sha256": str}
ARCHITECTURE = {"klass": str, "kwargs": dict}
NOT_STATED = "not stated"  # a licence


@dataclass(frozen=True)
class Checkpoint:
    """A published file, or one that comes with the package.

    `url` is asked first, then `others`, addresses of the same file. `sha256` are the leading digits
    of its digest that are known: of the registry's, all 64. `size` is in bytes, rounded, and None
    where it is not known. `architecture` (`klass`, `kwargs`) is that of a file with nothing but
    weights. `source` is whose a community checkpoint is. `embedded` is the file of one that comes
    with the package, and `sources` are its stems. `safetensors_sha256` is the digest of the same
    weights on the hub of Hugging Face, if it is known.
    """

    url: str
    sha256: str
    size: int | None = None
    description: str = ""
    source: str | None = None
    licence: str = NOT_STATED
    architecture: Mapping[str, Any] | None = None
    embedded: Path | None = None
    sources: Sequence[str] | None = None
    others: Sequence[str] = ()
    safetensors_sha256: str = ""

    @property
    def file(self) -> str:
        """The name of the file."""
        return _last_part(self.url)

    @classmethod
    def at(cls, url: str) -> Checkpoint:
        """Take what the address alone tells: the checksum in `SIGNATURE-CHECKSUM.th`, if any."""
        return cls(url, PurePosixPath(_last_part(url)).stem.partition("-")[2])


def _last_part(url: str) -> str:
    try:
        return PurePosixPath(urlsplit(url).path).name
    except ValueError as exc:
        raise ModelLoadingError(f"{url!r} is no address ({exc})") from exc


@lru_cache(maxsize=1)
def registry() -> dict[str, Any]:
    """The content of `remote/registry.yaml`: `root`, `checkpoints`, `bags` and so on.

    Raises `ModelLoadingError` if it is damaged.
    """
    path = REMOTE_ROOT / REGISTRY_FILE
    content = Content.read(path, "registry").yaml(LARGEST_REGISTRY)
    try:
        _check_content(content)
    except ModelLoadingError as exc:
        raise ModelLoadingError(f"{path}: is damaged: {exc}: install the package again") from exc
    return content


def _check_content(content: Any) -> None:
    _check("it", content, CONTENT)
    _check(COMMUNITY, content[COMMUNITY], GROUP)
    _check_all(content[EMBEDDED], OWN)
    _check_all(content["checkpoints"], CHECKPOINT)
    _check_all(content[COMMUNITY]["checkpoints"], {**CHECKPOINT, "url": str})
    for group in (content, content[COMMUNITY]):
        _check_all(group["bags"], BAG)


def _check_all(entries: Mapping[Any, Any], fields: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        _check(str(name), entry, {**fields, **({} if isinstance(name, str) else {"name": str})})
        if entry.get("architecture") is not None:
            _check(name, entry["architecture"], ARCHITECTURE)
        if not all(isinstance(stem, str) for stem in entry.get("sources") or ()):
            raise ModelLoadingError(f"{name} has a stem without a name")


def _check(name: str, entry: Any, fields: Mapping[str, Any]) -> None:
    """Raise `ModelLoadingError` for an entry without the fields that it needs."""
    if not isinstance(entry, dict):
        raise ModelLoadingError(f"{name} has no fields")
    for field, kind in fields.items():
        if not isinstance(entry.get(field), kind):
            raise ModelLoadingError(f"{name} has no {field} that makes sense")


def is_registry(path: Path) -> bool:
    """Tell the registry, which lies among bags, from a bag."""
    return path.name == REGISTRY_FILE and path.parent.resolve() == REMOTE_ROOT.resolve()


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


_released_files = lru_cache(maxsize=None)(released_files)


def checkpoints() -> dict[str, Checkpoint]:
    """Every checkpoint by signature: those of the package, the published, the community's."""
    content, files = registry(), _released_files(REMOTE_ROOT / "files.txt")
    found = {sig: _embedded(entry) for sig, entry in content[EMBEDDED].items()}
    for sig, entry in content["checkpoints"].items():
        if sig not in files:
            raise ModelLoadingError(f"{REMOTE_ROOT / 'files.txt'}: has no file of {sig}")
        found[sig] = _checkpoint(entry, content["root"] + files[sig], files[sig])
    for sig, entry in content[COMMUNITY]["checkpoints"].items():
        found[sig] = _checkpoint(entry, entry["url"], f"{COMMUNITY}/{_last_part(entry['url'])}")
    return found


def bags() -> dict[str, dict[str, Any]]:
    """Every published bag by name, the community's last: its entry, and what `NAME.yaml` says."""
    entries = {**registry()["bags"], **registry()[COMMUNITY]["bags"]}
    return {name: {**entry, **_definition(name)} for name, entry in entries.items()}


def bag_files() -> dict[str, Path]:
    """The file of every published bag, in demucs's format, by name."""
    names = [*registry()["bags"], *registry()[COMMUNITY]["bags"]]
    return {name: REMOTE_ROOT / f"{name}.yaml" for name in names}


def bags_with(signature: str) -> list[str]:
    """The released bags that a checkpoint is in."""
    return [name for name in registry()["bags"] if signature in _definition(name)["models"]]


def _definition(name: str) -> dict[str, Any]:
    path = bag_files()[name]
    bag = _published_bag(path)
    for signature in bag.models:
        if not any(signature in group for group in _groups()):
            raise ModelLoadingError(f"{path}: the registry has no checkpoint {signature}")
    values = {"models": list(bag.models), "weights": bag.weights, "segment": bag.segment}
    return {key: value for key, value in values.items() if value is not None}


_published_bag = lru_cache(maxsize=None)(Bag.read)


def _groups() -> Sequence[Mapping[str, Any]]:
    """The entries of all checkpoints, in the groups that they are in."""
    content = registry()
    return content[EMBEDDED], content["checkpoints"], content[COMMUNITY]["checkpoints"]


def is_community(name: str) -> bool:
    """Tell whether a bag or checkpoint is of others than the authors of Demucs."""
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
        licence=entry["licence"],
        embedded=path,
        sources=entry["sources"],
    )


def _checkpoint(entry: Mapping[str, Any], url: str, in_mirror: str) -> Checkpoint:
    """A checkpoint at `url`, and before that, if there is a mirror, at its path `in_mirror`."""
    size, mirror = entry.get("megabytes"), os.environ.get(MIRROR_VARIABLE)
    first, *others = [f"{mirror.rstrip('/')}/{in_mirror}", url] if mirror else [url]
    return Checkpoint(
        first,
        entry["sha256"],
        None if size is None else size * MEGABYTE,
        entry["description"],
        entry.get("source"),
        entry.get("licence", NOT_STATED),
        entry.get("architecture"),
        others=tuple(others),
        safetensors_sha256=entry.get("safetensors_sha256", ""),
    )


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of checkpoints: `folder`, `DEMUCS_INFER_CACHE`, or where `demucs` keeps them.

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
    """Tell whether fetching is forbidden: by `offline`, or if None by `DEMUCS_INFER_OFFLINE`."""
    if offline is not None:
        return offline
    return os.environ.get(OFFLINE_VARIABLE, "").strip().lower() not in NO
