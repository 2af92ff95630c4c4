"""Repositories of models and bags: a folder, the published checkpoints with a cache, or the hub.

Looking up and listing needs no PyTorch, which is imported when a model is built.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DownloadError, ModelLoadingError
from .hub import hf, registry
from .hub.checkpoints import Bag, Content, read_package, read_weights
from .hub.pickles import ClassName
from .hub.registry import Checkpoint, fetch_any, sources_of
from .log import logger
from .storage.http import redact

if TYPE_CHECKING:
    from torch import nn

    from .engine.bag import BagOfModels

    AnyModel = nn.Module | BagOfModels

T = TypeVar("T")

CHECKPOINT_SUFFIXES = (".th", ".safetensors")
MANY = 20  # names that a message lists at most
NO_NETWORK = "and nothing is fetched offline"


def __getattr__(name: str) -> Any:
    if name != "AnyModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch import nn

    from .engine.bag import BagOfModels

    return nn.Module | BagOfModels


def check_checksum(path: Path, checksum: str) -> None:
    """Raise `ModelLoadingError` unless the SHA-256 of the file starts with `checksum`."""
    Content.read(path).checked(checksum)


def _entry(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return the entry of a name. Raises `ModelLoadingError` that suggests another name."""
    if name in known:
        return known[name]
    folded = {candidate.casefold(): candidate for candidate in sorted(known)}
    longer = [each for each in folded if len(name) > 2 and each.startswith(name.casefold())]
    if near := longer or difflib.get_close_matches(name[:100].casefold(), folded, n=1):
        hint = f"Did you mean {folded[near[0]]}?"
    elif len(folded) > MANY:
        hint = "See demucs-infer --list-models."
    else:
        hint = f"There is: {', '.join(folded.values()) or 'none'}."
    raise ModelLoadingError(f"no {kind} is named {name[:100]!r}. {hint}")


class ModelOnlyRepo:
    """A source of single models, by signature."""

    def has_model(self, sig: str) -> bool:
        """Return True if there is a model with this signature."""
        return sig in self.list_model()

    def get_model(self, sig: str) -> nn.Module:
        """Build the model with this signature. Raises `ModelLoadingError`."""
        from .states import build_model

        content = self.read(sig)
        path, package = str(content.path), self._package(sig, content)
        # The model needs the memory of the file.
        del content
        return build_model(package, path)

    def _package(self, sig: str, content: Content) -> dict[str, Any]:
        return read_package(content)

    def list_model(self) -> Mapping[str, str | Path]:
        """Return the origin of each model, by signature."""
        raise NotImplementedError

    def read(self, sig: str) -> Content:
        """Return the verified bytes of a model's file. Raises `ModelLoadingError`."""
        raise NotImplementedError

    def require(self, signatures: Iterable[str]) -> None:
        """Raise `ModelLoadingError` if some of these models are known to be out of reach."""


class RemoteRepo(ModelOnlyRepo):
    """Published checkpoints, by signature and URL, which are downloaded into a cache.

    A released one is also looked for in the cache of the hub of Hugging Face, and downloaded from
    there if its own host fails. A file that the registry does not know is verified by the checksum
    in its name, and not downloaded if there is none.

    Args:
        models: the URL of each checkpoint, by signature (default: all of the registry).
        cache_dir: the folder to keep them in (default: see `registry.cache_folder`).
        offline: never download (default: the variable `DEMUCS_INFER_OFFLINE`).
    """

    def __init__(
        self,
        models: Mapping[str, str] | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
    ) -> None:
        known = registry.checkpoints()
        urls = {sig: checkpoint.urls[0] for sig, checkpoint in known.items()}
        self._models = urls if models is None else dict(models)
        self._cache_dir, self._offline = cache_dir, offline
        self._required: list[str] = []  # signatures of a bag, which messages name together
        self._checkpoints = {
            sig: known[sig]
            if sig in known and url in known[sig].urls
            else Checkpoint(url, PurePosixPath(url).stem.partition("-")[2])
            for sig, url in self._models.items()
        }

    def list_model(self) -> Mapping[str, str]:
        return self._models

    def _package(self, sig: str, content: Content) -> dict[str, Any]:
        architecture = self._checkpoints[sig].architecture
        if architecture is None:
            return read_package(content)
        klass = ClassName(architecture["klass"])
        return {**architecture, "klass": klass, "state": read_weights(content)}

    def read(self, sig: str) -> Content:
        """Return the verified bytes of a checkpoint, which is downloaded if it is not there.

        Raises `DownloadError` if it cannot be downloaded, `ModelLoadingError` if it cannot be read
        or the signature is unknown.
        """
        checkpoint, problems = _entry("model", sig, self._checkpoints), []
        for path, digest in self._files(sig):
            try:
                content = Content.read(path).checked(digest, "")
            except ModelLoadingError as exc:
                problems.append(str(exc))
            else:
                if problems:
                    logger.warning("%s. %s is used", "; ".join(problems), path)
                return content
        absent = list(dict.fromkeys([sig, *self._absent()]))
        problem = "; ".join(problems) or self._absence(absent)
        if checkpoint.embedded:
            raise ModelLoadingError(f"{problem}. Install the package again")
        if registry.is_offline(self._offline):
            raise DownloadError(f"{problem}, {NO_NETWORK}. {self._by_hand(absent)}")
        try:
            path, digest = fetch_any(sources_of(sig, checkpoint), self._own_path(sig).parent)
        except DownloadError as exc:
            raise DownloadError(f"{exc}. {problem}. {self._by_hand(absent)}") from exc
        return Content.read(path).checked(digest)

    def _own_path(self, sig: str) -> Path:
        checkpoint = _entry("model", sig, self._checkpoints)
        return checkpoint.embedded or registry.cache_folder(self._cache_dir) / checkpoint.file

    def _files(self, sig: str) -> Iterator[tuple[Path, str]]:
        """Yield the files here that may be a checkpoint, each with the digest it must have."""
        own, checkpoint = self._own_path(sig), self._checkpoints[sig]
        folder: list[Path] = []
        # The folder may be unreadable, or not exist.
        with suppress(OSError):
            if own.exists():
                yield own, checkpoint.sha256
            folder = sorted(own.parent.iterdir())
        if checkpoint.embedded or not (bags := registry.bags_with(sig)):
            return
        for path in folder:
            name, _, checksum = path.stem.partition("-")
            if path.suffix == hf.SUFFIX and name == sig and path != own:
                yield path, checkpoint.safetensors_sha256 or checksum
        for bag in bags:
            file = hf.cached_file(hf.HubModel(bag), f"{sig}{hf.SUFFIX}", any_revision=True)
            if file:
                yield file, checkpoint.safetensors_sha256 or hf.known_digest(file)

    def locate(self, sig: str) -> tuple[Path, bool]:
        """Return the file of a checkpoint, or the one that it would be, and True if it is there."""
        found = next((path for path, _ in self._files(sig)), None)
        return found or self._own_path(sig), found is not None

    def _absent(self) -> list[str]:
        missing = (sig for sig in self._required if not self.locate(sig)[1])
        return [sig for sig in missing if not self._checkpoints[sig].embedded]

    def require(self, signatures: Iterable[str]) -> None:
        self._required = list(dict.fromkeys(signatures))
        absent = self._absent()
        if absent and registry.is_offline(self._offline):
            raise DownloadError(f"{self._absence(absent)}, {NO_NETWORK}. {self._by_hand(absent)}")

    def _absence(self, signatures: Sequence[str]) -> str:
        names = ", ".join(self.locate(sig)[0].name for sig in signatures)
        return f"{names} {'is' if len(signatures) == 1 else 'are'} not on this machine"

    def _by_hand(self, signatures: Sequence[str]) -> str:
        """Describe how to do without a download, with the URLs and digests of the files."""
        files = [
            " or ".join(
                f"{redact(source.url)}{source.sha256 and f' (SHA-256 {source.sha256})'}"
                for source in sources_of(sig, self._checkpoints[sig])
            )
            for sig in signatures
        ]
        them, folder = "it" if len(files) == 1 else "them", self._own_path(signatures[0]).parent
        return (
            f"Copy {them} into {folder}, or into a folder for --cache-dir (or for --repo, with a"
            f" NAME.yaml for a bag), from {', '.join(files)}"
        )


class _HubModels(ModelOnlyRepo):
    """The checkpoints of a model on the hub of Hugging Face, in the hub's cache."""

    def __init__(self, model: hf.HubModel, offline: bool) -> None:
        self.model, self._offline = model, offline

    def list_model(self) -> Mapping[str, str]:
        return {}

    def read(self, sig: str) -> Content:
        path = hf.hub_file(self.model, hf.checkpoint_file(sig), offline=self._offline)
        remedy = f"Delete {path.resolve()} to download it again"
        return Content.read(path).checked(hf.known_digest(path), remedy)

    def require(self, signatures: Iterable[str]) -> None:
        for sig in signatures:
            hf.checkpoint_file(sig)


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
            signature = path.stem.partition("-")[0]
            wanted = self._only is None or signature in self._only
            if path.suffix not in CHECKPOINT_SUFFIXES or not wanted:
                continue
            if other := self._models.get(signature):
                names = f"{other.name} and {path.name}"
                text = f"two files are the model {signature}: {names}"
                raise ModelLoadingError(f"{self.root}: {text}")
            self._models[signature] = path

    @classmethod
    def of_file(cls, path: Path) -> LocalRepo:
        """Open one checkpoint, whose signature is the stem of its name: that has no checksum."""
        repo = cls(path.parent, only=())
        repo._models = {path.stem: path}
        return repo

    def list_model(self) -> Mapping[str, Path]:
        return self._models

    def read(self, sig: str) -> Content:
        path = _entry("model", sig, self._models)
        # The signature of a single file is its whole stem.
        return Content.read(path).checked(path.stem.removeprefix(sig).removeprefix("-"))


class BagOnlyRepo:
    """A folder of bags, each a file `NAME.yaml`, whose models come from `model_repo`."""

    def __init__(self, root: Path, model_repo: ModelOnlyRepo) -> None:
        self.root = Path(root)
        self.model_repo = model_repo
        self._bags = {path.stem: path for path in sorted(self.root.glob("*.yaml"))}

    @classmethod
    def of_files(cls, bags: Mapping[str, Path], model_repo: ModelOnlyRepo) -> BagOnlyRepo:
        """Open bags by their names and files."""
        repo = cls.__new__(cls)
        repo.model_repo, repo._bags = model_repo, dict(bags)
        return repo

    def has_model(self, name: str) -> bool:
        """Return True if there is a bag of this name."""
        return name in self._bags

    def get_model(self, name: str) -> BagOfModels:
        """Build the bag of this name with its models. Raises `ModelLoadingError`."""
        from .engine.bag import BagOfModels

        bag = self._read(name)

        self.model_repo.require(bag.models)
        models = {sig: self.model_repo.get_model(sig) for sig in dict.fromkeys(bag.models)}
        return BagOfModels([models[sig] for sig in bag.models], bag.weights, bag.segment)

    def members(self, name: str) -> list[str]:
        """Return the signatures of a bag's models. Raises `ModelLoadingError`."""
        return list(self._read(name).models)

    def _read(self, name: str) -> Bag:
        return Bag.read(_entry("bag", name, self._bags))

    def list_model(self) -> Mapping[str, Path]:
        """Return the file of each bag, by name."""
        return self._bags


class AnyModelRepo:
    """Bags and single models in one repository. A name of both is that of the model."""

    def __init__(self, model_repo: ModelOnlyRepo, bag_repo: BagOnlyRepo) -> None:
        self.model_repo = model_repo
        self.bag_repo = bag_repo

    @classmethod
    def of_file(cls, path: Path) -> AnyModelRepo:
        """Open one checkpoint, or one bag `NAME.yaml` whose models lie beside it."""
        if path.suffix in CHECKPOINT_SUFFIXES:
            model = LocalRepo.of_file(path)
            return cls(model, BagOnlyRepo.of_files({}, model))
        members = LocalRepo(path.parent, only=Bag.read(path).models)
        # The bag is meant, and not a model of its name.
        no_model = LocalRepo(path.parent, only=())
        return cls(no_model, BagOnlyRepo.of_files({path.stem: path}, members))

    @classmethod
    def of_hub(cls, model: hf.HubModel, offline: bool) -> AnyModelRepo:
        """Open a model on the hub of Hugging Face. Raises `DownloadError`."""
        bag = hf.hub_file(model, f"{model.name}.yaml", offline=offline)
        # All files are of one revision, also if there is a new one by now.
        members = _HubModels(replace(model, revision=bag.parent.name), offline)
        return cls(members, BagOnlyRepo.of_files({model.name: bag}, members))

    def has_model(self, name_or_sig: str) -> bool:
        """Return True if there is a model or a bag of this name."""
        return self.model_repo.has_model(name_or_sig) or self.bag_repo.has_model(name_or_sig)

    def get_model(self, name_or_sig: str) -> nn.Module:
        """Build the model or the bag. Raises `ModelLoadingError`."""
        return self._home(name_or_sig).get_model(name_or_sig)

    def _home(self, name_or_sig: str) -> ModelOnlyRepo | BagOnlyRepo:
        for repo in (self.model_repo, self.bag_repo):
            if repo.has_model(name_or_sig):
                return repo
        # This raises, as neither has the name.
        return _entry("model", name_or_sig, self.list_model())

    def members(self, name_or_sig: str) -> tuple[ModelOnlyRepo, list[str]]:
        """Return the models that a name stands for. Raises `ModelLoadingError`."""
        home = self._home(name_or_sig)
        if isinstance(home, BagOnlyRepo):
            return home.model_repo, home.members(name_or_sig)
        return home, [name_or_sig]

    def require(self, name_or_sig: str) -> None:
        """Raise `ModelLoadingError` if a file that the name stands for is known to be missing."""
        repo, signatures = self.members(name_or_sig)
        repo.require(signatures)

    def fetch(self, name_or_sig: str) -> list[Path]:
        """Return the verified files that a name stands for. Raises `ModelLoadingError`."""
        repo, signatures = self.members(name_or_sig)
        return [repo.read(sig).path for sig in dict.fromkeys(signatures)]

    def list_model(self) -> Mapping[str, Any]:
        """Return the origin of each model and bag, by name."""
        return {**self.model_repo.list_model(), **self.bag_repo.list_model()}
