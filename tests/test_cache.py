"""The cache of compiled networks, and other users who would exchange what is in it."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from demucs_infer.engine.backends.compiled import CompiledCache

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs the permissions of POSIX")


def test_an_entry_is_read_back(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / "cache")
    assert cache.load("a") is None
    before = os.umask(0o002)  # of a user whose files their group may write
    cache.store("a", b"network")
    os.umask(before)
    assert cache.load("a") == b"network"
    assert {path.name for path in cache.folder.iterdir()} == {"a", "a.sha256"}
    (tmp_path / "cache" / "a").write_bytes(b"damaged")
    assert cache.load("a") is None
    CompiledCache(None).store("a", b"network")
    assert CompiledCache(None).load("a") is None


@pytest.mark.parametrize(
    ("path", "mode"), [("cache", 0o777), ("cache/a", 0o666), ("cache/a.sha256", 0o662), ("", 0o777)]
)
def test_what_others_may_write_is_not_used(
    path: str, mode: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").mkdir()
    cache = CompiledCache(tmp_path / "home/cache")
    cache.store("a", b"network")
    (tmp_path / "home" / path).chmod(mode)
    assert cache.load("a") is None
    assert str(cache.folder) in caplog.text
    if path in ("", "cache"):
        cache.store("b", b"network")
        assert not (cache.folder / "b").exists()
    if not path:  # where each can remove only what is theirs
        (tmp_path / "home").chmod(0o1777)
        assert cache.load("a") == b"network"


@pytest.mark.parametrize("target", ["link", "fifo"])
def test_an_entry_that_is_not_a_file(target: str, tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / "cache")
    cache.store("a", b"network")
    (cache.folder / "a").rename(tmp_path / "elsewhere")
    if target == "link":
        (cache.folder / "a").symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(cache.folder / "a")
    assert cache.load("a") is None


@pytest.mark.skipif(not hasattr(os, "chown") or os.geteuid() != 0, reason="needs another user")
def test_a_folder_that_another_user_exchanges(tmp_path: Path) -> None:
    """The folder that is checked is the one that is read."""
    cache = CompiledCache(tmp_path / "cache")
    cache.store("a", b"network")
    shutil.copytree(cache.folder, tmp_path / "evil")
    CompiledCache(tmp_path / "evil").store("a", b"evil")
    for path in (tmp_path / "evil", *(tmp_path / "evil").iterdir()):
        os.chown(path, 65534, 65534)
    os.chown(tmp_path, 0, 0)
    done = threading.Event()

    def exchange() -> None:
        while not done.is_set():
            for source, goal in (
                ("cache", "x"),
                ("evil", "cache"),
                ("cache", "evil"),
                ("x", "cache"),
            ):
                (tmp_path / source).rename(tmp_path / goal)

    thread = threading.Thread(target=exchange)
    thread.start()
    found = {cache.load("a") for _ in range(3000)}
    done.set()
    thread.join()
    assert b"evil" not in found
