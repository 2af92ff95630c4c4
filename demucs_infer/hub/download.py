"""The hosts that a published checkpoint may come from, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DownloadError
from ..log import logger
from ..storage import http
from . import hf
from .registry import Checkpoint, bags_with


@dataclass(frozen=True)
class Source:
    """A URL of a checkpoint: of its published file, or of the same weights as `twin` on the hub.

    `sha256` is the digest that is known beforehand, or "".
    """

    url: str
    sha256: str
    signature: str
    checkpoint: Checkpoint
    twin: hf.HubModel | None = None

    def fetch(self, folder: Path, limits: http.Limits) -> tuple[Path, str]:
        """Download the file into `folder`, and return its path and the digest that it must have.

        A twin becomes `SIGNATURE-CHECKSUM.safetensors`, to be verified when it is loaded. Raises
        `HostError`, or `DownloadError`.
        """
        if self.twin is None:
            path, size = folder / self.checkpoint.file, self.checkpoint.size
            # The size in the registry is rounded.
            most = None if size is None else size + size // 4 + 2**20
            http.Download(self.url, path, self.sha256, most=most, limits=limits).run()
            return path, self.sha256
        found = hf.RemoteFile.ask(self.url)
        digest = self.sha256 or found.sha256
        path = folder / f"{self.signature}{digest and '-'}{digest[:8]}{hf.SUFFIX}"
        found.download(path, digest, limits)
        return path, digest


def sources_of(signature: str, checkpoint: Checkpoint) -> list[Source]:
    """List the URLs of a checkpoint: on a mirror, on its host, and on the hub."""
    urls = checkpoint.urls
    sources = [Source(url, checkpoint.sha256, signature, checkpoint) for url in urls]
    for twin in [] if hf.is_offline() else map(hf.HubModel, bags_with(signature)[:1]):
        url, digest = twin.url(f"{signature}{hf.SUFFIX}"), checkpoint.safetensors_sha256
        sources.append(Source(url, digest, signature, checkpoint, twin))
    return sources


def fetch_any(sources: Sequence[Source], folder: Path) -> tuple[Path, str]:
    """Download a file from the first source that delivers it, as `Source.fetch` does.

    Of several sources each is tried once, and then those that may deliver it later with retries.
    Raises `DownloadError` with the failure of each host, first of those without a connection.
    """
    failures: dict[str, http.HostError] = {}
    once = replace(http.LIMITS, attempts=1)
    for limits in (once, http.LIMITS)[len(sources) == 1 :]:
        for source in sources:
            failure = failures.get(source.url)
            if failure and not (failure.temporary and failure.answered):
                continue
            try:
                found = source.fetch(folder, limits)
            except http.HostError as exc:
                logger.debug("%s", exc)
                failures[source.url] = exc
                continue
            if failed := [exc.summary for url, exc in failures.items() if url != source.url]:
                logger.warning("%s: fetched from %s", "; ".join(failed), http.redact(source.url))
            return found
    ordered = sorted(failures.values(), key=lambda exc: exc.answered)
    raise DownloadError("; ".join(dict.fromkeys(exc.summary for exc in ordered)))
