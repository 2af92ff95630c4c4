"""Where checkpoints and bags live: a local folder, or the cache of what was published.

Looking up and listing needs no PyTorch: it is imported when a model is built.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlparse

import yaml

from .errors import ModelLoadingError
from .registry import cache_folder

if TYPE_CHECKING:
    from torch import nn

    from .apply import BagOfModels

CHECKPOINT_SUFFIXES = (".th", ".safetensors")
READ_BLOCK = 2**20  # bytes


def check_checksum(path: Path, checksum: str) -> None:
    """Raise `ModelLoadingError` unless the SHA-256 of the file starts with `checksum`."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    actual = digest.hexdigest()[: len(checksum)]
    if actual != checksum:
        raise ModelLoadingError(
            f"{path}: is damaged: its checksum is {actual} and should be {checksum}: fetch it again"
        )


def _unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" There is: {', '.join(known) or 'none'}."
    raise ModelLoadingError(f"no {kind} is named {name!r}.{hint}")


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


class RemoteRepo(ModelOnlyRepo):
    """Published checkpoints, by signature and address, of which those in the cache are read."""

    def __init__(self, models: Mapping[str, str]) -> None:
        self._models = dict(models)

    def get_model(self, sig: str) -> nn.Module:
        if sig not in self._models:
            _unknown("model", sig, self._models)
        url = self._models[sig]
        path = cache_folder() / Path(urlparse(url).path).name
        if not path.exists():
            raise ModelLoadingError(
                f"the checkpoint {path.name} is not on this machine: fetch {url} into"
                f" {path.parent}, or pass the folder that has it as --repo"
            )
        return _load_checked(path)

    def list_model(self) -> Mapping[str, str]:
        return self._models


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
        if sig not in self._models:
            _unknown("model", sig, self._models)
        return _load_checked(self._models[sig])

    def list_model(self) -> Mapping[str, Path]:
        return self._models


def _load_checked(path: Path) -> nn.Module:
    """The model of a checkpoint, whose file name may end in a checksum."""
    from .states import load_model

    checksum = path.stem.partition("-")[2]
    if checksum:
        check_checksum(path, checksum)
    return load_model(path)


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
        from .apply import BagOfModels

        bag = self._definition(name)
        if not isinstance(bag, dict) or not isinstance(bag.get("models"), list):
            raise ModelLoadingError(f"the bag {name} does not list its models")
        models = {sig: self.model_repo.get_model(str(sig)) for sig in bag["models"]}
        return BagOfModels(
            [models[sig] for sig in bag["models"]], bag.get("weights"), bag.get("segment")
        )

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

    def list_model(self) -> Mapping[str, Any]:
        """Everything there is, by name."""
        return {**self.model_repo.list_model(), **self.bag_repo.list_model()}
