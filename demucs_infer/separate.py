"""The command line: `demucs-infer song.mp3`.

Only `main` exits. PyTorch is imported when there is something to separate, so that `--help`,
`--version` and `--list-models` answer at once.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .catalog import add_catalog_flags, download_models, print_models
from .engine.backends import EngineOptions
from .engine.options import (
    POSITIVE,
    SeparationOptions,
    SeparatorOptions,
    add_flags,
    option,
    values_of,
)
from .errors import DemucsInferError, OptionError
from .io.console import Console, command, put
from .io.folders import Folders
from .io.output import PIPE, WHERE, Output
from .log import fatal, log_to_stderr, logger
from .pretrained import DEFAULT_MODEL, add_model_flags, model_label
from .storage.locations import Location, full_text, location

if TYPE_CHECKING:
    from torch import Tensor

    from .api import Separator
    from .io.batch import TrackResult
    from .io.output import Output
    from .io.tracks import TrackJob

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
# Rounds that a thread of libgomp waits in a loop before it sleeps; see docs/speed.md.
SPIN_COUNT = 100_000

DESCRIPTION = "Separate songs into stems: drums, bass, vocals and the rest."
EPILOG = """\
examples:
  demucs-infer song.mp3                      four stems in separated/htdemucs/song/
  demucs-infer --two-stems vocals song.mp3   vocals and accompaniment
  demucs-infer --stems voice=vocals,band=drums+bass+other song.mp3   sums, with your names
  demucs-infer --format stem.mp4 song.mp3    one file for DJs
  demucs-infer --player song.mp3             and a page to listen with
  demucs-infer --format mp4 --stems vocals film.mp4   a video with the stem as its sound
  demucs-infer --mp3 -o stems album/         MP3 stems of all tracks in a folder, in stems/
  demucs-infer --skip-existing -o stems a/   go on with what was interrupted
  demucs-infer --stems vocals -o - a.mp3     one stem to standard output, as WAV
  demucs-infer -o s3://b/out s3://b/in/*.mp3  from a bucket into a bucket
  demucs-infer --ray --from-file list.txt    many tracks on all GPUs of a Ray cluster
  demucs-infer --repo models -n mine a.wav   a model of your own
  demucs-infer --download htdemucs           only fetch a model, for later

exit status:
  0 all went well, 1 a track or the model failed, 2 wrong usage, 130 interrupted,
  143 or 129 ended by SIGTERM or SIGHUP
"""

# Names that programs import from here, and their modules: these import PyTorch.
ELSEWHERE = {
    "AudioFile": "audio",
    "BagOfModels": "apply",
    "HTDemucs": "htdemucs",
    "ModelLoadingError": "errors",
    "Separator": "api",
    "apply_model": "apply",
    "convert_audio": "audio",
    "get_model_from_args": "pretrained",
    "list_models": "api",
    "save_audio": "audio",
}


def __getattr__(name: str) -> Any:
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{ELSEWHERE[name]}", __package__), name)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the usage in one line."""

    def error(self, message: str) -> NoReturn:
        fatal(f"{message} (see demucs-infer --help)", status=EXIT_USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            put(message.rstrip("\n"), file)
        except DemucsInferError as exc:
            fatal(exc)


@dataclass(frozen=True)
class _BatchOptions:
    """What is done with many tracks."""

    skip_existing: bool = option(
        False,
        "leave out tracks whose stems are all there: goes on with a batch that was stopped",
        section=WHERE,
        action="store_true",
    )
    ray: str | None = option(
        None,
        "spread the tracks over a Ray cluster, a worker per GPU; without an address over that of"
        " RAY_ADDRESS, or else over this machine",
        section="several GPUs, several machines",
        nargs="?",
        const="",
        metavar="ADDRESS",
    )
    cpus_per_worker: int | None = option(
        None,
        "CPUs of a worker; without GPUs, these make the number of workers (default: 1 beside a GPU,"
        " else 4)",
        type=POSITIVE,
        metavar="N",
    )


def get_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser(
        prog="demucs-infer",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tracks",
        nargs="*",
        type=location,
        metavar="TRACK",
        help="audio files, folders of them, URLs of either (s3://, gs://, https:// …, patterns,"
        " too), or - for standard input",
    )
    parser.add_argument(
        "--from-file",
        type=location,
        metavar="LIST",
        help="a text file of tracks, one path or URL a line, # for comments; - for standard input",
    )
    parser.add_argument("--version", action="version", version=f"demucs-infer {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, with tracebacks")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    add_model_flags(parser)
    add_catalog_flags(parser)
    add_flags(parser, SeparationOptions, Output, _BatchOptions)
    return parser


def load_track(track: str | os.PathLike[str], audio_channels: int, samplerate: int) -> Tensor:
    """Decode a file as `[audio_channels, T]` at `samplerate` hertz. Raises `LoadAudioError`."""
    from .audio import AudioFile

    return AudioFile(track).read(streams=0, samplerate=samplerate, channels=audio_channels)


@command()
def main(opts: Sequence[str] | None = None) -> None:
    """Run the command line with `opts` (default: those of the process).

    Exits with a status other than 0 if something fails; returns if all went well.
    """
    parser = get_parser()
    words = sys.argv[1:] if opts is None else opts
    # Tracks may stand between options, but for names that start with a dash.
    parse = parser.parse_args if "--" in words else parser.parse_intermixed_args
    args = parse(words)
    log_to_stderr(
        logging.DEBUG if args.verbose else logging.ERROR if args.quiet else logging.WARNING
    )
    try:
        if args.list_models:
            print_models(args)
            return
        if args.download:
            download_models(args)
            return
        _take_address(args)
        if not args.tracks and args.from_file is None:
            parser.error("no track is given")
        _leave_room()
        failed = _separate_tracks(args)
    except OptionError as exc:
        logger.debug("", exc_info=exc)
        fatal(exc, status=EXIT_USAGE)
    except DemucsInferError as exc:
        logger.debug("", exc_info=exc)
        fatal(exc)
    except BrokenPipeError:  # the reader of --list-models has seen enough
        raise SystemExit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        fatal("interrupted", status=EXIT_INTERRUPTED)
    if failed:
        raise SystemExit(EXIT_FAILED)


def _leave_room() -> None:
    """Let idle threads of PyTorch sleep soon, as long as it is not imported and nobody chose.

    A layer waits for its slowest thread. Beside a busy program, threads that wait in a loop keep
    that one from its core.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _take_address(args: argparse.Namespace) -> None:
    """What stands behind --ray is a track if it is no address."""
    if args.ray and not re.fullmatch(r"auto|local|ray://.+|[^/\\]+:\d+", args.ray):
        args.tracks.insert(0, location(args.ray))
        args.ray = ""


def _separate_tracks(args: argparse.Namespace) -> int:
    """Separate every track and return how many failed."""
    from .api import Separator
    from .io.batch import TrackResult, checked_stems
    from .io.tracks import plan_jobs

    output = _make_output(args)
    options = _separator_options(args, output)
    separator = Separator(**options if args.ray is None else _without_device(options))
    stems = checked_stems(separator, output)
    faults: list[tuple[Location, DemucsInferError]] = []
    folders = Folders()
    tracks = _find_tracks(args, faults, folders)
    jobs = plan_jobs(tracks, output, separator.name, stems, folders)
    console = Console(
        len(jobs) + len(faults), quiet=args.quiet, json=args.json, pipe=output.is_pipe
    )
    console.introduce(_bag_size(separator), _absolute(output.folder))
    for name, fault in faults:
        console.report(TrackResult(name, separator.name, error=fault).as_json())
    if args.ray is None:
        _separate_here(args, separator, output, jobs, console)
    elif jobs:
        del separator
        options["folders"] = folders
        _separate_on_ray(args, options, output, jobs, console)
    console.sum_up()
    return console.failures


def _bag_size(separator: Separator) -> int | None:
    """The number of models of a bag; `None` for a model by itself."""
    models = getattr(separator.model, "models", None)
    return None if models is None else len(models)


def _absolute(folder: object) -> object:
    return folder.resolve() if isinstance(folder, Path) else folder


def _separate_here(
    args: argparse.Namespace,
    separator: Separator,
    output: Output,
    jobs: Sequence[TrackJob],
    console: Console,
) -> None:
    from .io.batch import Batch

    def report(result: TrackResult) -> None:
        console.report(result.as_json())

    with output.workspace() as space:
        batch = Batch(separator, output, space, announce=console.announce, report=report)
        batch.run(jobs, skip_existing=args.skip_existing)


def _separate_on_ray(
    args: argparse.Namespace,
    options: dict[str, Any],
    output: Output,
    jobs: Sequence[TrackJob],
    console: Console,
) -> None:
    from .cluster import separate_on_ray

    if output.is_pipe or any(job.track == PIPE for job in jobs):
        raise OptionError("--ray takes no standard input and no standard output")
    separate_on_ray(
        [full_text(job.track) for job in jobs],
        {**options, "output": output, "skip_existing": args.skip_existing},
        console.report_progress,
        address=args.ray,
        cpus_per_worker=args.cpus_per_worker,
        verbose=args.verbose,
    )


def _find_tracks(
    args: argparse.Namespace, faults: list[tuple[Location, DemucsInferError]], folders: Folders
) -> Iterator[Location]:
    """The tracks that the command line and its list name, which `folders` notes.

    `faults` takes what goes wrong. Raises `OptionError` if there is neither.
    """
    from .io.tracks import find_tracks, read_list

    def report(name: Location, error: DemucsInferError) -> None:
        faults.append((name, error))

    listed = () if args.from_file is None else read_list(args.from_file, report)
    names = folders.noting(itertools.chain(args.tracks, listed))
    found = find_tracks(names, leave_out=args.out, report=report)
    first = next(found, None)
    if first is None and not faults:
        raise OptionError(f"{args.from_file}: names no track")
    return itertools.chain(() if first is None else (first,), found)


def _model_name(args: argparse.Namespace) -> str:
    return args.sig or args.name or DEFAULT_MODEL


def _make_output(args: argparse.Namespace) -> Output:
    if args.json and args.out == PIPE:
        raise OptionError("--json and -o - both want standard output: choose one")
    if args.from_file == PIPE and PIPE in args.tracks:
        raise OptionError("--from-file - and - both want standard input: choose one")
    folder = PIPE if args.out == PIPE else args.out / model_label(_model_name(args))
    return Output(**{**values_of(Output, args), "folder": folder})


def _separator_options(args: argparse.Namespace, output: Output) -> dict[str, Any]:
    return {
        **values_of(SeparatorOptions, args),
        "model": _model_name(args),
        "progress": not args.quiet and args.ray is None,
        "stems": output.needed or args.stems,
    }


def _without_device(options: Mapping[str, Any]) -> dict[str, Any]:
    """For a cluster, whose workers separate: here the model says which stems there are."""
    of_engine = {field.name for field in fields(EngineOptions)} | {"batch_size"}
    kept = {name: value for name, value in options.items() if name not in of_engine}
    return {**kept, "device": "cpu"}


if __name__ == "__main__":
    main()
