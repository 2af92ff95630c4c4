"""Which stems are wanted: sources of the model, and sums of them under names of the user's own.

    vocals,instrumental=drums+bass+other     two stems, of four sources
    all                                      every source of the model

Importing this needs no PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

ALL = "all"  # stands for every source
LONGEST_NAME = 100  # characters of a stem's name, which becomes a file's
NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')  # of Windows, which has most of them
DEVICES = frozenset(  # names that Windows takes for devices, with any suffix
    ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))]
)


@dataclass(frozen=True)
class Stem:
    """A stem that is wanted: its name, and the sources that it is the sum of."""

    name: str
    sources: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Stem:
        """The stem that "vocals" or "music=drums+bass" means. Raises `OptionError` for neither."""
        name, equals, parts = (part.strip() for part in text.partition("="))
        sources = tuple(part.strip() for part in parts.split("+")) if equals else (name,)
        if "" in (name, *sources):
            raise OptionError(
                f"stem {text!r}: use the name of a source, or NAME=SOURCE+SOURCE for a sum"
            )
        if len(set(sources)) < len(sources):
            raise OptionError(f"stem {text!r}: has a source twice")
        _check_file_name(name)
        return cls(name, sources)

    def __str__(self) -> str:
        return self.name if self.sources == (self.name,) else f"{self.name}={self._sum}"

    @property
    def _sum(self) -> str:
        return "+".join(self.sources)


def _check_file_name(name: str) -> None:
    unfit = (
        NOT_IN_NAMES.search(name)
        or name.endswith(".")
        or name.startswith(".")
        or name.partition(".")[0].strip().lower() in DEVICES
        or len(name) > LONGEST_NAME
    )
    if unfit:
        raise OptionError(
            f"stem {name[:LONGEST_NAME]!r}: cannot be the name of a file: use another"
        )


def parse_stems(wanted: str | Iterable[str] | None, sources: Sequence[str]) -> tuple[Stem, ...]:
    """The stems that `wanted` means for a model with `sources`, in their order.

    `wanted` is a text with commas, or its parts; None and "all" mean every source. Raises
    `OptionError` for a source that there is not, a name that comes twice or is no file's, and a sum
    of nothing.
    """
    if wanted is None:
        return tuple(Stem(source, (source,)) for source in sources)
    texts = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    stems = [stem for text in texts for stem in _meant(text, sources)]
    if not stems:
        raise OptionError(f"no stem is wanted: choose among {', '.join(sources)}")
    _check_known(stems, sources)
    _check_names(stems)
    return tuple(stems)


def _meant(text: str, sources: Sequence[str]) -> Iterable[Stem]:
    if text.strip() == ALL and ALL not in sources:
        return parse_stems(None, sources)
    return [Stem.parse(text)]


def _check_known(stems: Iterable[Stem], sources: Sequence[str]) -> None:
    for stem in stems:
        for source in stem.sources:
            if source not in sources:
                raise OptionError(
                    f"there is no stem {source!r}: the model has {', '.join(sources)}"
                )


def _check_names(stems: Iterable[Stem]) -> None:
    seen: dict[str, str] = {}
    for stem in stems:
        name = stem.name.casefold()  # two names of one file, on some disks
        if name in seen:
            raise OptionError(f"two stems would be named {stem.name!r}: give one another name")
        seen[name] = stem.name


def needed_sources(stems: Iterable[Stem], sources: Sequence[str]) -> list[str]:
    """The sources that `stems` are made of, in the model's order."""
    wanted = {source for stem in stems for source in stem.sources}
    return [source for source in sources if source in wanted]


def mix(stem: Stem, sources: Mapping[str, Tensor]) -> Tensor:
    """The samples of `stem` from those of its sources, which are not changed."""
    return reduce(add, (sources[name] for name in stem.sources))


def mixed(stems: Sequence[Stem], sources: Sequence[str], block: Tensor) -> Tensor:
    """A block `[1, K, C, n]` of `stems`, from a block `[1, S, C, n]` of the model's `sources`."""
    if [stem.sources for stem in stems] == [(source,) for source in sources]:
        return block
    parts = dict(zip(sources, block.unbind(1)))
    result = block.new_empty(1, len(stems), *block.shape[2:])
    for index, stem in enumerate(stems):
        result[:, index] = mix(stem, parts)
    return result
