"""Hosts that a checkpoint may come from, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..errors import DownloadError
from ..log import logger
from . import download, hf
from .download import fetch
from .http import HostError, Patience, head, shown
from .registry import Checkpoint, bags_with

CHECKSUM_DIGITS = 8


class Source(Protocol):
    """An address, and what to do to have a verified file of it in a folder."""

    @property
    def url(self) -> str:
        """The address of the file."""

    def fetch(self, folder: Path, patience: Patience) -> Path:
        """Fetch the file into `folder`. Raises `HostError`, or `DownloadError` if none can."""


@dataclass(frozen=True)
class Published:
    """A checkpoint as it was published, with a digest that is known."""

    url: str
    checkpoint: Checkpoint

    def fetch(self, folder: Path, patience: Patience) -> Path:
        """Fetch the file under its own name."""
        target = folder / self.checkpoint.file
        known = self.checkpoint
        fetch(self.url, target, known.sha256, size=known.size, patience=patience)
        return target


@dataclass(frozen=True)
class OnHub:
    """The same weights on the hub of Hugging Face, whose digest the hub announces."""

    url: str
    signature: str
    sha256: str = ""

    def fetch(self, folder: Path, patience: Patience) -> Path:
        """Fetch the file as `SIGNATURE-CHECKSUM.safetensors`, which is verified as it is loaded."""
        facts = head(self.url, patience.timeout)
        etag = facts.get("X-Linked-ETag") or facts.get("ETag") or ""
        announced = etag.removeprefix("W/").strip('"').lower()
        digest = self.sha256 or (announced if hf.DIGEST.fullmatch(announced) else "")
        if not self.sha256:
            check = f"its announced SHA-256, {digest}" if digest else "its announced length"
            logger.debug("%s: no digest is known beforehand: %s is checked", self.url, check)
        own = "" if "Location" in facts else facts.get("Content-Length")  # not of a redirection
        length = facts.get("X-Linked-Size") or own or ""
        checksum = digest and f"-{digest[:CHECKSUM_DIGITS]}"
        target = folder / f"{self.signature}{checksum}{hf.SUFFIX}"
        exact = int(length) if length.isdecimal() else None
        fetch(self.url, target, digest, length=exact, patience=patience)
        return target


def sources_of(signature: str, checkpoint: Checkpoint) -> list[Source]:
    """List where a checkpoint can be fetched: a mirror, its own host, the hub."""
    addresses = (checkpoint.url, *checkpoint.others)
    published: list[Source] = [Published(url, checkpoint) for url in addresses]
    if hf.is_offline():
        return published
    urls = [hf.HubModel(bag).url(f"{signature}{hf.SUFFIX}") for bag in bags_with(signature)[:1]]
    return [*published, *(OnHub(url, signature, checkpoint.safetensors_sha256) for url in urls)]


def fetch_any(sources: Sequence[Source], folder: Path) -> Path:
    """Fetch a file from the first source that gives it.

    Where there are several, each is asked once; if all fail, those that may give it later are asked
    with patience. Raises `DownloadError` with the failure of each.
    """
    failures: dict[str, HostError] = {}
    once = replace(download.PATIENCE, attempts=1)
    for patience in (once, download.PATIENCE)[len(sources) == 1 :]:
        for source in [s for s in sources if s.url not in failures or failures[s.url].may_pass]:
            try:
                path = source.fetch(folder, patience)
            except HostError as exc:
                logger.debug("%s", exc)
                failures[source.url] = exc
            else:
                if failed := [str(exc) for url, exc in failures.items() if url != source.url]:
                    logger.warning("%s: fetched from %s", "; ".join(failed), shown(source.url))
                return path
    raise DownloadError("; ".join(map(str, failures.values())))
