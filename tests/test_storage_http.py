"""Downloads from a server on loopback that misbehaves."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

from demucs_infer.batch.tracks import read_list
from demucs_infer.errors import DownloadError, LoadAudioError
from demucs_infer.storage import http, locations
from demucs_infer.storage.http import Download, HostError, Limits
from demucs_infer.storage.locations import Url, local_copy

from .tools import web as answers
from .tools.web import CONTENT, DIGEST, HALF, SLOW, Web, breaks_at, serving, stalls_at, status

QUICK = Limits(backoff=0.0, timeout=10.0)
FASTER = Limits(attempts=2, backoff=0, span=0.5, slowest=100_000)
SHORTER = Limits(attempts=1, slowest=0, longest=0.3)
HASTY = Limits(attempts=1, timeout=5, span=0.2)
SIZE = len(CONTENT)
MOVED = answers.to("/elsewhere")
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")

# Fetches argv[1] as argv[2], with messages on standard error.
SCRIPT = f"""
import logging, pathlib, sys
from demucs_infer.storage.http import Download, Limits
logging.basicConfig(format="%(message)s")
limits = Limits(timeout=600, span=600)
Download(sys.argv[1], pathlib.Path(sys.argv[2]), "{DIGEST}", limits=limits).run()
"""


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "file.th"


def get(web: Web, target: Path, digest: str = DIGEST, **options: object) -> None:
    Download(f"{web.url}/file.th", target, digest, **{"limits": QUICK, **options}).run()


def names(target: Path) -> set[str]:
    """The files in the folder of `target`."""
    return {path.name for path in target.parent.iterdir()}


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Wait until `condition` holds, or stop the processes that do not bring it about."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline or any(process.poll() for process in processes):
            for process in processes:
                process.kill()
            pytest.fail("the expected event did not happen")
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("faults", "starts", "options"),
    [
        ([], [0], {}),
        ([], [0], {"digest": DIGEST[:8]}),
        ([breaks_at(HALF)], [0, HALF], {}),
        ([status(503), status(503)], [0, 0, 0], {}),
        ([MOVED], [0, 0], {}),
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
        ([stalls_at(HALF)], [0, HALF], {"limits": Limits(backoff=0, timeout=0.3)}),
    ],
)
def test_faults_that_pass(
    faults: list, starts: list[int], options: dict, web: Web, target: Path
) -> None:
    web.answers = [*faults]
    get(web, target, **options)
    assert target.read_bytes() == CONTENT
    assert names(target) == {"file.th"}
    assert web.starts == starts


@pytest.mark.parametrize(
    ("fault", "message", "requests", "left", "options"),
    [
        (status(404), "the server answers 404 Not Found", 1, False, {}),
        (status(503), "503 Service Unavailable, tried 5 times", 5, False, {}),
        (status(429, Retry_After=3600), r"429 .*asks to wait 3600 s", 1, False, {}),
        (breaks_at(HALF), f"{HALF} more expected.*, tried", 5, True, {}),
        (answers.less_than_asked, f"{HALF} of {SIZE} bytes came", 5, True, {}),
        (answers.wrong, "SHA-256 is .* and should be", 1, False, {}),
        (answers.endless, "goes on after the expected", 1, False, {"most": 2 * SIZE}),
        (answers.well, f"has {SIZE} bytes, over the limit", 1, False, {"most": 100}),
        (MOVED, "redirects", 11, False, {}),
        (answers.trickle, r"only \d+ bytes came in", 2, True, {"limits": FASTER}),
        (answers.trickle, "came in", 1, True, {"limits": SHORTER}),
    ],
)
def test_faults_that_stay(
    fault: object, message: str, requests: int, left: bool, options: dict, web: Web, target: Path
) -> None:
    web.always = fault
    with pytest.raises(DownloadError, match=message) as caught:
        get(web, target, **options)
    assert "\n" not in str(caught.value)
    assert web.url in str(caught.value)
    assert len(web.starts) == requests
    assert names(target) == ({"file.th.part"} if left else set())
    if fault is answers.endless:
        assert web.sent < 100 * SIZE


def test_addresses_without_a_server(target: Path) -> None:
    refused = (
        "^No connection to 127.0.0.1:1 .*refused, tried 5 times.*: http://127.0.0.1:1/file.th$"
    )
    for url, message in (
        ("http://user:secret@127.0.0.1:1/file.th", refused),
        ("ftp://127.0.0.1/file.th", "not valid HTTP"),
    ):
        with pytest.raises(DownloadError, match=message):
            Download(url, target, DIGEST, limits=QUICK).run()
        assert names(target) == set()


def test_pauses(web: Web, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
    monkeypatch.setattr(http, "time", clock)
    monkeypatch.setattr(http, "GAIN", 1000)
    date = formatdate(time.time() + 30, usegmt=True)
    values = [7, date, "soon", "9" * 5000, "Mon, 99 Jan 99999999999 99:99:99"]
    web.answers = [status(429, Retry_After=value) for value in values]
    web.answers += [breaks_at(HALF), breaks_at(HALF + 1)]
    get(web, target, limits=Limits(backoff=1, attempts=6))
    assert pauses[0] == 7
    assert 20 < pauses[1] <= 30
    # Attempts that bring something are not counted, and nothing is asked for twice.
    assert pauses[2:] == [4, 8, 16, 0, 2]
    assert web.sent == SIZE


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
    assert "moved to file.th.corrupt" in caplog.text
    assert target.read_bytes() == CONTENT
    assert target.with_name("file.th.corrupt").read_bytes() == b"other"
    web.always = answers.wrong
    target.write_bytes(b"other")
    with pytest.raises(DownloadError, match="SHA-256"):
        get(web, target)
    assert len(web.starts) == 3
    assert names(target) == {"file.th.corrupt"}


def test_processes_download_once_and_resume_what_a_killed_one_left(
    web: Web, target: Path, tmp_path: Path
) -> None:
    web.answers = [stalls_at(HALF), stalls_at(HALF + 1)]
    command = [sys.executable, "-c", SCRIPT, f"{web.url}/file.th", target]
    part, logs = target.with_name("file.th.part"), [tmp_path / f"{n}.log" for n in range(3)]
    with subprocess.Popen(command) as process:
        wait_for(lambda: part.exists() and part.stat().st_size == HALF, process)
        process.kill()
    assert names(target) == {"file.th.part", "file.th.lock"}
    processes = []
    for log in logs:
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stderr=file))
    wait_for(lambda: sum("waiting for another" in log.read_text() for log in logs) == 2, *processes)
    web.gate.set()
    assert [process.wait() for process in processes] == [0] * 3
    assert web.starts == [0, HALF]
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


@posix
def test_files_that_cannot_be_written(web: Web, target: Path, tmp_path: Path) -> None:
    """A part may be a link, and a target a pipe without an end, which another user has made."""
    (tmp_path / "folder.th").mkdir()
    target.parent.mkdir()
    (tmp_path / "victim").write_bytes(CONTENT[:HALF])
    target.with_name("file.th.part").symlink_to(tmp_path / "victim")
    (tmp_path / "hard.th.part").hardlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "pipe.th")
    names = "victim/file.th", "folder.th", "pipe.th", "hard.th"
    for path in (*(tmp_path / name for name in names), target):
        with pytest.raises(DownloadError, match="cannot be written"):
            get(web, path)
    assert web.starts == []
    assert (tmp_path / "victim").read_bytes() == CONTENT[:HALF]


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
    for words in ("file.th: 100%", "1.00M/1.00M", "B/s"):
        assert words in captured.err


def test_proxies_are_asked(web: Web, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.always = status(403)
    monkeypatch.setenv("HTTPS_PROXY", web.url)
    with pytest.raises(DownloadError, match="Tunnel connection failed: 403"):
        url = "https://host.invalid/file.th"
        Download(url, target, DIGEST, limits=Limits(attempts=1)).run()
    assert web.paths == ["host.invalid:443"]


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


# Attacks, through a download, a track and a list.


def as_download(url: str, folder: Path) -> None:
    Download(url, folder / "file.th", DIGEST, limits=locations.TRACK_LIMITS).run()


def as_track(url: str, folder: Path) -> None:
    with local_copy(Url(url), folder):
        pass


def as_list(url: str, folder: Path) -> None:
    list(read_list(Url(url)))


@pytest.fixture(params=[as_download, as_track, as_list])
def door(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(locations, "TRACK_LIMITS", Limits(attempts=1, timeout=5))
    return request.param


def fails(door: Callable[..., None], url: str, folder: Path, *words: str) -> None:
    with pytest.raises((HostError, LoadAudioError)) as caught:
        door(url, folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    for word in words:
        assert word in str(caught.value)
    assert not [path for path in folder.iterdir() if path.suffix != ".part"]


def test_the_body_of_a_redirect_is_not_read(door: Callable, web: Web, tmp_path: Path) -> None:
    web.content = CONTENT if door is not as_list else b"a.wav"
    web.answers = [answers.to("/elsewhere", body=True)]
    door(f"{web.url}/file", tmp_path)
    assert len(web.paths) == 2
    assert web.sent < 20 * SIZE


@pytest.mark.parametrize("slow", SLOW)
def test_an_answer_that_is_slow_is_shut_down(
    slow: str, door: Callable, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "TRACK_LIMITS", HASTY)
    web.always = SLOW[slow]
    fails(door, f"{web.url}/file", tmp_path, "bytes came in 0 s")
    assert not web.gate.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a server whose queue is full")
def test_a_host_of_many_addresses_is_left(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits hold while one address after the other lets the client wait."""
    server, clients, tried = socket.socket(), [socket.socket() for _ in range(3)], []
    server.bind(("127.0.0.1", 0))
    server.listen(0)
    for client in clients:
        client.setblocking(False)
        client.connect_ex(server.getsockname())

    def addresses(*args: object) -> Iterator[tuple]:
        for _ in range(50):
            tried.append(time.monotonic())
            yield (socket.AF_INET, socket.SOCK_STREAM, 6, "", server.getsockname())

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    limits = Limits(attempts=1, timeout=0.1, span=0.2)
    with pytest.raises(HostError, match="only 0 bytes came"):
        Download("http://host.example/file.th", target, DIGEST, limits=limits).run()
    for each in (server, *clients):
        each.close()
    assert sum(after - before >= limits.timeout for before, after in pairwise(tried)) < 25


def test_credentials_go_to_their_own_host(
    door: Callable, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.content = CONTENT if door is not as_list else b"a.wav"
    (tmp_path / "netrc").write_text("default login operator password secret")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving() as other:
        other.content = web.content
        elsewhere = other.url.replace("127.0.0.1", "localhost") + "/file"
        # Some parsers of URLs take the second host for the one that is meant.
        confusing = elsewhere.replace("/file", web.url.replace("http://", "\\@"))
        web.answers = [answers.well, answers.to("/again"), answers.well, answers.to(elsewhere)]
        web.answers += [answers.to(confusing)]
        own = web.url.replace("//", "//user:word%21@") + "/file"
        token = web.url.replace("//", "//token@") + "/file"
        for number, url in enumerate((f"{web.url}/file", own, own, own, token)):
            (tmp_path / str(number)).mkdir()
            door(url, tmp_path / str(number))
    assert web.secrets == ["", *["Basic dXNlcjp3b3JkIQ=="] * 4, "Basic dG9rZW46"]
    assert other.secrets == ["", ""]


@pytest.mark.parametrize(
    "answer",
    [
        status(404),
        answers.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n: broken\r\n\x00"),
        answers.to("https://[/?token=secret"),
        answers.to("http://user:secret@127.0.0.1:1/?token=secret"),
        answers.to("ftp://user:secret@host/?token=secret"),
        answers.raw(b"HTTP/1.1 404 token=secret"),
        answers.raw(b"HTTP/token=secret 404 Not Found"),
        answers.raw(b"token=secret"),
        breaks_at(HALF),
        None,
    ],
)
def test_no_message_has_credentials_or_a_query(
    answer: object, door: Callable, web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    web.always = answer
    url = f"{web.url}/file?token=secret#secret" if answer else "http://127.0.0.1:1/file?x=secret"
    url = url.replace("//", "//user:secret@")
    with caplog.at_level(logging.DEBUG), pytest.raises((DownloadError, LoadAudioError)) as caught:
        door(url, tmp_path)
        raise LoadAudioError("127.0.0.1")  # the content does not matter here
    assert "127.0.0.1" in str(caught.value)
    if answer is None:
        assert str(caught.value).startswith("No connection to 127.0.0.1:1 (")
    assert "secret" not in "".join(traceback.format_exception(caught.value)) + caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        answers.raw(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000),
        answers.raw(b"HTTP/1.1 200 OK\r\nContent-Length: -5"),
        answers.raw(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-" + b"9" * 5000 + b"/*"),
        answers.raw(b"HTTP/1.1 " + b"9" * 5000 + b" OK"),
        answers.raw(b"HTTP/1.1 302 OK\r\nLocation: http://host:" + b"9" * 5000),
        answers.raw(b"HTTP/1.1 302 OK\r\nLocation: \xff\xfe//"),
        answers.raw(b"HTTP/1.1 503 OK\r\nRetry-After: " + b"9" * 5000),
        answers.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 5000),
        answers.to("file:///etc/passwd"),
        answers.endless,
    ],
)
def test_answers_that_make_no_sense(
    answer: object, door: Callable, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends in one line, or in the right file if its length does not matter."""
    monkeypatch.setattr(locations, "MAX_TRACK", 2 * SIZE)
    monkeypatch.setattr(locations, "MAX_LIST", 2 * SIZE)
    monkeypatch.setattr(http, "MAX_MODEL", 2 * SIZE)
    web.always = answer
    try:
        door(f"{web.url}/file", tmp_path)
    except (HostError, LoadAudioError) as exc:
        assert len(str(exc)) < 500
        assert "\n" not in str(exc)
    assert web.sent < 100 * SIZE


def test_a_lock_is_not_waited_for_without_end(
    web: Web, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "LOCK_TIMEOUT", 0.1)
    target.parent.mkdir()
    with filelock.FileLock(f"{target}.lock"), pytest.raises(DownloadError, match="another process"):
        get(web, target)


@pytest.mark.parametrize("answer", [None, answers.without_length])
def test_a_track_and_a_list(answer: object, web: Web, tmp_path: Path) -> None:
    web.always = answer
    with local_copy(Url(f"{web.url}/a%20b.wav?x=/#y"), tmp_path) as file:
        assert file.read_bytes() == CONTENT
    web.others["list.txt"] = b"a.wav\n"
    assert list(read_list(Url(f"{web.url}/list.txt"))) == [Path("a.wav")]
    web.always = status(404)
    fails(as_track, f"{web.url}/a.wav", tmp_path, "a.wav: no such file")
