"""The command line: `demucs-infer song.mp3`.

PyTorch is imported only when there is something to separate, so that `--help`, `--version` and
`--list-models` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .batch.console import Console, Ended, put, streams_and_signals
from .batch.folders import Folders
from .catalog import add_catalog_flags, download_models, print_models
from .engine.options import SeparationOptions, SeparatorOptions
from .errors import DemucsInferError, DownloadError, ModelLoadingError, OptionError
from .fields import POSITIVE, add_flags, option, values_of
from .log import NOTICE, fatal, log_to_stderr, logger, show_error
from .pretrained import DEFAULT_MODEL, add_model_flags, model_label
from .storage.locations import Location, full_text, location
from .write.output import PIPE, WHERE, Output

if TYPE_CHECKING:
    from torch import Tensor

    from .batch.tracks import TrackJob

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
# Rounds that a thread of libgomp waits in a loop before it sleeps; see docs/performance.md.
SPIN_COUNT = 100_000
HELP_WIDTH = 78  # columns
# The options that -h shows.
USUAL = (
    "--name --out --stems --two-stems --format --mp3 --flac --device --shifts --segment"
    " --skip-existing --list-models"
).split()
# Options of the backend. With --ray they are for the workers.
OF_ENGINE = ("device", "precision", "engine", "compile", "batch_size")

DESCRIPTION = "Separate songs into stems: drums, bass, vocals and the rest."
EPILOG = """\
examples:
  demucs-infer song.mp3                 four stems in separated/htdemucs/song/
  demucs-infer --two-stems vocals song.mp3   vocals and accompaniment
  demucs-infer --stems voice=vocals,band=drums+bass+other song.mp3   sums
  demucs-infer --format stem.mp4 song.mp3   one file for DJs
  demucs-infer --player song.mp3        also a page to listen with
  demucs-infer --format mp4 --stems vocals film.mp4   a video with one stem
  demucs-infer --mp3 -o stems album/    all tracks in a folder as MP3, in stems/
  demucs-infer --skip-existing -o stems a/   resume an interrupted batch
  demucs-infer --stems vocals -o - a.mp3   one stem to standard output, as WAV
  demucs-infer -o s3://b/out s3://b/in/*.mp3   from a bucket into a bucket
  demucs-infer --ray --from-file list.txt   many tracks on a Ray cluster
  demucs-infer --repo models -n mine a.wav   a model of your own
  demucs-infer --download htdemucs      only fetch a model, for later

exit status:
  0 success, 1 a track or the model failed, 2 wrong usage, 130 interrupted,
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
    """A parser with errors in one line, and suggestions for mistyped options."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if unknown := re.search(r"unrecognized arguments: .*?(--[\w-]+)", message):
            known = [name for action in self._actions for name in action.option_strings]
            if near := difflib.get_close_matches(unknown[1], known, n=1):
                hint = f". Did you mean {near[0]}?"
        fatal(f"{message}{hint} (see demucs-infer --help)", status=EXIT_USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            put(message.rstrip("\n"), file)
        except DemucsInferError as exc:
            fatal(exc)


class _ShortHelp(argparse.Action):
    """Shows the options that most people use."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        formatter = parser._get_formatter()
        formatter.add_usage(parser.usage, (), ())
        formatter.add_text(DESCRIPTION)
        formatter.start_section("usual options")
        formatter.add_arguments(
            action for action in parser._actions if {*USUAL} & {*action.option_strings}
        )
        formatter.end_section()
        formatter.add_text("--help shows all options, and examples.")
        parser._print_message(formatter.format_help(), sys.stdout)
        parser.exit()


@dataclass(frozen=True)
class _BatchOptions:
    """Options of a batch."""

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
    """Return the parser of the command line."""
    parser = _Parser(
        prog="demucs-infer",
        usage="%(prog)s [OPTION ...] TRACK [TRACK ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=HELP_WIDTH),
        add_help=False,
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
    parser.add_argument("-h", action=_ShortHelp, nargs=0, help="show the usual options and exit")
    parser.add_argument("--help", action="help", help="show all options and exit")
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


def command(opts: Sequence[str] | None = None) -> None:
    """Run the installed command with `opts` (default: those of the process).

    All errors become messages and exit statuses.
    """
    try:
        with streams_and_signals():
            console = _run(opts)
    except BrokenPipeError:  # The reader of --list-models has seen enough.
        raise SystemExit(EXIT_FAILED) from None
    except DemucsInferError as exc:
        logger.debug("", exc_info=exc)
        fatal(exc)
    except Ended as exc:
        _end(int(exc.code or 0))
    except KeyboardInterrupt:
        show_error("interrupted")
        _end(EXIT_INTERRUPTED)
    if console.failed or console.unwritten:
        raise SystemExit(EXIT_FAILED)


def _end(status: int) -> NoReturn:
    """End the process with `status`, without threads that a server or a pipe may block for ever."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def main(opts: Sequence[str] | None = None) -> None:
    """Run the command line with `opts` (default: those of the process) in a program.

    As in `demucs`, wrong options, an unknown model and no track raise `SystemExit`, and a missing
    track is only reported. The first other error is raised when all tracks are done.
    """
    with streams_and_signals():
        console = _run(opts)
    if console.errors:
        raise console.errors[0]


def _run(opts: Sequence[str] | None) -> Console:
    """Run the command. Returns the console, which knows the failures."""
    parser = get_parser()
    words = sys.argv[1:] if opts is None else opts
    # Tracks may stand between options. Their names start with a dash only behind "--".
    parse = parser.parse_args if "--" in words else parser.parse_intermixed_args
    args = parse(words)
    console = Console(quiet=args.quiet, json=args.json, pipe=args.out == PIPE)
    log_to_stderr(logging.DEBUG if args.verbose else logging.ERROR if args.quiet else NOTICE)
    try:
        if args.list_models:
            print_models(args)
        elif args.download:
            download_models(args)
        else:
            # The word behind --ray is a track if it is not an address.
            if args.ray and not re.fullmatch(r"auto|local|ray://.+|[^/\\]+:\d+", args.ray):
                args.tracks.insert(0, location(args.ray))
                args.ray = ""
            if not args.tracks and args.from_file is None:
                parser.error("no track is given")
            limit_openmp_spinning()
            _separate_tracks(args, console)
    except DownloadError:
        raise
    except (OptionError, ModelLoadingError) as exc:
        logger.debug("", exc_info=exc)
        fatal(exc, status=EXIT_USAGE if isinstance(exc, OptionError) else EXIT_FAILED)
    return console


def limit_openmp_spinning() -> None:
    """Limit the busy-waiting of OpenMP unless the user configured it.

    This must run before PyTorch is imported. A layer waits for its slowest thread, and beside a
    busy program, idle threads in a loop would take the core that this thread needs.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _separate_tracks(args: argparse.Namespace, console: Console) -> None:
    """Find all tracks and separate them."""
    if args.json and args.out == PIPE:
        raise OptionError("--json and -o - both want standard output: choose one")
    if args.from_file == PIPE and PIPE in args.tracks:
        raise OptionError("--from-file - and - both want standard input: choose one")
    if args.ray is not None and PIPE in (args.out, *args.tracks):
        raise OptionError("--ray takes no standard input and no standard output")
    model = args.sig or args.name or DEFAULT_MODEL
    label = model_label(model)
    folder = PIPE if args.out == PIPE else args.out / label
    output = Output(**{**values_of(Output, args), "folder": folder})
    output.workspace()  # Raises an error if there can be none.

    from .batch.tracks import TrackResult, find_tracks, plan_jobs, read_list

    def report(name: Location, error: DemucsInferError) -> None:
        console.report(TrackResult(name, label, error=error).as_json())

    # The model may be a large download: look first whether it has work to do.
    folders, seen = Folders(), set[int]()
    listed = () if args.from_file is None else read_list(args.from_file, report)
    names = folders.noting(itertools.chain(args.tracks, listed))
    tracks = list(find_tracks(names, leave_out=args.out, report=report, seen=seen))
    console.count = len(tracks) + len(console.failed)
    if not console.count:
        raise OptionError(f"{args.from_file}: lists no track")
    if output.is_pipe and console.count > 1:
        raise OptionError(f"standard output takes one track, not {console.count}")
    if tracks:
        plan = partial(plan_jobs, tracks, output, folders=folders, seen=seen)
        _run_model(args, model, output, plan, console)
    console.sum_up()


def _run_model(
    args: argparse.Namespace,
    model: str,
    output: Output,
    plan: Callable[..., list[TrackJob]],
    console: Console,
) -> None:
    """Load the model and separate the tracks of `plan`, here or on a Ray cluster."""
    from .api import Separator
    from .batch.batch import Batch, warn_of_full_disk

    options = {
        **values_of(SeparatorOptions, args),
        "model": model,
        "progress": not args.quiet and args.ray is None,
        "stems": output.needed or args.stems,
    }
    # With --ray, the model here only names its stems.
    here = {name: value for name, value in options.items() if name not in OF_ENGINE}
    separator = Separator(**options) if args.ray is None else Separator(**here, device="cpu")
    network: Any = separator.model
    output.check_stems(network.sources, separator.stems)
    jobs = plan(separator.name, separator.stems)
    shown = output.folder.resolve() if isinstance(output.folder, Path) else output.folder
    console.introduce(len(network.models) if hasattr(network, "models") else None, shown)
    if args.ray is None:
        with output.workspace() as space:
            if isinstance(output.folder, Path):
                warn_of_full_disk(separator, output, space, jobs)
            batch = Batch(
                separator,
                output,
                space,
                announce=console.announce,
                report=lambda result: console.report(result.as_json(), result.error),
            )
            batch.run(jobs, skip_existing=args.skip_existing)
    else:
        del separator, network
        from .cluster import separate_on_ray

        own = {"folders": jobs[0].folders, "skip_existing": args.skip_existing}
        separate_on_ray(
            [full_text(job.track) for job in jobs],
            output,
            {**options, **own},
            partial(console.report, elsewhere=True),
            address=args.ray,
            cpus_per_worker=args.cpus_per_worker,
            verbose=args.verbose,
        )


if __name__ == "__main__":
    command()
