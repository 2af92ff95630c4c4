from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from demucs_infer.api import Output
from demucs_infer.errors import SaveAudioError
from demucs_infer.storage import spool
from demucs_infer.storage.spool import LOCK, Spool, Workspace

from .helpers import noise, run


@pytest.mark.parametrize("in_memory", [0, 2**24])
def test_what_is_written_is_read(
    in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
    wav = noise(2, 10_000)
    samples = Spool(tmp_path, 2)
    for block in wav.split(999, dim=-1):
        samples.write(block)
        assert torch.equal(samples.read(0, 5), wav[:, :5])
    assert samples.length == 10_000
    assert torch.equal(samples.read(123, 4567), wav[:, 123:4567])
    assert torch.equal(torch.cat(list(samples.blocks(3000)), dim=-1), wav)
    samples.close()
    assert not list(tmp_path.iterdir())


def test_a_file_has_the_rights_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_bytes(b"")
    with Workspace(tmp_path) as space:
        assert space.file().stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not rename locked files")
def test_workspace_is_removed_while_a_thread_adds_files(tmp_path: Path) -> None:
    begun = threading.Event()

    def add_files() -> None:
        for number in range(100_000):
            (space.path / f"{number}").touch()
            begun.set()

    with ThreadPoolExecutor() as pool:
        with Workspace(tmp_path) as space:
            added = pool.submit(add_files)
            begun.wait()
        assert isinstance(added.exception(), FileNotFoundError)
    assert not list(tmp_path.iterdir())


CLEAN_UP = """
import os, sys
from pathlib import Path
from demucs_infer.storage.spool import Workspace

removals = []

def hook(event, arguments):
    if event == "os.remove":
        removals.append(arguments)
        if len(removals) == 21:
            os._exit(9)

with Workspace(Path(sys.argv[1])) as space:
    for number in range(20):
        space.file()
    sys.addaudithook(hook)
"""


def test_a_process_that_ends_while_it_cleans_up_leaves_its_lock_to_the_next(tmp_path: Path) -> None:
    assert run("-c", CLEAN_UP, tmp_path).returncode == 9
    assert len([*tmp_path.iterdir()]) == 1
    with Workspace(tmp_path) as space:
        assert list(tmp_path.iterdir()) == [space.path]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(
    tmp_path: Path,
) -> None:
    code = "import sys; from pathlib import Path;"
    code += "from demucs_infer.storage.spool import Workspace;"
    code += "space = Workspace(Path(sys.argv[1])); space.__enter__(); space.file();"
    code += "print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()
        (theirs,) = tmp_path.iterdir()
        with Workspace(tmp_path) as space:
            assert {path.name for path in tmp_path.iterdir()} == {theirs.name, space.path.name}
            assert len(list(theirs.iterdir())) == 2
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == [theirs]
    with Workspace(tmp_path) as space:
        assert list(tmp_path.iterdir()) == [space.path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path) -> None:
    samples = Spool(tmp_path, 2)
    samples._file = os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", buffering=0)
    with pytest.raises(SaveAudioError, match="No space left"):
        samples.write(noise(2, 100))


STARTS = """
import sys
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from demucs_infer.storage.spool import Workspace
def start(number):
    with Workspace(Path(sys.argv[1])) as space:
        file = space.file()
        file.write_bytes(b"half a stem")
        for _ in range(20):
            assert file.read_bytes() == b"half a stem"
with ThreadPoolExecutor(4) as pool:
    assert len(list(pool.map(start, range(int(sys.argv[2]))))) == int(sys.argv[2])
"""


@pytest.mark.slow
def test_many_starts_in_one_folder(tmp_path: Path) -> None:
    """In threads and processes: each can be made, and none is removed while it is in use."""
    command = [sys.executable, "-c", STARTS, tmp_path, "30"]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0] * 2
    assert not list(tmp_path.iterdir())


def test_only_folders_with_our_lock_are_removed(tmp_path: Path) -> None:
    other = tmp_path / ".demucs-infer-song"
    (other / "stems").mkdir(parents=True)
    abandoned = tmp_path / ".demucs-infer-abandoned"
    abandoned.mkdir()
    (abandoned / LOCK).touch()
    (tmp_path / ".demucs-infer-link").symlink_to(abandoned)
    with Workspace(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {other.name, ".demucs-infer-link"}
    assert (other / "stems").is_dir()


def test_names_of_tracks_are_not_those_of_workspaces() -> None:
    for track in (".demucs-infer-song.wav", ".Demucs-Infer-x", ".demuc\u017f-infer-x"):
        for template in ("{track}/{stem}", "x/{track}/lock", "{track}", ".//{track}"):
            output = Output("out", template, two_stems="drums", other_method="none")
            paths = output.paths(Path(track), "m", ["drums"])
            assert all("_.demucs-infer-" in str(path).casefold() for path in paths.values())
        output = Output("memory://out", "{parent}/{stem}")
        (path,) = output.paths(Path(track, "a.wav"), "m", ["drums"]).values()
        assert str(path).casefold().startswith("memory://out/_.demucs-infer-")
