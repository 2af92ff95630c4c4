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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .catalog import add_catalog_flags, download_models, print_models
from .choices import (
    CLIP_MODE_NAMES,
    DEFAULT_FILENAME,
    ENGINES,
    FORMAT_NAMES,
    OTHER_METHODS,
    PRECISIONS,
)
from .errors import DemucsInferError, OptionError
from .io.console import Console, command, put
from .io.storage import Place, place
from .log import fatal, log_to_stderr, logger
from .pretrained import DEFAULT_MODEL, add_model_flags

if TYPE_CHECKING:
    from torch import Tensor

    from .api import Separator
    from .io.batch import TrackResult
    from .io.output import Output
    from .io.tracks import Job

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

DESCRIPTION = "Separate songs into stems: drums, bass, vocals and the rest."
EPILOG = """\
examples:
  demucs-infer song.mp3                      four stems in separated/htdemucs/song/
  demucs-infer --two-stems vocals song.mp3   vocals and accompaniment
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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the usage in one line."""

    def error(self, message: str) -> NoReturn:
        fatal(f"{message} (see demucs-infer --help)", status=EXIT_USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            put(message.rstrip("\n"), file)
        except DemucsInferError as exc:
            fatal(exc)


def _number(
    kind: Callable[[str], Any], wanted: str, fits: Callable[[Any], bool]
) -> Callable[[str], Any]:
    """A type for argparse: a number that `fits`, described as `wanted`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


_count = _number(int, "a whole number, 0 or more", lambda n: n >= 0)
_positive = _number(int, "a whole number, 1 or more", lambda n: n >= 1)
_overlap = _number(float, "a number from 0 to less than 1", lambda x: 0 <= x < 1)
_seconds = _number(float, "a number of seconds above 0", lambda x: 0 < x < float("inf"))
_bitrate = _number(int, "a bit rate from 6 to 512", lambda n: 6 <= n <= 512)
_whole = _number(int, "a whole number", lambda n: True)


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
        type=place,
        metavar="TRACK",
        help="audio files, folders of them, URLs of either (s3://, gs://, https:// …, patterns,"
        " too), or - for standard input",
    )
    parser.add_argument(
        "--from-file",
        type=place,
        metavar="LIST",
        help="a text file of tracks, one path or URL a line, # for comments; - for standard input",
    )
    parser.add_argument("--version", action="version", version=f"demucs-infer {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, with tracebacks")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    _add_model_options(parser)
    _add_output_options(parser)
    _add_separation_options(parser)
    _add_engine_options(parser)
    _add_stem_options(parser)
    _add_format_options(parser)
    _add_cluster_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_catalog_flags(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the stems go")
    group.add_argument(
        "-o",
        "--out",
        type=place,
        default=Path("separated"),
        metavar="DIR",
        help="output folder, or its URL; stems go into a folder per model in it"
        " (default: separated); -: standard output, for one stem",
    )
    group.add_argument(
        "--filename",
        default=DEFAULT_FILENAME,
        metavar="TEMPLATE",
        help="name of each stem's file, from {track}, {trackext}, {parent} (the track's folder),"
        f" {{model}}, {{stem}} and {{ext}} (default: {DEFAULT_FILENAME})",
    )
    group.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave out tracks whose stems are all there: goes on with a batch that was stopped",
    )


def _add_separation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to separate")
    group.add_argument(
        "--shifts",
        type=_count,
        default=1,
        metavar="N",
        help="average N passes with random offsets: slower by that factor, slightly better;"
        " 0: one pass without an offset, always the same result (default: 1)",
    )
    group.add_argument(
        "--seed",
        type=_whole,
        metavar="N",
        help="draw the offsets of the shifts from this number: the same stems each time",
    )
    group.add_argument(
        "--overlap",
        type=_overlap,
        default=0.25,
        metavar="PART",
        help="part of a window that the next one covers (default: 0.25)",
    )
    windows = group.add_mutually_exclusive_group()
    windows.add_argument(
        "--no-split",
        action="store_false",
        dest="split",
        help="the whole track in one window: needs much memory, and a model that can do it",
    )
    windows.add_argument(
        "--segment",
        type=_seconds,
        metavar="SECONDS",
        help="length of a window: less needs less memory (default: the model's)",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what runs the model")
    group.add_argument(
        "-d",
        "--device",
        help="cpu, cuda, cuda:1, mps, openvino:GPU … (default: a GPU if there is one)",
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="torch",
        help="what runs the network; openvino is faster on a CPU (default: torch)",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the network: bfloat16 is faster on CPUs and GPUs that have it, float16 on GPUs;"
        " the error stays far below what is heard (default: float32)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the network with PyTorch, which takes minutes: for many tracks on a GPU",
    )
    group.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="windows in one batch (default: on a GPU what its memory holds, else 1)",
    )
    group.add_argument(
        "-j",
        "--jobs",
        type=_count,
        default=0,
        metavar="N",
        help="windows that run at once on a CPU: needs N times the memory (default: 0, one)",
    )


def _add_stem_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which stems")
    wanted = group.add_mutually_exclusive_group()
    wanted.add_argument(
        "--stems",
        type=lambda text: text.split(","),
        metavar="STEM,...",
        help="only these stems: models of a bag that do not count for them are not run",
    )
    wanted.add_argument(
        "--two-stems", dest="stem", metavar="STEM", help="only this stem and all the rest"
    )
    group.add_argument(
        "--other-method",
        choices=OTHER_METHODS,
        default="add",
        help="with --two-stems, the rest is: add, the sum of the other stems (no_STEM);"
        " minus, the mixture minus the stem (minus_STEM); none, not written. minus and none run"
        " only the models that STEM needs (a quarter of htdemucs_ft), add runs all (default: add)",
    )


def _add_format_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("format of the stems (default: WAV, 16 bit)")
    suffix = group.add_mutually_exclusive_group()
    suffix.add_argument("--format", choices=FORMAT_NAMES, default="wav", help="(default: wav)")
    for name in ("flac", "mp3"):
        suffix.add_argument(
            f"--{name}",
            dest="format",
            action="store_const",
            const=name,
            help=f"write {name.upper()}",
        )
    depth = group.add_mutually_exclusive_group()
    depth.add_argument("--int24", action="store_true", help="24 bit, for WAV and FLAC")
    depth.add_argument("--float32", action="store_true", help="32 bit float, for WAV")
    group.add_argument(
        "--bitrate",
        "--mp3-bitrate",
        type=_bitrate,
        metavar="KBITS",
        help="of MP3 (default: 320), M4A (256) and Opus (192)",
    )
    group.add_argument(
        "--mp3-preset",
        type=int,
        choices=range(2, 8),
        default=2,
        help="2 is the best quality, 7 the fastest (default: 2)",
    )
    group.add_argument(
        "--keep-rate",
        action="store_true",
        help="write at the sample rate of the track instead of the model's",
    )
    group.add_argument(
        "--clip-mode",
        choices=CLIP_MODE_NAMES,
        default="rescale",
        help="when a stem is too loud for its format: rescale, lower all of it; rescale-all, lower"
        " all stems by the same, so that they still sum to the mix; clamp, cut the peaks; tanh,"
        " bend them; none, leave it to the format (default: rescale)",
    )


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several GPUs, several machines")
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="spread the tracks over a Ray cluster, a worker per GPU; without an address over that"
        " of RAY_ADDRESS, or else over this machine",
    )
    group.add_argument(
        "--cpus-per-worker",
        type=_positive,
        metavar="N",
        help="CPUs of a worker; without GPUs, these make the number of workers (default: 1 beside"
        " a GPU, else 4)",
    )


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


def _take_address(args: argparse.Namespace) -> None:
    """What stands behind --ray is a track if it is no address."""
    if args.ray and not re.fullmatch(r"auto|local|ray://.+|[^/\\]+:\d+", args.ray):
        args.tracks.insert(0, place(args.ray))
        args.ray = ""


def _separate_tracks(args: argparse.Namespace) -> int:
    """Separate every track and return how many failed."""
    from .api import Separator
    from .io.batch import checked_stems
    from .io.tracks import plan_jobs

    output = _make_output(args)
    options = _separator_options(args, output)
    separator = Separator(**options if args.ray is None else _without_device(options))
    stems = checked_stems(separator, output)
    jobs = plan_jobs(_find_tracks(args), output, separator.name, stems)
    console = Console(len(jobs), quiet=args.quiet, json=args.json)
    if args.ray is None:
        _separate_here(args, separator, output, jobs, console)
    else:
        del separator
        _separate_on_ray(args, options, output, jobs, console)
    console.sum_up()
    return console.failures


def _separate_here(
    args: argparse.Namespace,
    separator: Separator,
    output: Output,
    jobs: Sequence[Job],
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
    jobs: Sequence[Job],
    console: Console,
) -> None:
    from .cluster import separate_on_ray
    from .io.output import PIPE

    if output.is_pipe or any(job.track == PIPE for job in jobs):
        raise OptionError("--ray takes no standard input and no standard output")
    separate_on_ray(
        [str(job.track) for job in jobs],
        {**options, "output": output, "skip_existing": args.skip_existing},
        console.report_progress,
        address=args.ray,
        cpus_per_worker=args.cpus_per_worker,
        verbose=args.verbose,
    )


def _find_tracks(args: argparse.Namespace) -> Iterator[Place]:
    """The tracks that the command line and its list name. Raises `OptionError` if none is."""
    from .io.tracks import find_tracks, read_list

    listed = () if args.from_file is None else read_list(args.from_file)
    found = find_tracks(itertools.chain(args.tracks, listed), leave_out=args.out)
    first = next(found, None)
    if first is None:
        raise OptionError(f"{args.from_file}: names no track")
    return itertools.chain((first,), found)


def _model_name(args: argparse.Namespace) -> str:
    return args.sig or args.name or DEFAULT_MODEL


def _make_output(args: argparse.Namespace) -> Output:
    from .io.output import PIPE, Output

    if args.json and args.out == PIPE:
        raise OptionError("--json and -o - both want standard output: choose one")
    if args.from_file == PIPE and PIPE in args.tracks:
        raise OptionError("--from-file - and - both want standard input: choose one")
    return Output(
        folder=PIPE if args.out == PIPE else args.out / _model_name(args),
        filename=args.filename,
        format=args.format,
        bits_per_sample=24 if args.int24 else 16,
        as_float=args.float32,
        bitrate=args.bitrate,
        preset=args.mp3_preset,
        clip=args.clip_mode,
        keep_rate=args.keep_rate,
        two_stems=args.stem,
        other_method=args.other_method,
    )


def _separator_options(args: argparse.Namespace, output: Output) -> dict[str, Any]:
    return {
        "model": _model_name(args),
        "repo": args.repo,
        "cache_dir": args.cache_dir,
        "offline": args.offline,
        "device": args.device,
        "engine": args.engine,
        "precision": args.precision,
        "compile": args.compile,
        "batch_size": args.batch_size,
        "shifts": args.shifts,
        "seed": args.seed,
        "overlap": args.overlap,
        "split": args.split,
        "segment": args.segment,
        "jobs": args.jobs,
        "progress": sys.stderr.isatty() and not args.quiet and args.ray is None,
        "stems": output.needed or args.stems,
    }


def _without_device(options: Mapping[str, Any]) -> dict[str, Any]:
    """For a cluster, whose workers separate: here the model says which stems there are."""
    of_device = ("engine", "precision", "compile", "batch_size")
    return {"device": "cpu"} | {
        name: value for name, value in options.items() if name not in ("device", *of_device)
    }


if __name__ == "__main__":
    main()
