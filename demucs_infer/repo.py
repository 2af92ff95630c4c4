"""Where checkpoints and bags live: a local folder, or the web and a cache of what was fetched.

Looking up and listing needs no PyTorch: it is imported when a model is built.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from .errors import DownloadError, ModelLoadingError
from .hub.content import Content
from .hub.download import fetch, shown
from .hub.registry import Checkpoint, cache_folder, is_offline

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
        """Whether there is a model with this signature."""
        return sig in self.list_model()

    def get_model(self, sig: str) -> nn.Module:
        """Build the model with this signature. Raises `ModelLoadingError`."""
        raise NotImplementedError

    def list_model(self) -> Mapping[str, str | Path]:
        """Where each model comes from, by signature."""
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

    Args:
        models: the address of each checkpoint, by signature.
        checkpoints: what else is known of them. Without it, a file is verified by the checksum in
            its name, and not fetched if there is none.
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
        known = checkpoints or {}
        self._checkpoints = {
            sig: known[sig] if sig in known else Checkpoint.at(url) for sig, url in models.items()
        }
        self._cache_dir = cache_dir
        self._offline = offline

    def get_model(self, sig: str) -> nn.Module:
        path = self.path(sig)
        return _build(lambda: self.read(sig), path, self._checkpoints[sig].architecture)

    def read(self, sig: str) -> Content:
        """The bytes of a checkpoint, verified, of a file that is fetched if it is not in the cache.

        Raises `DownloadError` if it is not there and does not come, `ModelLoadingError` if it
        cannot be read or there is none of this signature.
        """
        path, checkpoint = self.path(sig), self._checkpoints[sig]
        problem = _absence([path])
        if self.has_file(sig):
            content = Content.read(path)
            problem = content.damage(checkpoint.sha256)
            if not problem:
                return content
        self._replace(sig, problem)
        content = Content.read(path)
        content.check(checkpoint.sha256)
        return content

    def _replace(self, sig: str, problem: str) -> None:
        """Fetch a checkpoint's file, which has a `problem`. Raises as `read` does."""
        path, checkpoint = self.path(sig), self._checkpoints[sig]
        if checkpoint.embedded:
            raise ModelLoadingError(f"{problem}: install this package again")
        if is_offline(self._offline):
            raise DownloadError(f"{problem}, {NO_NETWORK}: {self._by_hand([sig])}")
        try:
            fetch(checkpoint.url, path, checkpoint.sha256, size=checkpoint.size)
        except DownloadError as exc:
            raise DownloadError(f"{problem}: {exc}: {self._by_hand([sig])}") from exc

    def path(self, sig: str) -> Path:
        """Where the file of a checkpoint is, or would be: in the cache, or in the package."""
        if sig not in self._models:
            _unknown("model", sig, self._models)
        checkpoint = self._checkpoints[sig]
        return checkpoint.embedded or cache_folder(self._cache_dir) / checkpoint.file

    def has_file(self, sig: str) -> bool:
        """Whether there is a file for a checkpoint, right or wrong."""
        try:
            return self.path(sig).exists()
        except OSError:  # its folder may not be looked at
            return False

    def require(self, signatures: Iterable[str]) -> None:
        published = (sig for sig in signatures if not self._checkpoints[sig].embedded)
        absent = [sig for sig in dict.fromkeys(published) if not self.has_file(sig)]
        if absent and is_offline(self._offline):
            problem = _absence([self.path(sig) for sig in absent])
            raise DownloadError(f"{problem}, {NO_NETWORK}: {self._by_hand(absent)}")

    def _by_hand(self, signatures: Sequence[str]) -> str:
        """How to do without a download."""
        wanted = [self._checkpoints[sig] for sig in signatures]
        files = ", ".join(f"{shown(item.url)} (SHA-256 {item.sha256})" for item in wanted)
        return (
            f"fetch {files} into {self.path(signatures[0]).parent}, or pass a folder that has it as"
            " --cache-dir (or as --repo, with a NAME.yaml for a bag)"
        )

    def list_model(self) -> Mapping[str, str]:
        return self._models


def _absence(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths)
    return f"{names} {'is' if len(paths) == 1 else 'are'} not on this machine"


def _build(
    read: Callable[[], Content], path: Path, architecture: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the model of a checkpoint, or of a file of weights whose architecture is told.

    The file is read here, so that its bytes are not kept while the model is built.
    """
    from .hub.packages import read_package, read_state
    from .hub.pickles import ClassName
    from .states import build_model

    if architecture is None:
        return build_model(read_package(read()), str(path))
    package = {**architecture, "klass": ClassName(architecture["klass"])}
    return build_model({**package, "state": read_state(read())}, str(path))


class LocalRepo(ModelOnlyRepo):
    """A folder of checkpoints named `SIGNATURE.th` or `SIGNATURE-CHECKSUM.th` (or .safetensors)."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.scan()

    def scan(self) -> None:
        """Look at the folder again. Raises `ModelLoadingError` if two files claim one signature."""
        self._models: dict[str, Path] = {}
        for path in sorted(self.root.iterdir()):
            if path.suffix not in CHECKPOINT_SUFFIXES:
                continue
            signature = path.stem.partition("-")[0]
            if signature in self._models:
                raise ModelLoadingError(
                    f"{self.root}: two files are the model {signature}:"
                    f" {self._models[signature].name} and {path.name}"
                )
            self._models[signature] = path

    def get_model(self, sig: str) -> nn.Module:
        return _build(lambda: self.read(sig), self.path(sig))

    def path(self, sig: str) -> Path:
        """Where the file of a checkpoint is. Raises `ModelLoadingError` if there is none."""
        if sig not in self._models:
            _unknown("model", sig, self._models)
        return self._models[sig]

    def read(self, sig: str) -> Content:
        content = Content.read(self.path(sig))
        content.check(content.path.stem.partition("-")[2])
        return content

    def list_model(self) -> Mapping[str, Path]:
        return self._models


class BagOnlyRepo:
    """A folder of bags, each a file `NAME.yaml`, whose models come from `model_repo`."""

    def __init__(self, root: Path, model_repo: ModelOnlyRepo) -> None:
        self.root = Path(root)
        self.model_repo = model_repo
        self._bags = {path.stem: path for path in sorted(self.root.glob("*.yaml"))}

    def has_model(self, name: str) -> bool:
        """Whether there is a bag of this name."""
        return name in self.list_model()

    def get_model(self, name: str) -> BagOfModels:
        """Build the bag of this name with its models. Raises `ModelLoadingError`."""
        if not self.has_model(name):
            _unknown("bag", name, self.list_model())
        from .engine.bag import BagOfModels

        members, bag = self.members(name), self._definition(name)
        self.model_repo.require(members)
        models = {sig: self.model_repo.get_model(sig) for sig in members}
        return BagOfModels([models[sig] for sig in members], bag.get("weights"), bag.get("segment"))

    def members(self, name: str) -> list[str]:
        """The signatures of a bag's models. Raises `ModelLoadingError` if it does not list them."""
        bag = self._definition(name)
        if not isinstance(bag, dict) or not isinstance(bag.get("models"), list):
            raise ModelLoadingError(f"the bag {name} does not list its models")
        return [str(sig) for sig in bag["models"]]

    def _definition(self, name: str) -> Any:
        try:
            return yaml.safe_load(self._bags[name].read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as exc:
            raise ModelLoadingError(f"{self._bags[name]}: is not valid YAML ({exc})") from exc

    def list_model(self) -> Mapping[str, Any]:
        """The definition of each bag, or the file that holds it, by name."""
        return self._bags


class RegistryBagRepo(BagOnlyRepo):
    """Bags that are given as data."""

    def __init__(self, bags: Mapping[str, Any], model_repo: ModelOnlyRepo) -> None:
        self.model_repo = model_repo
        self._definitions = dict(bags)

    def _definition(self, name: str) -> Any:
        return self._definitions[name]

    def list_model(self) -> Mapping[str, Any]:
        return self._definitions


class AnyModelRepo:
    """Bags and single models under one roof; where both have a name, the model is meant."""

    def __init__(self, model_repo: ModelOnlyRepo, bag_repo: BagOnlyRepo) -> None:
        self.model_repo = model_repo
        self.bag_repo = bag_repo

    def has_model(self, name_or_sig: str) -> bool:
        """Whether there is a model or a bag of this name."""
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

    def list_model(self) -> Mapping[str, Any]:
        """Everything there is, by name."""
        return {**self.model_repo.list_model(), **self.bag_repo.list_model()}
