"""Tracks on workers: the callable by itself, and with Ray on this machine."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from demucs_infer.cluster import SeparateTracks
from demucs_infer.errors import OptionError

from .helpers import (
    SOURCES,
    Command,
    assert_one_line,
    environment,
    json_lines,
    run,
    separate,
    stems_of,
    wav,
    write_track,
)

slow = pytest.mark.slow
DOCUMENT = Path(__file__).parents[1] / "docs" / "batch.md"


def write_tracks(folder: Path, count: int, seconds: float = 1) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02}.wav").write_bytes(wav(seconds + number / 80, seed=number))
    return folder


def assert_same_stems(folder: Path, expected: Path) -> None:
    assert stems_of(folder) == stems_of(expected)
    for name in stems_of(expected):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


# --- the callable -------------------------------------------------------------------------------


def test_rows_become_results(fast_repo: Path, tmp_path: Path) -> None:
    write_tracks(tmp_path / "in", 1)
    (tmp_path / "out/bass").mkdir(parents=True)
    (tmp_path / "out/bass/bass.wav").touch()
    options: dict[str, Any] = {"model": "tiny", "repo": fast_repo, "device": "cpu", "shifts": 0}
    separate_tracks = SeparateTracks(str(tmp_path / "out"), skip_existing=True, **options)
    row = {"input": str(tmp_path / "in/00.wav"), "number": 7}
    for again in (False, True):
        result = separate_tracks(row)
        assert json.loads(json.dumps(result)) == result
        assert result["number"] == 7
        assert (result["skipped"], result["error"]) == (again, None)
    assert stems_of(tmp_path / "out") >= {f"00/{name}.wav" for name in SOURCES}
    for name, message in {"none.wav": "no such file", "out/bass/bass.wav": "would replace"}.items():
        result = separate_tracks({"input": str(tmp_path / name)})
        assert message in result["error"]
    copy = pickle.loads(pickle.dumps(separate_tracks))
    assert copy(row)["skipped"]
    with pytest.raises(OptionError, match="voice"):
        SeparateTracks(str(tmp_path / "out"), stems=["voice"], **options)


def test_threads_share_a_model(fast_repo: Path, tmp_path: Path) -> None:
    tracks = sorted(write_tracks(tmp_path / "in", 6).iterdir())
    rows = [{"input": str(track)} for track in tracks]
    for out, threads in (("one", 1), ("many", 3)):
        separate_tracks = SeparateTracks(
            str(tmp_path / out), model="tiny", repo=fast_repo, device="cpu", seed=1
        )
        with ThreadPoolExecutor(threads) as pool:
            assert not any(result["error"] for result in pool.map(separate_tracks, rows))
        del separate_tracks
    assert_same_stems(tmp_path / "many", tmp_path / "one")
    assert len(stems_of(tmp_path / "one")) == 24  # and the workspaces are gone


def test_missing_ray_is_named_with_its_package(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tracks(tmp_path / "in", 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert_one_line(command("in", "--ray"), 'pip install "ray[data]"')


# --- Ray ----------------------------------------------------------------------------------------

# Ends a worker that reads a track of this name.
KILLER = """
import os, sys
if "default_worker.py" in " ".join(sys.orig_argv):
    def hook(event, arguments):
        if event == "shutil.copyfile" and "deadly" in str(arguments[0]):
            os._exit(1)
    sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def job(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with tracks in `in`, and their stems by the command without Ray in `plain`.

    Meanwhile this process is connected to a Ray of two CPUs.
    """
    ray = pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("job")
    write_tracks(folder / "in", 12, 8)
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(KILLER)
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", path)
        patch.setenv("DEMUCS_INFER_TEST", str(folder))
        patch.setenv("RAY_worker_niceness", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(num_cpus=2, include_dashboard=False, logging_level=50, log_to_driver=False)
        # In a process with as many threads as a worker.
        result = run("-m", "demucs_infer", *options(repo), "in", "-o", "plain")
    assert result.returncode == 0, result.stderr
    yield folder
    ray.shutdown()


def options(repo: Path) -> list[object]:
    return ["--repo", repo, "-n", "tiny", "--seed", 1, "-d", "cpu"]


def on_ray(repo: Path, *more: object, cwd: Path) -> tuple[Any, list[dict[str, Any]], list[str]]:
    """Run the command on the Ray of `job`. Return the status, the results and lines of errors."""
    arguments = [*options(repo), *more, "--json", "--cpus-per-worker", 1, "--ray"]
    result = separate(*arguments, cwd=cwd)
    errors = [x for x in result.stderr.splitlines() if x.startswith("demucs-infer: ")]
    return result.returncode, json_lines(result), errors


def started(repo: Path, *more: object, cwd: Path) -> subprocess.Popen[str]:
    """Start the command as a process."""
    arguments = [*options(repo), "--json", "--cpus-per-worker", 1, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "demucs_infer", *map(str, arguments)],
        cwd=cwd,
        env={**environment(), "RAY_ADDRESS": "", "RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def address() -> str:
    """Return the address of the Ray of `job`."""
    import ray

    return ray.get_runtime_context().gcs_address


@slow
def test_stems_are_the_same_and_a_broken_file_is_one_line(job: Path, repo: Path) -> None:
    (job / "broken.wav").write_text("no music")
    status, results, (error,) = on_ray(repo, "in", "broken.wav", "-o", "ray", cwd=job)
    assert (status, len(results)) == (1, 13)
    assert "broken.wav: " in error
    assert [result["input"] for result in results if result["error"]] == ["broken.wav"]
    assert_same_stems(job / "ray", job / "plain")


@slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.usefixtures("hang_ups")
def test_signal_ends_the_command_and_its_workers(job: Path, repo: Path, name: str) -> None:
    """On a Ray of the command, and on ours. Ray installs its own handler, and its workers outlive
    the command for a moment."""
    folder, number = job / name, signal.Signals[name]
    for track in "abcd":
        write_track(job / f"long/{track}.wav", 100)
    where = ["--ray"] if name == "SIGTERM" else ["--ray", address()]
    process = started(repo, "in/00.wav", "long", "-o", folder, *where, cwd=job)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["error"] is None
    process.send_signal(number)
    _, messages = process.communicate()
    errors = [x for x in messages.splitlines() if x.startswith("demucs-infer: ")]
    message = f"demucs-infer: error: ended by {name}"
    assert (process.returncode, errors) == (128 + number, [message])
    assert 1 <= len(list((folder / "tiny").iterdir())) < 5
    assert not list((folder / "tiny").glob(".*"))


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_worker_loses_no_track(job: Path, repo: Path) -> None:
    process = started(repo, "in", "-o", "killed", "--ray", address(), cwd=job)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    os.kill(min(workers(f"DEMUCS_INFER_TEST={job}")), signal.SIGKILL)
    lines += process.stdout  # a few messages fit into the other pipe
    _, messages = process.communicate()
    assert (process.returncode, "demucs-infer: error" in messages) == (0, False)
    assert len({json.loads(line)["input"] for line in lines}) == 12
    assert_same_stems(job / "killed", job / "plain")


def workers(variable: str) -> list[int]:
    """Return the processes of Ray's workers that have `variable` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = b"_Worker" in (folder / "cmdline").read_bytes()
            if named and variable.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


@slow
def test_track_that_kills_its_workers_is_given_up(job: Path, repo: Path) -> None:
    deadly = job / "deadly.wav"
    deadly.write_bytes((job / "in/00.wav").read_bytes())
    names = [f"file://{deadly}", "in/00.wav", "in/01.wav"]
    (job / "list.txt").write_text("\n".join(names))
    status, results, (error,) = on_ray(repo, "--from-file", "list.txt", "-o", "given up", cwd=job)
    assert status == 1
    assert f"file://{deadly}: its worker died 4 times" in error
    assert sorted(result["input"] for result in results) == sorted(names)
    assert len(list((job / "given up").rglob("*.wav"))) == 8


@slow
def test_workers_that_cannot_start_and_a_missing_cluster_are_one_line(
    job: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, (error,) = on_ray(repo, "in", "-o", "none", "-d", "cuda:77", cwd=job)
    assert (status, "cuda:77" in error) == (1, True)
    # As without a connection, which is kept.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    result = separate(*options(repo), "in", "--ray", "127.0.0.1:1", cwd=job)
    assert_one_line(result, "--ray 127.0.0.1:1: no cluster answers")


@slow
def test_example_of_the_documentation_runs(
    job: Path, repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    ours = block.replace('"model": "htdemucs"', f'"model": "tiny", "repo": {str(repo)!r}')
    assert ours != block
    monkeypatch.chdir(job)
    Path("songs.txt").write_text("in/00.wav\nin/01.wav\nnone.wav\n")
    exec(ours, {})
    assert "none.wav: no such file" in capsys.readouterr().out
    assert len(list((job / "stems").rglob("*.wav"))) == 8
