"""The hub of Hugging Face: names of models there, its cache on this machine, and its files.

A model is a repository with `NAME.yaml`, a bag, and `SIGNATURE.safetensors` for each of its models;
no other file is ever asked for. Reading the cache needs no package: it is plain folders,

    models--NAMESPACE--REPOSITORY/refs/REVISION               holds the name of a snapshot
    models--NAMESPACE--REPOSITORY/snapshots/SNAPSHOT/FILE     links to ../../blobs/DIGEST
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DownloadError, MissingDependencyError, ModelLoadingError

SCHEME = "hf://"
DEFAULT_NAMESPACE = "adefossez"
DEFAULT_REVISION = "main"
DEFAULT_ENDPOINT = "https://huggingface.co"
SUFFIX = ".safetensors"
YES = ("1", "on", "yes", "true")

# A name that is one part of a path, on every system and on the hub.
PART = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
DIGEST = re.compile(r"[0-9a-f]{64}")
OTHER_FORMATS = (".th", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".yaml", SUFFIX)


@dataclass(frozen=True)
class HubModel:
    """A model on the hub: `hf://[NAMESPACE/]NAME[@REVISION]`."""

    name: str
    namespace: str = DEFAULT_NAMESPACE
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> HubModel:
        """Read the address. Raises `ModelLoadingError` for what is no name on the hub."""
        path, at, revision = text.removeprefix(SCHEME).partition("@")
        *namespaces, name = path.split("/")
        namespace = namespaces[0] if namespaces else DEFAULT_NAMESPACE
        parts = [name, namespace, *(revision.split("/") if at else ())]
        if len(namespaces) > 1 or not all(map(PART.fullmatch, parts)):
            raise ModelLoadingError(
                f"{text!r} is not of the form {SCHEME}[NAMESPACE/]NAME[@REVISION]"
            )
        return cls(name, namespace, revision or DEFAULT_REVISION)

    def __str__(self) -> str:
        return f"{SCHEME}{self.namespace}/{self.name}@{self.revision}"

    @property
    def repository(self) -> str:
        """The repository's name, with its namespace."""
        return f"{self.namespace}/{repository_name(self.name)}"

    @property
    def bag_file(self) -> str:
        """The file in the repository that lists the models."""
        return f"{self.name}.yaml"

    def url(self, file: str) -> str:
        """The address of a file of the repository."""
        return f"{endpoint()}/{self.repository}/resolve/{self.revision}/{file}"

    def pinned(self, file: Path) -> HubModel:
        """The model at the revision that `file` in the hub's cache belongs to."""
        return replace(self, revision=file.parent.name)


def endpoint() -> str:
    """The address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def repository_name(name: str) -> str:
    """The repository of the model `name`, without its namespace."""
    first, separator, rest = name.partition("_")
    if first == "htdemucs":
        return f"HTDemucs{separator and '-'}{rest}"
    return f"Demucs-{name}"


def checkpoint_file(signature: str) -> str:
    """The file of a model. Raises `ModelLoadingError` for a path, an address or another format."""
    if not PART.fullmatch(signature) or signature.lower().endswith(OTHER_FORMATS):
        raise ModelLoadingError(
            f"{signature!r} is no signature of a model on the hub, of which only SIGNATURE{SUFFIX}"
            " is taken"
        )
    return f"{signature}{SUFFIX}"


# The cache.


def cache_folder() -> Path | None:
    """The folder of the hub's cache, or None for a user without a home."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    try:
        return Path(os.path.expandvars(chosen or Path(home, "hub"))).expanduser()
    except RuntimeError:
        return None


def is_offline() -> bool:
    """Tell whether the hub's own variables keep its programs off the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.lower() in YES


def cached_file(model: HubModel, file: str, *, any_revision: bool = False) -> Path | None:
    """A file in the hub's cache, of the model's revision or of the newest that has it."""
    cache = cache_folder()
    if cache is None:
        return None
    folder = cache / f"models--{model.repository.replace('/', '--')}"
    with suppress(OSError, ValueError):  # what may not be looked at, or is no text
        for snapshot in _snapshots(folder, model.revision, any_revision):
            path = folder / "snapshots" / snapshot / file
            if path.is_file():
                return path
    return None


def _snapshots(folder: Path, revision: str, any_revision: bool) -> Iterator[str]:
    reference = folder / "refs" / revision
    if reference.is_file():
        snapshot = reference.read_text(encoding="utf-8").strip()
        if PART.fullmatch(snapshot):
            yield snapshot
    if PART.fullmatch(revision):
        yield revision
    if any_revision:
        found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        yield from (path.name for path in found)


def known_digest(path: Path) -> str:
    """The SHA-256 under which the hub's cache keeps a file, or "" where it has no such name."""
    try:
        target = path.readlink()
    except OSError:  # no link: on Windows, files may be copied
        return ""
    return target.name if target.parent.name == "blobs" and DIGEST.fullmatch(target.name) else ""


# The network.


def hub_file(model: HubModel, file: str, *, offline: bool) -> Path:
    """A file of a model in the hub's cache, up to date unless `offline`.

    Raises `DownloadError` if it is not to be had, `MissingDependencyError` if it is not there and
    the package that would fetch it neither.
    """
    if offline or is_offline():
        if path := cached_file(model, file):
            return path
        raise DownloadError(
            f"{model}: {file} is not in the hub's cache ({cache_folder()}), and nothing is fetched"
            f" offline: leave that out once, or copy the cache of a machine that has it"
        )
    try:
        import huggingface_hub
    except ImportError as exc:
        if path := cached_file(model, file):
            return path
        raise MissingDependencyError("huggingface_hub", str(model)) from exc
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                *(model.repository, file),
                revision=model.revision,
                cache_dir=cache_folder(),
                endpoint=endpoint(),
            )
        )
    except Exception as exc:  # of several libraries below it, too
        raise DownloadError(f"{model.url(file)}: {_reason(exc, model, file)}") from exc


def _reason(exc: Exception, model: HubModel, file: str) -> str:
    """An exception of the hub's package as part of a line."""
    from huggingface_hub import errors

    if isinstance(exc, errors.LocalEntryNotFoundError):
        cause = _line(exc.__cause__ or exc)
        return f"the hub does not answer ({cause}), and its cache has no {file}"
    reasons: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "is for users with access: set HF_TOKEN to the token of one"),
        (
            errors.RepositoryNotFoundError,
            f"there is no repository {model.repository}, or HF_TOKEN does not open it",
        ),
        (errors.RevisionNotFoundError, f"there is no revision {model.revision}"),
        (
            errors.EntryNotFoundError,
            f"the repository has no {file} (nothing but NAME.yaml and SIGNATURE{SUFFIX} is taken)",
        ),
    ]
    return next((text for kind, text in reasons if isinstance(exc, kind)), _line(exc))


def _line(exc: Any) -> str:
    """The beginning of what an exception says."""
    text = str(exc).strip() or type(exc).__name__
    return " ".join(text.partition("\n\n")[0].split())
