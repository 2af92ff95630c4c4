"""The hub of Hugging Face: names of models, its cache on this machine, and its files.

A model is a repository with `NAME.yaml`, a bag, and `SIGNATURE.safetensors` for each of its models.
No other file is requested. The cache is the one that the package huggingface_hub uses:

    models--NAMESPACE--REPOSITORY/refs/REVISION               holds the name of a snapshot
    models--NAMESPACE--REPOSITORY/snapshots/SNAPSHOT/FILE     links to ../../blobs/DIGEST
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DownloadError, ModelLoadingError
from ..storage import http
from .checkpoints import MAX_YAML, Content

SCHEME = "hf://"
DEFAULT_NAMESPACE = "adefossez"
DEFAULT_REVISION = "main"
DEFAULT_ENDPOINT = "https://huggingface.co"
SUFFIX = ".safetensors"
# A name that is one part of a path, on every system and on the hub.
PART = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
COMMIT, DIGEST = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHA256_DIGITS = 64
MAX_REFERENCE = 1000  # bytes
COMMIT_HEADER = "X-Repo-Commit"
ERRORS = {
    "GatedRepo": "the repository is for users with access: set HF_TOKEN to the token of one",
    "RepoNotFound": "the repository does not exist, or HF_TOKEN does not open it",
    "RevisionNotFound": "the revision does not exist",
    "EntryNotFound": "the repository has no such file (only a .yaml and .safetensors are taken)",
}


@dataclass(frozen=True)
class HubModel:
    """A model on the hub: `hf://[NAMESPACE/]NAME[@REVISION]`."""

    name: str
    namespace: str = DEFAULT_NAMESPACE
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> HubModel:
        """Read the address. Raises `ModelLoadingError` if it is not one."""
        path, at, revision = text.removeprefix(SCHEME).partition("@")
        namespace, slash, name = path.rpartition("/")
        parts = [name, *([namespace] if slash else ()), *(revision.split("/") if at else ())]
        if not all(map(PART.fullmatch, parts)):
            form = f"{SCHEME}[NAMESPACE/]NAME[@REVISION]"
            raise ModelLoadingError(f"{text!r} is not of the form {form}")
        return cls(name, namespace or DEFAULT_NAMESPACE, revision or DEFAULT_REVISION)

    def __str__(self) -> str:
        return f"{SCHEME}{self.namespace}/{self.name}@{self.revision}"

    @property
    def repository(self) -> str:
        """The repository's name, with its namespace."""
        return f"{self.namespace}/{repository_name(self.name)}"

    def url(self, file: str) -> str:
        """Return the address of a file of the repository."""
        endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        return f"{endpoint}/{self.repository}/resolve/{self.revision}/{file}"

    def folder(self) -> Path:
        """Return the folder of the repository in the cache. Raises `DownloadError` without one."""
        chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
        cache = os.path.expandvars(chosen or home_of("HF_HOME", "huggingface") / "hub")
        return expanded(cache, "HF_HUB_CACHE") / f"models--{self.repository.replace('/', '--')}"


def repository_name(name: str) -> str:
    """Return the repository of the model `name`, without its namespace."""
    first, separator, rest = name.partition("_")
    return f"HTDemucs{separator and '-'}{rest}" if first == "htdemucs" else f"Demucs-{name}"


def checkpoint_file(signature: str) -> str:
    """Return the file of a model. Raises `ModelLoadingError` for a path or a URL."""
    if PART.fullmatch(signature):
        return f"{signature}{SUFFIX}"
    text = f"is not a signature of a model on the hub, of which only SIGNATURE{SUFFIX} is taken"
    raise ModelLoadingError(f"{signature[:100]!r} {text}")


def home_of(variable: str, name: str) -> Path:
    """Return a program's folder: that of an environment variable, or `name` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(variable) or Path(cache, name))


def expanded(folder: str | os.PathLike[str], setting: str) -> Path:
    """Replace ~ in a cache's path. Raises `DownloadError`, with the `setting`, without a home."""
    try:
        return Path(folder).expanduser()
    except RuntimeError as exc:
        raise DownloadError(f"{folder}: the home folder is not known: set {setting}") from exc


def is_offline() -> bool:
    """Return True if the hub's variables keep its programs off the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.lower() in ("1", "on", "yes", "true")


def cached_file(model: HubModel, file: str, *, any_revision: bool = False) -> Path | None:
    """Find a file in the hub's cache, of the model's revision or of the newest that has it."""
    # The cache may be unreadable, or hold a reference that is not text.
    with suppress(OSError, ValueError, ModelLoadingError):
        root = model.folder()
        reference, snapshots = root / "refs" / model.revision, root / "snapshots"
        names = []
        if reference.is_file():
            names = [Content.read(reference, "reference", MAX_REFERENCE).data.decode().strip()]
        folders = [snapshots / name for name in filter(PART.fullmatch, [*names, model.revision])]
        if any_revision:
            folders += sorted(snapshots.glob("*/"), key=lambda path: -path.stat().st_mtime)
        return next(filter(Path.is_file, (folder / file for folder in folders)), None)
    return None


def known_digest(path: Path) -> str:
    """Return the SHA-256 in the name of a cached file, or "" if there is none."""
    with suppress(OSError):
        target = path.readlink()
        if target.parent.name == "blobs" and DIGEST.fullmatch(target.name):
            return target.name if len(target.name) == SHA256_DIGITS else ""
    return ""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub. `commit` and `etag` are hex digits, or "" if the hub sends others."""

    url: str
    commit: str
    etag: str
    length: int | None

    @classmethod
    def ask(cls, url: str) -> RemoteFile:
        """Ask the hub about the file at `url`. Raises `HostError`."""
        limits = replace(http.LIMITS, longest=http.LIMITS.span)
        with http.request(url, limits, token_header(), "HEAD", stop_at=COMMIT_HEADER) as answer:
            status = answer.response.status_code
            if reason := ERRORS.get(answer.header("X-Error-Code")):
                raise http.HostError(url, reason, status=status)
            if status >= 400:
                answer.check()
            etag = answer.header("X-Linked-ETag") or answer.header("ETag")
            etag, commit = etag.removeprefix("W/").strip('"').lower(), answer.header(COMMIT_HEADER)
            length = answer.number("X-Linked-Size")
            # The length of a redirect is not that of the file.
            if length is None and not answer.header("Location"):
                length = answer.number()
        commit, etag = commit * bool(COMMIT.fullmatch(commit)), etag * bool(DIGEST.fullmatch(etag))
        return cls(url, commit, etag, length)

    @property
    def sha256(self) -> str:
        """The digest of the content, or "" if it is not known."""
        return self.etag if len(self.etag) == SHA256_DIGITS else ""

    def download(self, target: Path, sha256: str = "", limits: http.Limits | None = None) -> None:
        """Download the file as `target`. Raises `HostError`, or `DownloadError`."""
        most = MAX_YAML if self.url.endswith(".yaml") else http.MAX_MODEL
        digest, headers = sha256 or self.sha256, token_header()
        http.Download(self.url, target, digest, self.length, most, headers, limits).run()


def token_header() -> dict[str, str]:
    """Return the header with the user's token: of `HF_TOKEN`, or of its file, if there is one."""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or ""
    if not token:
        with suppress(OSError, ValueError, RuntimeError):
            home = home_of("HF_HOME", "huggingface")
            path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
            token = path.read_text(encoding="ascii").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def hub_file(model: HubModel, file: str, *, offline: bool) -> Path:
    """Return a file of a model in the hub's cache, up to date unless `offline`.

    Raises `DownloadError` if it is not there and cannot be fetched.
    """
    cached = cached_file(model, file)
    if not (offline or is_offline()):
        try:
            return _fetch(model, file)
        except http.HostError as exc:
            if not exc.temporary or not cached:
                raise
    if not cached:
        raise DownloadError(
            f"{model}: {file} is not in the hub's cache, and nothing is fetched offline: leave that"
            " out once, or copy the cache of a machine that has it"
        )
    return cached


def _fetch(model: HubModel, file: str) -> Path:
    """Download the current version of a file into the hub's cache, unless it is there."""
    from ..utils import atomic_write

    found, folder = RemoteFile.ask(model.url(file)), model.folder()
    if not (found.commit and found.etag):
        # Both become names of files.
        raise http.HostError(found.url, "the hub does not send a valid revision and digest")
    path = folder / "snapshots" / found.commit / file
    if not path.is_file():
        found.download(folder / "blobs" / found.etag)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.symlink_to(Path("..", "..", "blobs", found.etag))
        if model.revision != found.commit:
            reference = folder / "refs" / model.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(reference) as temporary:
                temporary.write_text(found.commit, encoding="ascii")
    except OSError as exc:
        raise DownloadError(f"{path}: cannot be written ({exc.strerror or exc})") from exc
    return path
