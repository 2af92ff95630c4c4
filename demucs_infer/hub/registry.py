"""The registry of models: their names, the hosts that have them, and the cache.

`remote/` has `files.txt` and `NAME.yaml`, in demucs's formats, and `registry.yml` for facts that
those cannot hold. Reading them needs neither PyTorch nor a network. A test checks them, as they are
part of the package.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import DownloadError, ModelLoadingError
from ..log import logger
from ..storage import http
from . import hf
from .checkpoints import MAX_YAML, Bag, Content

REMOTE_ROOT = Path(__file__).parent.parent / "remote"
CACHE_VARIABLE = "DEMUCS_INFER_CACHE"  # the folder of checkpoints
MIRROR_VARIABLE = "DEMUCS_INFER_MIRROR"  # a URL to fetch them from
OFFLINE_VARIABLE = "DEMUCS_INFER_OFFLINE"  # never fetch them
NO = ("", "0", "false", "no", "off")
COMMUNITY = "community"  # the group of others' models, and their folder in a mirror
MEGABYTE = 10**6  # bytes
NOT_STATED = "not stated"  # a licence
TEXTS = ("sha256", "description", "source", "licence", "safetensors_sha256")  # of a checkpoint


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
        """The URLs of the file in their order: on the mirror, if one is set, and on its host."""
        mirror = os.environ.get(MIRROR_VARIABLE)
        mirrored = [f"{mirror.rstrip('/')}/{self.in_mirror}"] if mirror and self.in_mirror else []
        return [*mirrored, self.origin]


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
        content: Any = Content.read(REMOTE_ROOT / "registry.yml", "registry", MAX_YAML).yaml()
        files, community = released_files(REMOTE_ROOT / "files.txt"), content[COMMUNITY]
        found, bags = {}, {}
        for sig, entry in content["embedded"].items():
            path = (REMOTE_ROOT / entry["file"]).absolute()
            found[sig] = _checkpoint(
                entry, path.as_uri(), embedded=path, sources=[*entry["sources"]]
            )
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
    except (AttributeError, LookupError, OSError, OverflowError, TypeError, ValueError) as exc:
        text = f"{REMOTE_ROOT}: is damaged ({' '.join(repr(exc).split())[:200]})"
        raise ModelLoadingError(f"{text}: install the package again") from exc


def _checkpoint(entry: Mapping[str, Any], origin: str, **more: Any) -> Checkpoint:
    texts: dict[str, Any] = {key: str(entry[key]) for key in TEXTS if key in entry}
    size = int(entry["megabytes"]) * MEGABYTE if "megabytes" in entry else None
    return Checkpoint(origin, size=size, architecture=entry.get("architecture"), **texts, **more)


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


@dataclass(frozen=True)
class Source:
    """A URL of a checkpoint: of its published file, or of the same weights on the hub.

    `sha256` is the digest that is known beforehand, or "". `file` is the name in the cache, `most`
    the size that it may have.
    """

    url: str
    sha256: str
    file: str
    most: int | None = None
    on_hub: bool = False

    def fetch(self, folder: Path, limits: http.Limits) -> tuple[Path, str]:
        """Download the file into `folder`, and return its path and the digest that it must have.

        That of the hub becomes `SIGNATURE-CHECKSUM.safetensors`, to be verified when it is loaded.
        Raises `HostError`, or `DownloadError`.
        """
        path, digest = folder / self.file, self.sha256
        if self.on_hub:
            found = hf.RemoteFile.ask(self.url)
            digest = digest or found.sha256
            path = path.with_stem(f"{path.stem}-{digest[:8]}") if digest else path
            found.download(path, digest, limits)
        else:
            http.Download(self.url, path, digest, most=self.most, limits=limits).run()
        return path, digest


def sources_of(signature: str, checkpoint: Checkpoint) -> list[Source]:
    """List the URLs of a checkpoint: on a mirror, on its host, and on the hub."""
    # The size in the registry is rounded.
    most = None if checkpoint.size is None else checkpoint.size * 5 // 4 + 2**20
    named = checkpoint.sha256, checkpoint.file, most
    sources, file = [Source(url, *named) for url in checkpoint.urls], f"{signature}{hf.SUFFIX}"
    for bag in [] if hf.is_offline() else bags_with(signature)[:1]:
        url = hf.HubModel(bag).url(file)
        sources.append(Source(url, checkpoint.safetensors_sha256, file, on_hub=True))
    return sources


def fetch_any(sources: Sequence[Source], folder: Path) -> tuple[Path, str]:
    """Download a file from the first source that delivers it, as `Source.fetch` does.

    Of several sources each is tried once, and then those that may deliver it later with retries.
    Raises `DownloadError` with the failure of each host, first of those without a connection.
    """
    failures: dict[str, http.HostError] = {}
    once = replace(http.LIMITS, attempts=1)
    for limits in (once, http.LIMITS)[len(sources) == 1 :]:
        for source in sources:
            failure = failures.get(source.url)
            if failure and not (failure.temporary and failure.answered):
                continue
            try:
                found = source.fetch(folder, limits)
            except http.HostError as exc:
                logger.debug("%s", exc)
                failures[source.url] = exc
                continue
            if failed := [exc.summary for url, exc in failures.items() if url != source.url]:
                logger.warning("%s: fetched from %s", "; ".join(failed), http.redact(source.url))
            return found
    ordered = sorted(failures.values(), key=lambda exc: exc.answered)
    raise DownloadError("; ".join(dict.fromkeys(exc.summary for exc in ordered)))


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of checkpoints: `folder`, `DEMUCS_INFER_CACHE`, or PyTorch's hub.

    A program may have chosen the latter with `torch.hub.set_dir`. Raises `ModelLoadingError` for a
    user without a home.
    """
    chosen = folder or os.environ.get(CACHE_VARIABLE)
    hub: Any = hf.home_of("TORCH_HOME", "torch") / "hub"
    if not chosen and (torch_hub := getattr(sys.modules.get("torch"), "hub", None)):
        hub = torch_hub.get_dir()
    return hf.expanded(chosen or Path(hub, "checkpoints"), f"{CACHE_VARIABLE} or --cache-dir")


def is_offline(offline: bool | None = None) -> bool:
    """Return True if fetching is forbidden: by `offline`, or if that is None by the environment."""
    if offline is not None:
        return offline
    return os.environ.get(OFFLINE_VARIABLE, "").strip().lower() not in NO
