from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import demucs.htdemucs
import fsspec
import pytest
import soundfile
import torch

from demucs_infer.api import Separator
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.hub import registry
from demucs_infer.log import logger
from demucs_infer.storage import http

from .helpers import TINY, Command, fast_model, noise, publish, save_package, separate, shake
from .tools.web import Web, serving


@pytest.fixture(autouse=True)
def _messages() -> Iterator[None]:
    """Restore the package's logger, which the command configures."""
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, logger.level = before


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests to servers on loopback reach them."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def hang_ups() -> Iterator[None]:
    """Let processes that the test starts take SIGHUP, even if nohup started this one."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's memory, which is empty again after the test."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """An S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty s3://bucket, for this process and those that it starts."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    settings = {
        "AWS_ENDPOINT_URL": s3_url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem(use_listings_cache=False)
    store.mkdir("bucket")
    yield store
    store.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `tiny`, and the bag `pair` that runs it twice."""
    folder = tmp_path_factory.mktemp("repo")
    torch.manual_seed(0)
    save_package(folder / "tiny.th", shake(demucs.htdemucs.HTDemucs(**TINY)))
    (folder / "pair.yaml").write_text("models: [tiny, tiny]\n")
    return folder


@pytest.fixture(scope="session")
def fast_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `repo` with a network of two layers, for tests of the code around it."""
    folder = tmp_path_factory.mktemp("fast")
    save_package(folder / "tiny.th", fast_model())
    (folder / "pair.yaml").write_text("models: [tiny, tiny]\n")
    return folder


@pytest.fixture(scope="session")
def separator(fast_repo: Path) -> Separator:
    """The model of `fast_repo` without random shifts. Tests that change it make their own."""
    return Separator("tiny", fast_repo, device="cpu", shifts=0)


@pytest.fixture
def command(fast_repo: Path, tmp_path: Path) -> Command:
    """Run our command line with the model of `fast_repo` in `tmp_path`, in this process."""
    return partial(separate, "--repo", fast_repo, "-n", "tiny", "-d", "cpu", cwd=tmp_path)


@pytest.fixture
def track(tmp_path: Path) -> Path:
    """Two seconds of stereo noise, at 48 kHz."""
    path = tmp_path / "track.wav"
    soundfile.write(path, noise(2, 96_000).T.numpy(), 48_000, subtype="FLOAT")
    return path


@pytest.fixture(scope="session")
def checkpoint(repo: Path) -> bytes:
    return (repo / "tiny.th").read_bytes()


@pytest.fixture
def published(checkpoint: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server with a registry and its checkpoints, and an empty cache in `cache`.

    Other processes take part by running `web.code` first.
    """
    for name in ("DEMUCS_INFER_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    weights = io.BytesIO()
    torch.save(HTDemucs(**TINY).state_dict(), weights)
    with serving() as web:
        web.content, web.others = checkpoint, {"weights.ckpt": weights.getvalue()}
        publish(tmp_path, web.url, checkpoint, weights.getvalue())
        web.code = (
            "from pathlib import Path; from demucs_infer.hub import registry;"
            f"registry.REMOTE_ROOT = Path({str(tmp_path)!r});"
        )
        monkeypatch.setenv("DEMUCS_INFER_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # the second host is down
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(registry, "REMOTE_ROOT", tmp_path)
        monkeypatch.setattr(http, "LIMITS", http.Limits(attempts=2, backoff=0))
        registry.registry.cache_clear()
        yield web
    registry.registry.cache_clear()


# By default a test runs this many cases of its table, spread evenly from the first to the last.
DEFAULT_CASES = 5


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow every test with an S3 server, and the further cases of long tables."""
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "bucket" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
        if not (item.get_closest_marker("slow") or item.get_closest_marker("network")):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tables.values():
        if len(cases) > DEFAULT_CASES:
            step = (len(cases) - 1) / (DEFAULT_CASES - 1)
            kept = {round(step * index) for index in range(DEFAULT_CASES)}
            for index, item in enumerate(cases):
                if index not in kept:
                    item.add_marker("slow")
