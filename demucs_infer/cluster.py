"""Many GPUs, many machines: an engine that maps rows hands the tracks to workers.

    tracks ──▶ Ray Data ──▶ workers, one per GPU or per N CPUs: SeparateTracks ──▶ results

Ray places the workers, hands out tracks, and restarts what dies. Stems appear when they are whole,
so a track may be begun again at any time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .api import Separator
from .errors import DemucsInferError, MissingDependencyError, OptionError
from .io.batch import Batch, TrackResult, checked_stems
from .io.console import signals_kept
from .io.folders import Folders
from .io.output import Output
from .io.tracks import plan_jobs
from .storage.locations import Location, location

IN_FLIGHT = 3  # tracks in a worker: one is read, one separated, one written
RETRIES = 1  # of a track whose worker dies, among others and then alone
DEATHS = 2 * (1 + RETRIES)  # after which a track is given up
CPUS_PER_WORKER = 4  # without a GPU
DYING = 5  # seconds that workers may take to die
PART = 20_000  # tracks that are handed to Ray at once; it takes about 10 kB for each


class SeparateTracks:
    """Separates the track of a row `{"input": path or URL}`: a callable for Ray Data and others.

        ray.data.from_items([{"input": "s3://bucket/in/song.mp3"}]).map(
            SeparateTracks,
            fn_constructor_kwargs={"output": "s3://bucket/stems", "shifts": 0},
            num_gpus=1,
            concurrency=8,
        )

    It returns the row with what `TrackResult.as_json` gives; what goes wrong with a track is in
    `error`. The model is loaded once, when this is made. Threads may call it: the model runs in a
    thread of its own, for one of them at a time, while others read and write. Pickled, it carries
    its arguments, and loads the model where it is unpickled.

    Args:
        output: the output folder, its URL, or an `Output`.
        skip_existing: leave out tracks whose stems are all there.
        folders: those that were named, for `{folder}` in the file name of the output.
        options: those of `Separator`.

    Raises what `Separator` does, and `SaveAudioError` if the output cannot be written to.
    """

    def __init__(
        self,
        output: str | Output = "separated",
        *,
        skip_existing: bool = False,
        folders: Folders | None = None,
        **options: Any,
    ) -> None:
        self._arguments = {
            "output": output,
            "skip_existing": skip_existing,
            "folders": folders,
            **options,
        }
        self._folders = folders
        self.output = output if isinstance(output, Output) else Output(output)
        self.skip_existing = skip_existing
        stack = contextlib.ExitStack()
        self._model_thread = ThreadPoolExecutor(1)
        # It may be the one that lets go of this last, and cannot wait for itself.
        stack.callback(self._model_thread.shutdown, wait=False)
        self.separator = self._in_turn(partial(Separator, **options))
        self._stems = checked_stems(self.separator, self.output)
        self._space = stack.enter_context(self.output.workspace())
        weakref.finalize(self, stack.close)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return partial(type(self), **self._arguments), ()

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            track = location(str(row["input"]))
        except DemucsInferError as exc:
            nowhere = TrackResult(Path(), self.separator.name, error=exc)
            return {**nowhere.as_json(), **row, "error": str(exc)}
        return {**row, **self._separate(track).as_json()}

    def _separate(self, track: Location) -> TrackResult:
        name, results = self.separator.name, list[TrackResult]()
        batch = Batch(
            self.separator, self.output, self._space, report=results.append, call=self._in_turn
        )
        try:
            jobs = plan_jobs([track], self.output, name, self._stems, self._folders)
            batch.run(jobs, skip_existing=self.skip_existing)
        except DemucsInferError as exc:
            return TrackResult(track, name, error=exc)
        return results[0]

    def _in_turn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._model_thread.submit(function, *arguments).result()


class _Worker:
    """A worker of the command line. Results travel as JSON: a table would mix their fields."""

    def __init__(self, folder: str, arguments: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a machine without it may still be given URLs
            os.chdir(folder)
        self._separate = SeparateTracks(**arguments)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        return {"result": json.dumps(self._separate(row))}


@dataclass(frozen=True)
class _Workers:
    """How many workers the cluster has room for, and what each is given."""

    count: int
    cpus: int
    gpus: int

    @classmethod
    def of_cluster(cls, device: str | None, cpus: int | None) -> _Workers:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if gpus and (device is None or device.startswith("cuda")):
            return cls(gpus, cpus or 1, 1)
        cpus = cpus or min(CPUS_PER_WORKER, max(int(node.get("CPU", 0)) for node in nodes)) or 1
        count = sum(int(node.get("CPU", 0)) // cpus for node in nodes)
        if not count:
            raise OptionError(f"--cpus-per-worker {cpus}: no machine of the cluster has as many")
        return cls(count, cpus, 0)


def separate_on_ray(
    tracks: Sequence[str],
    arguments: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
    *,
    address: str = "",
    cpus_per_worker: int | None = None,
    verbose: bool = False,
) -> None:
    """Separate `tracks` on a Ray cluster with `SeparateTracks(**arguments)`; `report` each result.

    `address` is that of the cluster; by default RAY_ADDRESS says it, and without one a cluster is
    started on this machine. A track whose worker dies is begun again, at last alone in a worker, so
    that it takes no others with it, and given up after `DEATHS`.

    Raises `DemucsInferError` if there is no cluster, or the workers cannot be started.
    """
    waiting = dict.fromkeys(tracks)
    with _cleared(arguments["output"]), _connected(address, verbose):
        workers = _Workers.of_cluster(arguments.get("device"), cpus_per_worker)

        def run(part: Sequence[str], calls: int) -> None:
            for result in _results(part, arguments, workers, calls):
                waiting.pop(result["input"], None)
                report(result)

        for start in range(0, len(tracks), PART):
            run(tracks[start : start + PART], IN_FLIGHT)
        if waiting:
            run(list(waiting), 1)
    for track in waiting:
        report(_given_up(track, str(arguments["model"])))


@contextlib.contextmanager
def _cleared(output: Output) -> Iterator[None]:
    """`output`, which can be written to, without what dead workers leave, however the block ends.

    Those that are still dying then are waited for.
    """
    with output.workspace():
        pass
    try:
        yield
    finally:
        with contextlib.suppress(DemucsInferError), output.workspace(DYING):
            pass


def _given_up(track: str, model: str) -> dict[str, Any]:
    error = DemucsInferError(f"{track}: its worker died {DEATHS} times: given up")
    return TrackResult(location(track), model, error=error).as_json()


def _results(
    tracks: Sequence[str], arguments: Mapping[str, Any], workers: _Workers, calls: int
) -> Iterator[dict[str, Any]]:
    """The results in the order in which they come; `calls` tracks are in a worker at once."""
    import ray

    rows = [{"input": track} for track in tracks]
    # A block is what is lost with a worker.
    worker: Any = _Worker
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        worker,
        fn_constructor_args=(str(Path.cwd()), arguments),
        compute=ray.data.ActorPoolStrategy(
            size=min(workers.count, len(rows)),
            max_tasks_in_flight_per_actor=calls,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=True,
        ),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        max_task_retries=RETRIES,
    )
    try:
        for row in data.iter_rows():
            yield json.loads(row["result"])
    except (ray.exceptions.RayError, RuntimeError) as exc:
        raise DemucsInferError(f"the workers cannot be run: {_cause(exc)}") from exc


def _cause(exc: BaseException) -> str:
    """The last line of what happened in a worker."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__


@contextlib.contextmanager
def _connected(address: str, verbose: bool) -> Iterator[None]:
    """A connection to the cluster, or a cluster of this machine's own, while the block runs."""
    ray = _import_ray()
    if not verbose:
        _silence_ray()
    level = logging.INFO if verbose else logging.CRITICAL
    with contextlib.ExitStack() as stack:
        # Ray tells of deaths on standard output, which belongs to the results.
        messages = sys.stderr if verbose else stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(messages))
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            _check_address(address)
            try:
                with signals_kept():
                    ray.init(address or None, logging_level=level, log_to_driver=verbose)
            except (OSError, RuntimeError, ValueError) as exc:
                raise DemucsInferError(f"--ray {address}: no cluster ({_cause(exc)})") from exc
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = verbose
        context.max_errored_blocks = -1  # tracks of workers that died: these are begun again
        yield


def _check_address(address: str) -> None:
    """Raise `DemucsInferError` if nobody answers at HOST:PORT, which Ray tries for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, ValueError) as exc:
            raise DemucsInferError(f"--ray {address}: no cluster answers ({exc})") from exc


def _silence_ray() -> None:
    """What matters of its many messages, we say."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=__name__, message=".*ray_remote_args")


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own reports nothing
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise MissingDependencyError("ray[data]", "--ray") from exc
    return ray
