"""Homes of checkpoints and bags: a local folder, or the web and a cache of what was fetched.

Looking up and listing needs no PyTorch: it is imported when a model is built.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import DownloadError, ModelLoadingError
from .hub import hf
from .hub.bags import Bag
from .hub.content import Content
from .hub.http import shown
from .hub.registry import (
    Checkpoint,
    bags_with,
    cache_folder,
    checkpoints,
    is_offline,
    is_registry,
)
from .hub.sources import fetch_any, sources_of
from .log import logger

if TYPE_CHECKING:
    from torch import nn

    from .engine.bag import BagOfModels

CHECKPOINT_SUFFIXES = (".th", ".safetensors")
MANY = 20  # names, more than which are not spelled out in a message
NO_NETWORK = "and nothing is fetched offline"


def check_checksum(path: Path, checksum: str) -> None:
    """Raise `ModelLoadingError` unless the SHA-256 of the file starts with `checksum`."""
    Content.read(path).check(checksum)


def _unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    folded = {candidate.casefold(): candidate for candidate in sorted(known)}
    if near := difflib.get_close_matches(name.casefold(), folded, n=1):
        hint = f"Did you mean {folded[near[0]]}?"
    elif len(folded) > MANY:
        hint = "See demucs-infer --list-models."
    else:
        hint = f"There is: {', '.join(folded.values()) or 'none'}."
    raise ModelLoadingError(f"no {kind} is named {name!r}. {hint}")


class ModelOnlyRepo:
    """A source of single models, by signature."""

    def has_model(self, sig: str) -> bool:
        """Tell whether there is a model with this signature."""
        return sig in self.list_model()

    def get_model(self, sig: str) -> nn.Module:
        """Build the model with this signature. Raises `ModelLoadingError`."""
        raise NotImplementedError

    def list_model(self) -> Mapping[str, str | Path]:
        """The origin of each model, by signature."""
        raise NotImplementedError

    def fetch(self, sig: str) -> Path:
        """The verified file of the model with this signature. Raises `ModelLoadingError`."""
        return self.read(sig).path

    def read(self, sig: str) -> Content:
        """The verified bytes of the model's file. Raises `ModelLoadingError`."""
        raise NotImplementedError

    def require(self, signatures: Iterable[str]) -> None:
        """Raise `ModelLoadingError` if some of these models are known to be out of reach."""


class RemoteRepo(ModelOnlyRepo):
    """Published checkpoints, by signature and address, which are fetched into a cache.

    One that is released is also looked for in the cache of the hub of Hugging Face, and fetched
    from there if its own host fails.

    Args:
        models: the address of each checkpoint, by signature.
        checkpoints: what else is known of them (default: the registry). A file that is not known
            is verified by the checksum in its name, and not fetched if there is none.
        cache_dir: the folder to keep them in (default: see `registry.cache_folder`).
        offline: never fetch (default: what `DEMUCS_INFER_OFFLINE` says).
    """

    def __init__(
        self,
        models: Mapping[str, str],
        *,
        checkpoints: Mapping[str, Checkpoint] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
    ) -> None:
        self._models = dict(models)
        known = _published() if checkpoints is None else checkpoints
        self._checkpoints = {sig: _checkpoint(sig, url, known) for sig, url in models.items()}
        self._cache_dir = cache_dir
        self._offline = offline

    def get_model(self, sig: str) -> nn.Module:
        if sig not in self._models:
            _unknown("model", sig, self._models)
        return _build(lambda: self.read(sig), self._checkpoints[sig].architecture)

    def read(self, sig: str) -> Content:
        """The bytes of a checkpoint, verified, of a file that is fetched if it is not here.

        Raises `DownloadError` if it is not there and does not come, `ModelLoadingError` if it
        cannot be read or there is none of this signature.
        """
        problems: list[str] = []
        for path, digest in self._files(sig):
            try:
                content = Content.read(path)
                content.check(digest)
            except ModelLoadingError as exc:
                problems.append(str(exc).removesuffix(": fetch it again"))
            else:
                if problems:
                    logger.warning("%s: %s is used", "; ".join(problems), path)
                return content
        path, digest = self._fetch(sig, "; ".join(problems) or _absence([self.path(sig)]))
        content = Content.read(path)
        content.check(digest)
        return content

    def _files(self, sig: str) -> Iterator[tuple[Path, str]]:
        """The files on this machine that may be a checkpoint, each with the digest it must have."""
        own, checkpoint = self._own_path(sig), self._checkpoints[sig]
        if _exists(own):
            yield own, checkpoint.sha256
        if checkpoint.embedded or not (bags := bags_with(sig)):
            return
        for path in _others(own.parent, sig):
            yield path, _digest_of(path, checkpoint)
        for bag in bags:
            file = hf.cached_file(hf.HubModel(bag), f"{sig}{hf.SUFFIX}", any_revision=True)
            if file:
                yield file, checkpoint.safetensors_sha256 or hf.known_digest(file)

    def _fetch(self, sig: str, problem: str) -> tuple[Path, str]:
        """Fetch a checkpoint, with whose file there is a `problem`. Raises as `read` does."""
        checkpoint = self._checkpoints[sig]
        if checkpoint.embedded:
            raise ModelLoadingError(f"{problem}: install this package again")
        if is_offline(self._offline):
            raise DownloadError(f"{problem}, {NO_NETWORK}: {self._by_hand([sig])}")
        try:
            path = fetch_any(sources_of(sig, checkpoint), self._own_path(sig).parent)
        except DownloadError as exc:
            raise DownloadError(f"{problem}: {exc}: {self._by_hand([sig])}") from exc
        return path, _digest_of(path, checkpoint)

    def path(self, sig: str) -> Path:
        """The file of a checkpoint, or the one that it would be: in a cache, or in the package."""
        return next((path for path, _ in self._files(sig)), self._own_path(sig))

    def _own_path(self, sig: str) -> Path:
        if sig not in self._models:
            _unknown("model", sig, self._models)
        checkpoint = self._checkpoints[sig]
        return checkpoint.embedded or cache_folder(self._cache_dir) / checkpoint.file

    def has_file(self, sig: str) -> bool:
        """Tell whether there is a file for a checkpoint, right or wrong."""
        return any(True for _ in self._files(sig))

    def require(self, signatures: Iterable[str]) -> None:
        published = (sig for sig in signatures if not self._checkpoints[sig].embedded)
        absent = [sig for sig in dict.fromkeys(published) if not self.has_file(sig)]
        if absent and is_offline(self._offline):
            problem = _absence([self.path(sig) for sig in absent])
            raise DownloadError(f"{problem}, {NO_NETWORK}: {self._by_hand(absent)}")

    def _by_hand(self, signatures: Sequence[str]) -> str:
        """Describe how to do without a download."""
        files = ", ".join(
            " or ".join(self._described(source.url, sig) for source in sources)
            for sig in signatures
            for sources in [sources_of(sig, self._checkpoints[sig])]
        )
        return (
            f"fetch {files} into {self._own_path(signatures[0]).parent}, or pass a folder that has"
            " it as --cache-dir (or as --repo, with a NAME.yaml for a bag)"
        )

    def _described(self, url: str, sig: str) -> str:
        checkpoint = self._checkpoints[sig]
        same = url in (checkpoint.url, *checkpoint.others)
        digest = checkpoint.sha256 if same else checkpoint.safetensors_sha256
        return f"{shown(url)} (SHA-256 {digest})" if digest else shown(url)

    def list_model(self) -> Mapping[str, str]:
        return self._models


def _published() -> Mapping[str, Checkpoint]:
    return checkpoints()  # under a name that no parameter has


def _checkpoint(sig: str, url: str, known: Mapping[str, Checkpoint]) -> Checkpoint:
    """Look up the checkpoint at `url`; of another, its name alone tells something."""
    found = known.get(sig)
    return found if found and url in (found.url, *found.others) else Checkpoint.at(url)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # its folder may not be looked at
        return False


def _others(folder: Path, sig: str) -> list[Path]:
    """The files of the hub of Hugging Face that were fetched into our cache."""
    try:
        names = [path for path in folder.iterdir() if path.suffix == hf.SUFFIX]
    except OSError:
        return []
    return sorted(path for path in names if _signature(path) == sig)


def _digest_of(path: Path, checkpoint: Checkpoint) -> str:
    """The digest that a file in our cache must have, as far as it is known."""
    if path.name == checkpoint.file:
        return checkpoint.sha256
    return checkpoint.safetensors_sha256 or _checksum(path)


def _signature(path: Path) -> str:
    return path.stem.partition("-")[0]


def _checksum(path: Path) -> str:
    return path.stem.partition("-")[2]


def _absence(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths)
    return f"{names} {'is' if len(paths) == 1 else 'are'} not on this machine"


def _build(read: Callable[[], Content], architecture: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the model of a checkpoint, or of a file of weights whose architecture is told.

    The file is read here, so that its bytes are not kept while the model is built.
    """
    from .hub.packages import read_package, read_state
    from .hub.pickles import ClassName
    from .states import build_model

    content = read()
    path = str(content.path)
    if architecture is None:
        package = read_package(content)
    else:
        klass = ClassName(architecture["klass"])
        package = {**architecture, "klass": klass, "state": read_state(content)}
    del content
    return build_model(package, path)


class HubRepo(ModelOnlyRepo):
    """The checkpoints of a model on the hub of Hugging Face, in the hub's own cache."""

    def __init__(self, model: hf.HubModel, *, offline: bool | None = None) -> None:
        self.model = model
        self._offline = offline

    def get_model(self, sig: str) -> nn.Module:
        return _build(lambda: self.read(sig))

    def read(self, sig: str) -> Content:
        file = hf.checkpoint_file(sig)
        path = hf.hub_file(self.model, file, offline=is_offline(self._offline))
        content = Content.read(path)
        if damage := content.damage(hf.known_digest(path)):
            raise ModelLoadingError(f"{damage}: delete {path.resolve()}, and it is fetched anew")
        return content

    def require(self, signatures: Iterable[str]) -> None:
        for sig in signatures:
            hf.checkpoint_file(sig)

    def list_model(self) -> Mapping[str, str]:
        return {}


class LocalRepo(ModelOnlyRepo):
    """A folder of checkpoints named `SIGNATURE.th` or `SIGNATURE-CHECKSUM.th` (or .safetensors)."""

    def __init__(self, root: Path, *, only: Iterable[str] | None = None) -> None:
        """Look at `root`, for all of its checkpoints, or for those of some signatures `only`."""
        self.root = Path(root)
        self._only = None if only is None else frozenset(only)
        self.scan()

    def scan(self) -> None:
        """Look at the folder again. Raises `ModelLoadingError` if two files claim one signature."""
        self._models: dict[str, Path] = {}
        for path in sorted(self.root.iterdir()):
            signature = _signature(path)
            wanted = self._only is None or signature in self._only
            if path.suffix not in CHECKPOINT_SUFFIXES or not wanted:
                continue
            if signature in self._models:
                raise ModelLoadingError(
                    f"{self.root}: two files are the model {signature}:"
                    f" {self._models[signature].name} and {path.name}"
                )
            self._models[signature] = path

    def get_model(self, sig: str) -> nn.Module:
        return _build(lambda: self.read(sig))

    def path(self, sig: str) -> Path:
        """The file of a checkpoint. Raises `ModelLoadingError` if there is none."""
        if sig not in self._models:
            _unknown("model", sig, self._models)
        return self._models[sig]

    def read(self, sig: str) -> Content:
        content = Content.read(self.path(sig))
        content.check(_checksum(content.path))
        return content

    def list_model(self) -> Mapping[str, Path]:
        return self._models


class LoneFile(LocalRepo):
    """One checkpoint, whose signature is the stem of its name: no checksum is looked for in it."""

    def __init__(self, path: Path) -> None:
        self._models = {path.stem: path}

    def read(self, sig: str) -> Content:
        return Content.read(self.path(sig))


class BagOnlyRepo:
    """A folder of bags, each a file `NAME.yaml`, whose models come from `model_repo`."""

    def __init__(self, root: Path, model_repo: ModelOnlyRepo) -> None:
        self.root = Path(root)
        self.model_repo = model_repo
        files = [path for path in sorted(self.root.glob("*.yaml")) if not is_registry(path)]
        self._bags = {path.stem: path for path in files}

    def has_model(self, name: str) -> bool:
        """Tell whether there is a bag of this name."""
        return name in self.list_model()

    def get_model(self, name: str) -> BagOfModels:
        """Build the bag of this name with its models. Raises `ModelLoadingError`."""
        bag = self._read(name)
        from .engine.bag import BagOfModels

        self.model_repo.require(bag.models)
        models = {sig: self.model_repo.get_model(sig) for sig in bag.models}
        return BagOfModels([models[sig] for sig in bag.models], bag.weights, bag.segment)

    def members(self, name: str) -> list[str]:
        """The signatures of a bag's models. Raises `ModelLoadingError` if it does not list them."""
        return list(self._read(name).models)

    def _read(self, name: str) -> Bag:
        if not self.has_model(name):
            _unknown("bag", name, self.list_model())
        return Bag.read(self._bags[name])

    def list_model(self) -> Mapping[str, Path]:
        """The file of each bag, by name."""
        return self._bags


class NamedBags(BagOnlyRepo):
    """Bags in files that are known by name."""

    def __init__(self, bags: Mapping[str, Path], model_repo: ModelOnlyRepo) -> None:
        self.model_repo = model_repo
        self._bags = dict(bags)


class AnyModelRepo:
    """Bags and single models under one roof; where both have a name, the model is meant."""

    def __init__(self, model_repo: ModelOnlyRepo, bag_repo: BagOnlyRepo) -> None:
        self.model_repo = model_repo
        self.bag_repo = bag_repo

    def has_model(self, name_or_sig: str) -> bool:
        """Tell whether there is a model or a bag of this name."""
        return self.model_repo.has_model(name_or_sig) or self.bag_repo.has_model(name_or_sig)

    def get_model(self, name_or_sig: str) -> nn.Module:
        """Build the model or the bag. Raises `ModelLoadingError`."""
        if self.model_repo.has_model(name_or_sig):
            return self.model_repo.get_model(name_or_sig)
        if self.bag_repo.has_model(name_or_sig):
            return self.bag_repo.get_model(name_or_sig)
        _unknown("model", name_or_sig, self.list_model())

    def members(self, name_or_sig: str) -> list[str]:
        """The signatures that a name stands for. Raises `ModelLoadingError`."""
        if self.model_repo.has_model(name_or_sig):
            return [name_or_sig]
        if self.bag_repo.has_model(name_or_sig):
            return self.bag_repo.members(name_or_sig)
        _unknown("model", name_or_sig, self.list_model())

    def require(self, name_or_sig: str) -> None:
        """Raise `ModelLoadingError` if a file that the name stands for is known not to be had."""
        self._members_repo(name_or_sig).require(self.members(name_or_sig))

    def fetch(self, name_or_sig: str) -> list[Path]:
        """The verified files that a name stands for. Raises `ModelLoadingError`."""
        repo = self._members_repo(name_or_sig)
        return [repo.fetch(sig) for sig in dict.fromkeys(self.members(name_or_sig))]

    def _members_repo(self, name_or_sig: str) -> ModelOnlyRepo:
        single = self.model_repo.has_model(name_or_sig)
        return self.model_repo if single else self.bag_repo.model_repo

    def list_model(self) -> Mapping[str, Any]:
        """Everything there is, by name."""
        return {**self.model_repo.list_model(), **self.bag_repo.list_model()}
