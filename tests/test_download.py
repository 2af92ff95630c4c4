"""Downloads from a server on loopback that misbehaves."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from demucs_infer.errors import DownloadError
from demucs_infer.hub import download, http
from demucs_infer.hub.download import fetch
from demucs_infer.hub.http import Patience

from . import web as answers
from .web import CONTENT, DIGEST, HALF, Web, breaks_at, serving, stalls_at, status

QUICK = Patience(backoff=0.0, timeout=10.0)
SIZE = len(CONTENT)
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")

# Fetches argv[1] as argv[2], with messages on standard error.
SCRIPT = f"""
import logging, pathlib, signal, sys
from demucs_infer.hub.download import fetch
from demucs_infer.hub.http import Patience
logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
fetch(sys.argv[1], pathlib.Path(sys.argv[2]), "{DIGEST}", patience=Patience(timeout=600))
"""


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "file.th"


def get(web: Web, target: Path, digest: str = DIGEST, **options: object) -> None:
    options = {"patience": QUICK, **options}
    fetch(f"{web.url}/file.th", target, digest, **options)


def names(target: Path) -> set[str]:
    """What is in the folder of `target`."""
    return {path.name for path in target.parent.iterdir()}


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Wait until `condition` holds, or stop the processes that do not bring it about."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline or any(process.poll() for process in processes):
            for process in processes:
                process.kill()
            pytest.fail("what was waited for did not happen")
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("faults", "starts", "options"),
    [
        ([], [0], {}),
        ([], [0], {"digest": DIGEST.upper()}),
        ([], [0], {"digest": DIGEST[:8]}),
        ([breaks_at(HALF)], [0, HALF], {}),
        ([breaks_at(HALF), breaks_at(HALF + 9), breaks_at(HALF + 10)], [0, HALF, HALF + 9, -1], {}),
        ([breaks_at(0)], [0, 0], {}),
        ([status(503), status(503)], [0, 0, 0], {}),
        ([breaks_at(HALF), status(502)], [0, HALF, HALF], {}),
        ([answers.moved], [0, 0], {}),
        ([breaks_at(HALF), answers.moved], [0, HALF, HALF], {}),
        ([answers.without_length], [0], {}),
        ([lambda *args: answers.without_length(*args, chunked=True)], [0], {}),
        ([lambda *args: answers.without_length(*args, stop=HALF)], [0, 0], {}),
        ([lambda *args: answers.without_length(*args, HALF, chunked=True)], [0, HALF], {}),
        ([breaks_at(HALF), answers.without_ranges], [0, HALF], {}),
        ([breaks_at(HALF), answers.of_unknown_total], [0, HALF], {}),
        ([breaks_at(HALF), answers.another_range] * 2, [0, HALF, 0, HALF, 0], {}),
        ([breaks_at(1), answers.less_than_asked], [0, 1, HALF], {}),
        ([breaks_at(HALF), status(416)], [0, HALF, 0], {}),
        ([breaks_at(HALF), answers.wrong], [0, HALF, 0], {}),
        ([stalls_at(HALF)], [0, HALF], {"patience": Patience(backoff=0, timeout=0.3)}),
    ],
)
def test_faults_that_pass(
    faults: list, starts: list[int], options: dict, web: Web, target: Path
) -> None:
    web.answers = [*faults]
    get(web, target, **options)
    assert target.read_bytes() == CONTENT
    assert names(target) == {"file.th"}
    assert web.starts == [start if start >= 0 else HALF + 10 for start in starts]


def test_nothing_is_asked_for_twice_when_connections_break(web: Web, target: Path) -> None:
    web.answers = [breaks_at(SIZE * n // 9) for n in range(1, 9)]
    get(web, target, patience=Patience(backoff=0, gain=SIZE // 20, attempts=2))
    assert len(web.starts) == 9
    assert web.sent == SIZE


@pytest.mark.parametrize(
    ("fault", "message", "requests", "left", "options"),
    [
        (status(404), "the server answers 404 Not Found", 1, False, {}),
        (status(403), "the server answers 403 Forbidden", 1, False, {}),
        (status(503), r"503 Service Unavailable \(tried 5 times\)", 5, False, {}),
        (status(429, Retry_After=3600), "429 .*, and asks to wait 3600 s", 1, False, {}),
        (breaks_at(HALF), rf"the connection broke: .*{HALF} more expected.* \(tried", 5, True, {}),
        (answers.less_than_asked, f"{HALF} of {SIZE} bytes came", 5, True, {}),
        (answers.wrong, "SHA-256 of what came is .* and should be", 1, False, {}),
        (answers.endless, "goes on after the expected", 1, False, {"size": SIZE}),
        (answers.well, f"has {SIZE} bytes, and may have", 1, False, {"size": 100}),
        (answers.moved, "redirects", 31, False, {}),
        (
            answers.trickle,
            r"only \d+ bytes came in",
            2,
            True,
            {"patience": Patience(attempts=2, backoff=0, span=0.1, slowest=10_000)},
        ),
    ],
)
def test_faults_that_stay(
    fault: object,
    message: str,
    requests: int,
    left: bool,
    options: dict,
    web: Web,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "MARGIN", SIZE // 2)
    web.always = fault
    with pytest.raises(DownloadError, match=message) as caught:
        get(web, target, **options)
    assert "\n" not in str(caught.value)
    assert web.url in str(caught.value)
    assert len(web.starts) == requests
    assert names(target) == ({"file.th.part"} if left else set())
    if fault is answers.endless:
        assert web.sent < 100 * SIZE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/file.th", "refused.*tried 5 times"),
        ("ftp://127.0.0.1/file.th", "No connection adapters"),
        ("127.0.0.1/file.th", "No scheme"),
        ("http://user:secret@127.0.0.1:1/file.th", "^http://127.0.0.1:1/file.th: .*refused"),
    ],
)
def test_addresses_without_a_server(url: str, message: str, target: Path) -> None:
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(url, target, DIGEST, patience=QUICK)
    assert "secret" not in str(caught.value)
    assert names(target) == set()


def test_a_file_without_a_digest_is_not_fetched(web: Web, target: Path) -> None:
    with pytest.raises(DownloadError, match="no known SHA-256"):
        get(web, target, "")
    assert web.starts == []


def test_pauses(web: Web, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic, time=lambda: 1e9)
    monkeypatch.setattr(download, "time", clock)
    monkeypatch.setattr(http, "time", clock)
    date = formatdate(1e9 + 5, usegmt=True)
    web.answers = [
        *(status(429, Retry_After=value) for value in (7, date, "soon")),
        *(status(503), breaks_at(HALF), breaks_at(HALF + 1)),
    ]
    get(web, target, patience=Patience(backoff=1, longest_wait=9, attempts=7, gain=1000))
    assert pauses == [7, 5, 4, 8, 1, 2]


def test_a_part_that_is_whole_or_wrong(web: Web, target: Path) -> None:
    part = target.with_name("file.th.part")
    target.parent.mkdir()
    part.write_bytes(CONTENT)
    get(web, target)
    assert web.starts == []
    for content, starts in ((b"x" * HALF, [HALF, 0]), (CONTENT + b"x", [SIZE + 1, 0])):
        target.unlink()
        part.write_bytes(content)
        web.starts = []
        web.answers = [status(416)] if len(content) > SIZE else []
        get(web, target)
        assert web.starts == starts
        assert target.read_bytes() == CONTENT


def test_a_file_that_is_there(web: Web, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    get(web, target)
    get(web, target)
    assert web.starts == [0]
    target.write_bytes(b"other")
    with caplog.at_level(logging.WARNING):
        get(web, target)
    assert "moved to file.th.corrupt, and fetched anew" in caplog.text
    assert target.read_bytes() == CONTENT
    assert target.with_name("file.th.corrupt").read_bytes() == b"other"
    web.always = answers.wrong
    target.write_bytes(b"other")
    with pytest.raises(DownloadError, match="SHA-256"):
        get(web, target)
    assert len(web.starts) == 3
    assert names(target) == {"file.th.corrupt"}


def test_a_killed_process_is_followed_by_one_that_resumes(web: Web, target: Path) -> None:
    web.answers = [stalls_at(HALF)]
    part = target.with_name("file.th.part")
    command = [sys.executable, "-c", SCRIPT, f"{web.url}/file.th", target]
    with subprocess.Popen(command) as process:
        wait_for(lambda: part.exists() and part.stat().st_size == HALF, process)
        process.kill()
    assert not target.exists()
    subprocess.run(command, check=True)
    assert web.starts == [0, HALF]
    assert target.read_bytes() == CONTENT
    assert names(target) == {"file.th"}


@posix
def test_an_interrupted_download_is_kept(web: Web, target: Path) -> None:
    web.answers = [stalls_at(99)]  # fewer than a buffer holds
    part = target.with_name("file.th.part")
    command = [sys.executable, "-c", SCRIPT, f"{web.url}/file.th", target]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: part.exists() and part.stat().st_size == 99, process)
        process.send_signal(signal.SIGINT)
    assert part.stat().st_size == 99
    assert names(target) == {"file.th.part"}


def test_four_processes_download_once(web: Web, target: Path, tmp_path: Path) -> None:
    web.answers = [stalls_at(HALF)]
    logs = [tmp_path / f"{n}.log" for n in range(4)]
    command = [sys.executable, "-c", SCRIPT, f"{web.url}/file.th", target]
    processes = []
    for log in logs:
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stderr=file))
    wait_for(lambda: sum("waiting for another" in log.read_text() for log in logs) == 3, *processes)
    web.gate.set()
    assert [process.wait() for process in processes] == [0] * 4
    assert web.starts == [0]
    assert target.read_bytes() == CONTENT
    assert names(target) == {"file.th"}


@posix
def test_a_full_disk_leaves_nothing(web: Web, target: Path) -> None:
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    command = [sys.executable, "-c", code + SCRIPT, f"{web.url}/file.th", target]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    last = result.stderr.splitlines()[-1]
    assert re.search(r"DownloadError: .*file\.th: cannot be written \(File too large\)", last)
    assert names(target) == set()


def test_folders_that_cannot_be_made(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written"):
        get(web, tmp_path / "file" / "file.th")
    (tmp_path / "folder.th").mkdir()
    with pytest.raises(DownloadError, match="cannot be written"):
        get(web, tmp_path / "folder.th")
    assert web.starts == []


def test_progress_is_for_terminals(
    web: Web, target: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    get(web, target)
    assert capfd.readouterr() == ("", "")
    target.unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    get(web, target)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "file.th: 100%" in captured.err
    assert "1.00M/1.00M" in captured.err
    assert "B/s" in captured.err


class _Proxy(BaseHTTPRequestHandler):
    asked: list[str]

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


def test_proxies_are_asked(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Proxy.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Proxy) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(DownloadError, match="Tunnel connection failed: 403"):
            fetch("https://host.invalid/file.th", target, DIGEST, patience=Patience(attempts=1))
        server.shutdown()
    assert _Proxy.asked == ["host.invalid:443"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1, and its key, in one file."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    path = tmp_path / "certificate.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test"
    options += " -addext subjectAltName=IP:127.0.0.1"
    command = ["openssl", *options.split(), "-keyout", tmp_path / "key.pem", "-out", path]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + (tmp_path / "key.pem").read_text())
    return path


def test_certificates(
    certificate: Path, target: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    with serving(context=context) as web:
        with pytest.raises(DownloadError, match=r"certificate.*REQUESTS_CA_BUNDLE") as caught:
            get(web, target)
        assert "tried" not in str(caught.value)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", os.fspath(certificate))
        get(web, target)
    assert target.read_bytes() == CONTENT
