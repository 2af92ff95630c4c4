"""The catalog of models, and the commands `--list-models` and `--download`.

Neither needs PyTorch.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .batch.console import json_text, put
from .errors import OptionError
from .hub.registry import MEGABYTE, NOT_STATED, bags, cache_folder, checkpoints, is_community
from .pretrained import find_model, open_repo
from .repo import RemoteRepo

WIDTH = 100  # columns of the listing
LONGEST_NAME = 30  # columns of a model's name, unless it is longer
# The sections of the listing, by group and kind. Those of SIGNATURES need --verbose.
NOT_OURS = "of the community (not by the authors of Demucs)"
TITLES = {
    ("released", "bag"): "Bags of models (licence of the weights: not stated)",
    ("community", "bag"): f"Bags of models {NOT_OURS}",
    ("local", "bag"): "Bags of models",
    ("embedded", "single"): "In the package, to try things out",
    ("local", "single"): "Single models",
    ("released", "single"): "Single models by signature (licence of the weights: not stated)",
    ("community", "single"): f"Single models {NOT_OURS}",
}
SIGNATURES = (("released", "single"), ("community", "single"))


@dataclass(frozen=True)
class CheckpointFile:
    """A file of a model, which is at `path` once it is downloaded.

    `size` is in bytes, rounded as long as the file is not on disk, None if not known. `sha256` is
    the digest of `url`.
    """

    path: Path
    on_disk: bool
    size: int | None
    url: str | None = None
    sha256: str | None = None
    source: str | None = None
    licence: str = NOT_STATED


@dataclass(frozen=True)
class Entry:
    """A bag or a single model. `stems` is None if only the checkpoint itself names them."""

    name: str
    kind: str  # "bag" or "single"
    group: str  # "embedded", "released", "community" or "local"
    stems: list[str] | None
    description: str
    models: list[str]  # signatures, those of a bag in its order
    files: list[CheckpointFile]

    @property
    def on_disk(self) -> bool:
        """True if all of its files are there."""
        return all(file.on_disk for file in self.files)

    @property
    def licence(self) -> str:
        """The licences of its files."""
        return "; ".join(sorted({file.licence for file in self.files})) or NOT_STATED

    @property
    def size(self) -> int | None:
        """Bytes of all of its files, if known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def as_json(self) -> dict[str, Any]:
        """Return the entry as plain values."""
        derived = {"size": self.size, "on_disk": self.on_disk, "licence": self.licence}
        return {**asdict(self), **derived}

    def described(self, name_width: int, verbose: bool) -> str:
        """Return the entry as lines of at most `WIDTH` columns: size, stems, use and origin.

        `verbose` adds the folders of its files, on a line that may be longer.
        """
        size = "size unknown" if self.size is None else f"{round(self.size / MEGABYTE)} MB"
        here = "on disk" if self.on_disk else "not on disk"
        facts = f"  {here:11}  {size:>12}  "
        text = ": ".join(filter(None, (", ".join(self.stems or ()), self.description)))
        origins = {f"{f.source}, licence: {f.licence}" for f in self.files if f.source}
        text += f" ({'; '.join(sorted(origins))})" if origins else ""
        text = f"    {self.name:{name_width}}{facts}{text}"
        indent = " " * (4 + name_width + len(facts))
        lines = textwrap.wrap(
            text,
            WIDTH,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        if verbose and self.on_disk:
            lines += sorted({f"{indent}in {file.path.parent}" for file in self.files})
        return "\n".join(line.rstrip() for line in lines)


def catalog(
    repo: Path | None = None, *, cache_dir: str | os.PathLike[str] | None = None
) -> list[Entry]:
    """Return the published models, or those in `repo`. Raises `ModelLoadingError`."""
    return list(_published(cache_dir) if repo is None else _local(repo))


def _published(cache_dir: str | os.PathLike[str] | None) -> Iterator[Entry]:
    remote = RemoteRepo(cache_dir=cache_dir)
    files = {sig: _cached_file(remote, sig) for sig in remote.list_model()}
    stems: dict[str, list[str]] = {}
    for name, bag in bags().items():
        models = bag["models"]
        stems.update(dict.fromkeys(models, bag["sources"]))
        members = [files[sig] for sig in dict.fromkeys(models)]
        group, text = "community" if is_community(name) else "released", bag["description"]
        yield Entry(name, "bag", group, bag["sources"], text, models, members)
    for sig, checkpoint in checkpoints().items():
        group = "community" if is_community(sig) else "released"
        group, text = "embedded" if checkpoint.embedded else group, checkpoint.description
        sources = list(checkpoint.sources or stems.get(sig) or ())
        yield Entry(sig, "single", group, sources, text, [sig], [files[sig]])


def _cached_file(remote: RemoteRepo, sig: str) -> CheckpointFile:
    (path, there), item = remote.locate(sig), checkpoints()[sig]
    size = path.stat().st_size if there else item.size
    return CheckpointFile(path, there, size, item.urls[0], item.sha256, item.source, item.licence)


def _local(repo: Path) -> Iterator[Entry]:
    models = open_repo(repo)
    paths: dict[str, Path] = dict(models.model_repo.list_model())  # type: ignore[arg-type]
    files = {sig: CheckpointFile(p, True, p.stat().st_size) for sig, p in paths.items()}
    for name in sorted(models.bag_repo.list_model()):
        members = models.bag_repo.members(name)
        absent = {sig: CheckpointFile(repo / f"{sig}.th", False, None) for sig in members}
        found = [{**absent, **files}[sig] for sig in dict.fromkeys(members)]
        yield Entry(name, "bag", "local", None, "", members, found)
    for sig, file in files.items():
        yield Entry(sig, "single", "local", None, "", [sig], [file])


def add_catalog_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--list-models`, `--json` and `--download`."""
    parser.add_argument(
        "--list-models",
        action="store_true",
        help="list the models (of --repo if given) with size and stems, and exit",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per track on standard output; with --list-models: the list",
    )
    parser.add_argument(
        "--download",
        nargs="+",
        metavar="NAME",
        help="fetch and verify these models, print their files, and exit",
    )


def print_models(args: argparse.Namespace) -> None:
    """Print the catalog on standard output, for people or as JSON."""
    entries = catalog(args.repo, cache_dir=args.cache_dir)
    if args.json:
        folder = args.repo or cache_folder(args.cache_dir)
        content = {"folder": folder, "models": [entry.as_json() for entry in entries]}
        put(json_text(content, indent=1), sys.stdout)
        return
    hidden = 0
    for key, title in TITLES.items():
        section = [entry for entry in entries if (entry.group, entry.kind) == key]
        if key in SIGNATURES and not args.verbose:
            hidden += len(section)
        elif section:
            width = min(LONGEST_NAME, max(len(entry.name) for entry in section))
            lines = [f"{title}:", *(entry.described(width, args.verbose) for entry in section)]
            put("\n".join(lines), sys.stdout)
    if hidden:
        put(f"{hidden} single models by signature: add --verbose", sys.stdout)


def download_models(args: argparse.Namespace) -> None:
    """Fetch and verify the files of the models `args.download`, and print their paths.

    Raises `OptionError` for use with `--repo`, `ModelLoadingError` for a model that is unknown or
    cannot be fetched.
    """
    if args.repo:
        raise OptionError("--download is for published models: leave out --repo")
    where = {"cache_dir": args.cache_dir, "offline": args.offline}
    wanted = [find_model(name, **where) for name in args.download]
    for models, name in wanted:
        models.require(name)
    files = dict.fromkeys(path for models, name in wanted for path in models.fetch(name))
    for path in files:
        put(str(path), sys.stdout)
