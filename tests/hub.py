"""A server on loopback that speaks as much of the hub's protocol as downloads need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256

from . import web

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_token"


@dataclass
class Hub:
    """Files by `NAMESPACE/REPOSITORY/FILE`, revisions by name, and what was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    private: set[str] = field(default_factory=set)  # repositories that want the token
    renamed: dict[str, str] = field(default_factory=dict)  # repositories, to their new names
    wrong: bool = False  # content is not what is announced
    breaks: list[int] = field(default_factory=list)  # bytes after which the next bodies break off
    failing: int = 0  # status of all answers, if any
    asked: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)  # headers that replace the right ones
    sent: int = 0
    tokens: set[str] = field(default_factory=set)  # that came to the host of the content


class _Handler(web.Handler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub = self.hub
        hub.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if hub.failing:
            return self.head(hub.failing)
        if parts[0] == "cdn":
            hub.tokens.add(self.headers.get("Authorization", ""))
            return self.send(next(c for c in hub.files.values() if digest(c) == parts[1]), body)
        if len(parts) < 5 or parts[2] != "resolve":
            return self.head(404)
        repository, revision, file = "/".join(parts[:2]), "/".join(parts[3:-1]), parts[-1]
        if repository in hub.renamed:
            path = "/".join([hub.renamed[repository], *parts[2:]])
            return self.head(307, Location=f"/{path}")
        known = any(name.startswith(f"{repository}/") for name in hub.files)
        opened = repository not in hub.private
        if not known or not (opened or self.headers.get("Authorization") == f"Bearer {TOKEN}"):
            return self.head(401, X_Error_Code="RepoNotFound")
        commit = hub.revisions.get(revision, revision if revision == COMMIT else "")
        if not commit:
            return self.head(404, X_Error_Code="RevisionNotFound")
        content = hub.files.get(f"{repository}/{file}")
        if content is None:
            return self.head(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if not file.endswith(".safetensors"):
            etag = f'"{sha1(content).hexdigest()}"'
            return self.send(content, body, ETag=etag, X_Repo_Commit=commit)
        facts = {"X_Linked_ETag": f'"{digest(content)}"', "X_Linked_Size": len(content)}
        # Another host, as far as a client can tell.
        location = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest(content)}"
        return self.head(302, Location=location, X_Repo_Commit=commit, **facts)

    def head(self, status: int, **headers: object) -> None:
        super().head(status, **{"Content_Length": 0, **headers, **self.hub.facts})

    def send(self, content: bytes, body: bool, **headers: object) -> None:
        start, length = self.start, len(content) - self.start
        span = (
            {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        )
        self.head(206 if start else 200, Content_Length=length, **span, **headers)
        if body:
            stop = self.hub.breaks.pop(0) if self.hub.breaks else None
            content = content[::-1] if self.hub.wrong else content
            for at in range(start, len(content) if stop is None else stop, 2**16):
                self.wfile.write(content[at : at + 2**16][: None if stop is None else stop - at])
                self.hub.sent += 2**16
            self.close_connection = stop is not None


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


@contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()
    with web.listening(type("Handler", (_Handler,), {"hub": hub})) as hub.url:
        yield hub
