"""The stems that are wanted: sources of the model, and sums of them under the user's names.

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
NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]|^\.|\.$')  # on Windows, which forbids most
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
        """Return the stem for "vocals" or "music=drums+bass". Raises `OptionError` for neither."""
        name, equals, parts = (part.strip() for part in text.partition("="))
        sources = tuple(part.strip() for part in parts.split("+")) if equals else (name,)
        if "" in (name, *sources):
            raise OptionError(
                f"stem {text!r}: use the name of a source, or NAME=SOURCE+SOURCE for a sum"
            )
        if len(set(sources)) < len(sources):
            raise OptionError(f"stem {text!r}: has a source twice")
        is_device = name.partition(".")[0].strip().lower() in DEVICES
        if is_device or NOT_IN_NAMES.search(name) or len(name) > LONGEST_NAME:
            raise OptionError(
                f"stem {name[:LONGEST_NAME]!r}: cannot be the name of a file: use another"
            )
        return cls(name, sources)

    def __str__(self) -> str:
        return (
            self.name if self.sources == (self.name,) else f"{self.name}={'+'.join(self.sources)}"
        )


def parse_stems(wanted: str | Iterable[str] | None, sources: Sequence[str]) -> tuple[Stem, ...]:
    """Return the stems of a model with `sources` that a user wants, in the user's order.

    `wanted` is a text with commas, or its parts; None and "all" mean every source. Raises
    `OptionError` for an unknown source, two stems of one name, a name that no file can have, and
    no stem.
    """
    every = [Stem(source, (source,)) for source in sources]
    if wanted is None:
        return tuple(every)
    stems: list[Stem] = []
    for text in wanted.split(",") if isinstance(wanted, str) else wanted:
        is_all = text.strip() == ALL and ALL not in sources
        stems += every if is_all else [Stem.parse(text)]
    if not stems:
        raise OptionError(f"no stem is wanted: choose among {', '.join(sources)}")
    seen: set[str] = set()
    for stem in stems:
        for source in stem.sources:
            if source not in sources:
                raise OptionError(
                    f"the model has no stem {source!r}: choose among {', '.join(sources)}"
                )
        name = stem.name.casefold()  # two names of one file, on some disks
        if name in seen:
            raise OptionError(f"two stems would be named {stem.name!r}: give one another name")
        seen.add(name)
    return tuple(stems)


def needed_sources(stems: Iterable[Stem], sources: Sequence[str]) -> list[str]:
    """Return the sources that `stems` are made of, in the model's order."""
    wanted = {source for stem in stems for source in stem.sources}
    return [source for source in sources if source in wanted]


def mix(stem: Stem, sources: Mapping[str, Tensor]) -> Tensor:
    """Return the samples of `stem` from those of its sources, which stay unchanged."""
    if not stem.sources:  # all but the one source of a model
        first = next(iter(sources.values()))
        return first.new_zeros(first.shape)
    return reduce(add, (sources[name] for name in stem.sources))


def mixed(stems: Sequence[Stem], sources: Sequence[str], block: Tensor) -> Tensor:
    """Return a block `[1, K, C, n]` of `stems` from a block `[1, S, C, n]` of `sources`."""
    if [stem.sources for stem in stems] == [(source,) for source in sources]:
        return block
    parts = dict(zip(sources, block.unbind(1)))
    result = block.new_empty(1, len(stems), *block.shape[2:])
    for index, stem in enumerate(stems):
        result[:, index] = mix(stem, parts)
    return result
