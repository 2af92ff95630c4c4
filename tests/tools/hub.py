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
class Hub(web.Web):
    """Files by `NAMESPACE/REPOSITORY/FILE`, revisions by name, and a record of requests."""

    files: dict[str, bytes] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    private: set[str] = field(default_factory=set)  # repositories that want the token
    renamed: dict[str, str] = field(default_factory=dict)  # repositories, to their new names
    wrong: bool = False  # the content differs from the announced one
    breaks: list[int] = field(default_factory=list)  # bytes after which the next bodies break off
    failing: int = 0  # status of all answers, if any
    asked: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)  # headers that replace the right ones
    tokens: set[str] = field(default_factory=set)  # that came to the host of the content


class _Handler(web.Handler):
    web: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub = self.web
        hub.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if hub.failing:
            return self.head(hub.failing)
        if parts[0] == "cdn":
            hub.tokens.add(self.headers.get("Authorization", ""))
            return self.file(next(c for c in hub.files.values() if digest(c) == parts[1]), body)
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
            return self.file(content, body, ETag=etag, X_Repo_Commit=commit)
        facts = {"X_Linked_ETag": f'"{digest(content)}"', "X_Linked_Size": len(content)}
        # Another host, as far as a client can tell.
        location = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest(content)}"
        return self.head(302, Location=location, X_Repo_Commit=commit, **facts)

    def head(self, status: int, **headers: object) -> None:
        super().head(status, **{"Content_Length": 0, **headers, **self.web.facts})

    def file(self, content: bytes, body: bool, **headers: object) -> None:
        if not body:
            return self.head(200, Content_Length=len(content), **headers)
        stop = self.web.breaks.pop(0) if self.web.breaks else None
        return web.well(self, content[::-1] if self.web.wrong else content, self.start, stop)


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


@contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()
    with web.listening(type("Handler", (_Handler,), {"web": hub})) as hub.url:
        yield hub
