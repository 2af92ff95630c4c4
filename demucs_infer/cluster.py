"""Separate tracks on many GPUs and machines, with Ray or another engine that maps rows.

    tracks ──▶ Ray Data ──▶ workers, one per GPU or per N CPUs: SeparateTracks ──▶ results

Ray places the workers, hands out tracks, and restarts dead workers. Stems appear when they are
whole, so a track may be tried again at any time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from .api import Separator
from .batch.batch import separate_track
from .batch.console import ENDING, Ended
from .batch.folders import Folders
from .batch.tracks import TrackResult
from .errors import DemucsInferError, MissingDependencyError, OptionError
from .storage.locations import Location, location
from .write.output import Output

IN_FLIGHT = 3  # tracks in a worker: one is read, one separated, one written
RETRIES = 1  # of a track whose worker dies, both among others and alone
DEATHS = 2 * (1 + RETRIES)  # of workers until a track fails
CPUS_PER_WORKER = 4  # without a GPU
DYING = 5  # seconds that workers may take to die
PART = 20_000  # tracks for one call of Ray, which needs about 10 kB for each


class SeparateTracks:
    """Separates the track of a row `{"input": path or URL}`: a callable for Ray Data and others.

        ray.data.from_items([{"input": "s3://bucket/in/song.mp3"}]).map(
            SeparateTracks,
            fn_constructor_kwargs={"output": "s3://bucket/stems", "shifts": 0},
            num_gpus=1,
            concurrency=8,
        )

    It returns the row with the fields of `TrackResult.as_json`. An error with the track is in
    `error`. The model is loaded once, by the constructor. Several threads may call the object: the
    model runs in one thread, for one call at a time, while other calls read and write. A pickle
    holds the arguments only, and the model is loaded again when it is unpickled.

    Args:
        output: the output folder, its URL, or an `Output`.
        skip_existing: leave out tracks whose stems all exist.
        folders: the folders that the user named, for `{folder}` in the output's file name.
        options: those of `Separator`.

    Raises the errors of `Separator`, and `SaveAudioError` if the output cannot be written to.
    """

    def __init__(
        self,
        output: str | Output = "separated",
        *,
        skip_existing: bool = False,
        folders: Folders | None = None,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"skip_existing": skip_existing, "folders": folders}
        self._arguments = {"output": output, **own, **options}
        self.output = output if isinstance(output, Output) else Output(output)
        own["model_pool"] = thread = ThreadPoolExecutor(1)
        self.separator = thread.submit(partial(Separator, **options)).result()
        self.output.check_stems(self.separator._model.sources, self.separator.stems)
        space = self.output.workspace().__enter__()
        weakref.finalize(self, space.__exit__)
        here: dict[str, Any] = {"output": self.output, "space": space, **own}
        self._separated: Callable[..., TrackResult] = partial(
            separate_track, self.separator, **here
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return partial(type(self), **self._arguments), ()

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        track: Location = Path()
        try:
            track = location(str(row["input"]))
            result = self._separated(track)
        except DemucsInferError as exc:
            result = TrackResult(track, self.separator.name, error=exc)
        return {**row, **result.as_json(), "input": row["input"]}


class _Worker:
    """A worker of the command line. Results travel as JSON: a table would mix their fields."""

    def __init__(self, folder: str, output: Output, options: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # A machine without the folder can still read URLs.
            os.chdir(folder)
        self._separate = SeparateTracks(output, **options)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        return {"result": json.dumps(self._separate(row))}


def separate_on_ray(
    tracks: Sequence[str],
    output: Output,
    options: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
    *,
    address: str = "",
    cpus_per_worker: int | None = None,
    verbose: bool = False,
) -> None:
    """Separate `tracks` on a Ray cluster with `SeparateTracks(output, **options)`.

    `report` is called with each result.

    `address` is the cluster's (default: RAY_ADDRESS, else a cluster is started on this machine). A
    track whose worker dies is tried again, finally alone in a worker, so that it takes no others
    with it. After `DEATHS` it fails.

    Raises `DemucsInferError` if the cluster cannot be reached, or the workers cannot be started.
    """
    waiting = dict.fromkeys(tracks)

    def remove_workspaces(timeout: float = 0) -> None:
        with output.workspace(timeout):
            pass

    def run(part: Sequence[str], calls: int) -> None:
        """Run `part` with `calls` tracks in a worker at once."""
        data = ray.data.from_items(
            [{"input": track} for track in part],
            override_num_blocks=len(part),  # A dead worker loses its block.
        ).map(
            _Worker,
            fn_constructor_args=(str(Path.cwd()), output, options),
            compute=ray.data.ActorPoolStrategy(
                size=min(count, len(part)),
                max_tasks_in_flight_per_actor=calls,
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=True,
            ),
            num_cpus=cpus,
            num_gpus=gpus,
            max_task_retries=RETRIES,
        )
        try:
            for row in data.iter_rows():
                result = json.loads(row["result"])
                waiting.pop(result["input"], None)
                report(result)
        except (ray.exceptions.RayError, RuntimeError) as exc:
            raise DemucsInferError(f"the workers cannot be run: {_cause(exc)}") from exc

    remove_workspaces()
    try:
        with _connected(address, verbose) as ray:
            count, cpus, gpus = _workers(ray, options.get("device"), cpus_per_worker)
            for start in range(0, len(tracks), PART):
                run(tracks[start : start + PART], IN_FLIGHT)
            if waiting:
                run(list(waiting), 1)
    finally:
        # Dead workers left them, or those that die now.
        with contextlib.suppress(DemucsInferError):
            remove_workspaces(DYING)
    for track in waiting:
        place = location(track)
        error = DemucsInferError(f"{place}: its worker died {DEATHS} times: given up")
        report(TrackResult(place, str(options["model"]), error=error).as_json())


def _workers(ray: Any, device: str | None, cpus: int | None) -> tuple[int, int, int]:
    """Return how many workers fit into the cluster, and the CPUs and GPUs of each."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and (device is None or device.startswith("cuda")):
        return gpus, cpus or 1, 1
    cpus = cpus or min(CPUS_PER_WORKER, max(int(node.get("CPU", 0)) for node in nodes)) or 1
    count = sum(int(node.get("CPU", 0)) // cpus for node in nodes)
    if not count:
        raise OptionError(f"--cpus-per-worker {cpus}: no machine of the cluster has as many")
    return count, cpus, 0


def _cause(exc: BaseException) -> str:
    """Return the last line of an error in a worker."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[-1].strip()


@contextlib.contextmanager
def _connected(address: str, verbose: bool) -> Iterator[Any]:
    """Yield Ray, connected to a cluster or to a new one on this machine.

    Of Ray's many messages, the user sees only errors that we report, unless `verbose`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise MissingDependencyError("ray[data]", "--ray") from exc
    level, messages = logging.INFO, sys.stderr
    with contextlib.ExitStack() as stack:
        if not verbose:
            level, messages = logging.CRITICAL, stack.enter_context(Path(os.devnull).open("w"))
            for name in ("ray", "ray.data"):
                logging.getLogger(name).setLevel(level)
            warnings.filterwarnings("ignore", module=__name__, message=".*ray_remote_args")
        # Ray reports deaths on standard output, which belongs to our results.
        stack.enter_context(contextlib.redirect_stdout(messages))
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            host, _, port = address.rpartition("://")[2].rpartition(":")
            try:
                if host:  # Ray itself tries a dead address for many minutes.
                    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
                with signals_kept():
                    ray.init(address or None, logging_level=level, log_to_driver=verbose)
            except (OSError, RuntimeError, ValueError) as exc:
                raise DemucsInferError(
                    f"--ray {address}: no cluster answers ({_cause(exc)})"
                ) from exc
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = verbose
        context.max_errored_blocks = -1  # Tracks of dead workers are tried again.
        yield ray


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Restore the handlers of `ENDING` after the block, in which Ray sets its own."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    except SystemExit as exc:  # raised by Ray's handler
        if exc.code in ENDING:
            raise Ended(int(exc.code or 0)) from exc
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
