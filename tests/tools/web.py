"""A web server on loopback that misbehaves as it is told."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

CONTENT = bytes(range(251)) * 4000  # 1 MB, of no period that a block has
DIGEST = sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2

Answer = Callable[["Handler", bytes, int], None]


@dataclass
class Web:
    """The files of the server, its answers to the next requests, and a record of requests."""

    url: str = ""
    content: bytes = CONTENT
    others: dict[str, bytes] = field(default_factory=dict)  # by the name of a file
    answers: list[Answer] = field(default_factory=list)
    always: Answer | None = None
    paths: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)  # that each request brought
    sent: int = 0
    code: str = ""  # with which another process uses the registry of the server
    gate: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    @property
    def start(self) -> int:
        """The first byte that is asked for."""
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def do_GET(self) -> None:
        start = self.start
        self.web.paths.append(self.path)
        self.web.starts.append(start)
        self.web.secrets.append(self.headers.get("Authorization", ""))
        answer = self.web.answers.pop(0) if self.web.answers else self.web.always or well
        name = self.path.rpartition("/")[2]
        with suppress(ConnectionError):
            answer(self, self.web.others.get(name, self.web.content), start)

    do_CONNECT = do_GET

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, body: bytes) -> None:
        for start in range(0, len(body), 2**16):
            self.wfile.write(body[start : start + 2**16])
            self.web.sent += len(body[start : start + 2**16])

    def log_message(self, *_: object) -> None:
        pass


def well(handler: Handler, content: bytes, start: int, stop: int | None = None) -> None:
    """The content from `start`, or as far as `stop`, where the connection breaks."""
    span = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
    handler.head(206 if start else 200, Content_Length=len(content) - start, **span)
    handler.send(content[start:stop])
    handler.close_connection = stop is not None


def breaks_at(stop: int) -> Answer:
    return partial(well, stop=stop)


def without_ranges(handler: Handler, content: bytes, start: int) -> None:
    well(handler, content, 0)


def without_length(
    handler: Handler, content: bytes, start: int, stop: int | None = None, chunked: bool = False
) -> None:
    handler.close_connection = True
    if not chunked:
        handler.head(200, Connection="close")
        handler.send(content[:stop])
        return
    handler.head(200, Transfer_Encoding="chunked")
    body = content[:stop]
    handler.send(b"%x\r\n%s\r\n" % (len(body), body) + (b"" if stop else b"0\r\n\r\n"))


def ranged(handler: Handler, body: bytes, first: int, total: object) -> None:
    span = f"bytes {first}-{first + len(body) - 1}/{total}"
    handler.head(206, Content_Length=len(body), Content_Range=span)
    handler.send(body)


def of_unknown_total(handler: Handler, content: bytes, start: int) -> None:
    ranged(handler, content[start:], start, "*")


def less_than_asked(handler: Handler, content: bytes, start: int) -> None:
    if not start:
        return well(handler, content, start, HALF)
    return ranged(handler, content[start:HALF], start, len(content))


def another_range(handler: Handler, content: bytes, start: int) -> None:
    ranged(handler, content[7:], 7, len(content))


def wrong(handler: Handler, content: bytes, start: int) -> None:
    well(handler, content[::-1], start)


def endless(handler: Handler, content: bytes, start: int) -> None:
    handler.head(200, Connection="close")
    for _ in count():
        handler.send(content)


def trickle(handler: Handler, content: bytes, start: int) -> None:
    handler.head(200, Content_Length=len(content))
    for byte in content:
        handler.send(bytes([byte]))
        handler.web.gate.wait(0.005)


def stalls_at(stop: int) -> Answer:
    """The content as far as `stop`, and the rest when the gate opens."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        well(handler, content, start, stop)
        handler.close_connection = False
        handler.web.gate.wait()
        handler.send(content[stop:])

    return answer


def status(code: int, **headers: object) -> Answer:
    def answer(handler: Handler, content: bytes, start: int) -> None:
        handler.head(code, Content_Length=0, **headers)

    return answer


def to(location: str, body: bool = False) -> Answer:
    """A redirect, if wanted with a body that does not end."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        handler.close_connection = True
        handler.head(302, Location=location, **({} if body else {"Content_Length": 0}))
        while body:
            handler.send(content)

    return answer


def slowly(head: bytes, line: bytes) -> Answer:
    """The start of an answer, and then one line after the other until the gate opens."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        handler.close_connection = True
        handler.wfile.write(head)
        while not handler.web.gate.wait(0.02):
            handler.wfile.write(line)

    return answer


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
# Each brings bytes all the time, and never a block of the body.
SLOW = {
    "headers": slowly(OK, b"X-More: 1\r\n"),
    "a status line": slowly(b"HTTP/1.1 200 ", b"O"),
    "chunk sizes": slowly(CHUNKED, b"0"),
    "chunk extensions": slowly(CHUNKED + b"5;", b"x"),
    "trailers": slowly(CHUNKED + b"1\r\nx\r\n0\r\n", b"X-More: 1\r\n"),
}


def raw(head: bytes) -> Answer:
    """An answer that the standard library would not write."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        handler.close_connection = True
        handler.wfile.write(head + b"\r\n\r\n" + content)

    return answer


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Web]:
    """Run the server, with HTTPS if there is a `context`."""
    web = Web()
    with listening(type("WebHandler", (Handler,), {"web": web}), context) as web.url:
        try:
            yield web
        finally:
            web.gate.set()


@contextmanager
def listening(
    handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Run a server with `handler` and yield its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients may leave
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
