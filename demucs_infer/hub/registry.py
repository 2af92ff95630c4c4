"""The registry of models, as data: which there are, their URLs, and where they are cached.

`remote/` has `files.txt` and `NAME.yaml`, in demucs's formats, and `registry.yml` for what those
cannot hold. Reading them needs neither PyTorch nor a network. They are part of the package, so that
a test checks them, and not each start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..errors import ModelLoadingError
from .checkpoints import MAX_YAML, Bag, Content

REMOTE_ROOT = Path(__file__).parent.parent / "remote"
CACHE_VARIABLE = "DEMUCS_INFER_CACHE"  # the folder of checkpoints
MIRROR_VARIABLE = "DEMUCS_INFER_MIRROR"  # a URL to fetch them from
OFFLINE_VARIABLE = "DEMUCS_INFER_OFFLINE"  # never fetch them
NO = ("", "0", "false", "no", "off")
EMBEDDED = "embedded"  # the group of models that come with the package
COMMUNITY = "community"  # the group of others' models, and their folder in a mirror
MEGABYTE = 10**6  # bytes
REGISTRY_FILE = "registry.yml"
NOT_STATED = "not stated"  # a licence

Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """A published file, or one that comes with the package.

    `url` is tried first, then `others`, URLs of the same file. `sha256` are the leading digits of
    its digest that are known, in the registry all 64. `size` is in bytes, rounded, None if unknown.
    `architecture` (`klass`, `kwargs`) is that of a file of weights alone. `source` is the author of
    a community checkpoint. `embedded` is the file of one that comes with the package, `sources` its
    stems. `safetensors_sha256` is the digest of the same weights on the hub, if it is known.
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
        """Describe a checkpoint by its URL: the name may have its checksum."""
        return cls(url, PurePosixPath(_last_part(url)).stem.partition("-")[2])


def _last_part(url: str) -> str:
    try:
        return PurePosixPath(urlsplit(url).path).name
    except ValueError as exc:
        raise ModelLoadingError(f"{url!r} is not a URL ({exc})") from exc


def _intact(read: Callable[[], Result]) -> Callable[[], Result]:
    """Turn errors that a damaged installation brings about into `ModelLoadingError`."""

    @wraps(read)
    def checked() -> Result:
        try:
            return read()
        except (AttributeError, LookupError, OSError, OverflowError, TypeError, ValueError) as exc:
            text = f"{REMOTE_ROOT}: is damaged ({' '.join(repr(exc).split())[:200]})"
            raise ModelLoadingError(f"{text}: install the package again") from exc

    return checked


@lru_cache(maxsize=1)
def registry() -> dict[str, Any]:
    """Return the content of `remote/registry.yml`: `root`, `checkpoints`, `bags` and so on."""
    content: dict[str, Any] = Content.read(REMOTE_ROOT / REGISTRY_FILE, "registry", MAX_YAML).yaml()
    return content


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
_published_bag = lru_cache(maxsize=None)(Bag.read)


@_intact
def checkpoints() -> dict[str, Checkpoint]:
    """Return every checkpoint by signature: of the package, the published, the community's."""
    content, files = registry(), _released_files(REMOTE_ROOT / "files.txt")
    found = {}
    for sig, entry in content[EMBEDDED].items():
        path = (REMOTE_ROOT / entry["file"]).absolute()
        found[sig] = _checkpoint(entry, path.as_uri(), embedded=path)
    for sig, entry in content["checkpoints"].items():
        found[sig] = _checkpoint(entry, content["root"] + files[sig], files[sig])
    for sig, entry in content[COMMUNITY]["checkpoints"].items():
        found[sig] = _checkpoint(entry, entry["url"], f"{COMMUNITY}/{_last_part(entry['url'])}")
    return found


def _checkpoint(
    entry: Mapping[str, Any], url: str, in_mirror: str = "", embedded: Path | None = None
) -> Checkpoint:
    """Make a checkpoint at `url`, or first at the path `in_mirror` of a mirror, if there is one."""
    size, mirror = entry.get("megabytes"), os.environ.get(MIRROR_VARIABLE)
    mirrored = [f"{mirror.rstrip('/')}/{in_mirror}"] if mirror and in_mirror else []
    first, *others = [*mirrored, url]
    return Checkpoint(
        str(first),
        str(entry["sha256"]),
        None if size is None else int(size) * MEGABYTE,
        str(entry["description"]),
        entry.get("source"),
        str(entry.get("licence", NOT_STATED)),
        entry.get("architecture"),
        embedded,
        list(entry["sources"]) if embedded else None,
        tuple(others),
        str(entry.get("safetensors_sha256", "")),
    )


@_intact
def bags() -> dict[str, dict[str, Any]]:
    """Return every published bag by name, the community's last: its entry and its definition."""
    found, known = {}, checkpoints()
    for name, entry in {**registry()["bags"], **registry()[COMMUNITY]["bags"]}.items():
        bag = _published_bag(REMOTE_ROOT / f"{name}.yaml")
        if unknown := set(bag.models) - set(known):
            raise LookupError(f"{name}.yaml: no checkpoint {min(unknown)}")
        values = {"models": list(bag.models), "weights": bag.weights, "segment": bag.segment}
        found[name] = {
            "description": str(entry["description"]),
            "sources": list(entry["sources"]),
            **{key: value for key, value in values.items() if value is not None},
        }
    return found


@_intact
def bag_files() -> dict[str, Path]:
    """Return the file of every published bag, in demucs's format, by name."""
    names = [*registry()["bags"], *registry()[COMMUNITY]["bags"]]
    return {name: REMOTE_ROOT / f"{name}.yaml" for name in names}


def bags_with(signature: str) -> list[str]:
    """Return the released bags that a checkpoint is in."""
    found = bags().items()
    return [name for name, bag in found if signature in bag["models"] and not is_community(name)]


def is_community(name: str) -> bool:
    """Return True if a bag or checkpoint is not by the authors of Demucs."""
    group = registry()[COMMUNITY]
    return name in group["bags"] or name in group["checkpoints"]


def checkpoint_urls() -> dict[str, str]:
    """Return the URL of each checkpoint, by signature."""
    return {signature: checkpoint.url for signature, checkpoint in checkpoints().items()}


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
            f"there is no home folder to keep models in: set {CACHE_VARIABLE} or --cache-dir"
        ) from exc


def is_offline(offline: bool | None = None) -> bool:
    """Return True if fetching is forbidden: by `offline`, or if that is None by the environment."""
    if offline is not None:
        return offline
    return os.environ.get(OFFLINE_VARIABLE, "").strip().lower() not in NO
