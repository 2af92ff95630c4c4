"""The command line: `demucs-infer song.mp3`.

Only `main` exits. PyTorch is imported when there is something to separate, so that `--help`,
`--version` and `--list-models` answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .catalog import add_catalog_flags, download_models, print_models
from .errors import DemucsInferError, OptionError, SaveAudioError
from .log import bold, fatal, logger
from .pretrained import DEFAULT_MODEL, add_model_flags

if TYPE_CHECKING:
    from torch import Tensor

    from .api import Separator

DEFAULT_FILENAME = "{track}/{stem}.{ext}"
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

DESCRIPTION = "Separate songs into stems: drums, bass, vocals and the rest."
EPILOG = """\
examples:
  demucs-infer song.mp3                      four stems in separated/htdemucs/song/
  demucs-infer --two-stems vocals song.mp3   vocals and accompaniment
  demucs-infer --mp3 -o stems *.flac         MP3 stems of an album, in stems/
  demucs-infer --repo models -n mine a.wav   a model of your own
  demucs-infer --download htdemucs           only fetch a model, for later

exit status:
  0 all went well, 1 a track or the model failed, 2 wrong usage, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the usage in one line."""

    def error(self, message: str) -> NoReturn:
        fatal(f"{message} (see demucs-infer --help)", status=EXIT_USAGE)


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
_overlap = _number(float, "a number from 0 to less than 1", lambda x: 0 <= x < 1)
_seconds = _number(float, "a number of seconds above 0", lambda x: 0 < x < float("inf"))
_bitrate = _number(int, "a bit rate from 8 to 320", lambda n: 8 <= n <= 320)


def get_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser(
        prog="demucs-infer",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tracks", nargs="*", type=Path, metavar="TRACK", help="audio files")
    parser.add_argument("--version", action="version", version=f"demucs-infer {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, with tracebacks")
    _add_model_options(parser)
    _add_output_options(parser)
    _add_separation_options(parser)
    _add_format_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_catalog_flags(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the stems go")
    group.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("separated"),
        metavar="DIR",
        help="output folder; stems go into a folder per model in it (default: separated)",
    )
    group.add_argument(
        "--filename",
        default=DEFAULT_FILENAME,
        metavar="TEMPLATE",
        help="name of each stem's file, from {track}, {trackext}, {stem} and {ext}"
        f" (default: {DEFAULT_FILENAME})",
    )


def _add_separation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to separate")
    group.add_argument(
        "-d", "--device", help="cpu, cuda, cuda:1, mps … (default: a GPU if there is one)"
    )
    group.add_argument(
        "--shifts",
        type=_count,
        default=1,
        metavar="N",
        help="average N passes with random offsets: slower by that factor, slightly better;"
        " 0: one pass without an offset, always the same result (default: 1)",
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
        choices=("none", "add", "minus"),
        default="add",
        help="with --two-stems, the rest is: add, the sum of the other stems (no_STEM);"
        " minus, the mixture minus the stem (minus_STEM); none, not written. minus and none run"
        " only the models that STEM needs (a quarter of htdemucs_ft), add runs all (default: add)",
    )
    group.add_argument(
        "-j",
        "--jobs",
        type=_count,
        default=0,
        metavar="N",
        help="windows that run at once on a CPU: needs N times the memory (default: 0, one)",
    )


def _add_format_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("format of the stems (default: WAV, 16 bit)")
    depth = group.add_mutually_exclusive_group()
    depth.add_argument("--int24", action="store_true", help="24 bit, for WAV and FLAC")
    depth.add_argument("--float32", action="store_true", help="32 bit float, for WAV")
    suffix = group.add_mutually_exclusive_group()
    suffix.add_argument("--flac", dest="ext", action="store_const", const="flac", help="write FLAC")
    suffix.add_argument("--mp3", dest="ext", action="store_const", const="mp3", help="write MP3")
    group.add_argument(
        "--mp3-bitrate", type=_bitrate, default=320, metavar="KBITS", help="(default: 320)"
    )
    group.add_argument(
        "--mp3-preset",
        type=int,
        choices=range(2, 8),
        default=2,
        help="2 is the best quality, 7 the fastest (default: 2)",
    )
    group.add_argument(
        "--clip-mode",
        choices=("rescale", "clamp", "tanh", "none"),
        default="rescale",
        help="when a stem is too loud for its format: rescale, lower all of it; clamp, cut the"
        " peaks; tanh, bend them; none, leave it to the format (default: rescale)",
    )
    parser.set_defaults(ext="wav")


def load_track(track: str | os.PathLike[str], audio_channels: int, samplerate: int) -> Tensor:
    """Decode a file as `[audio_channels, T]` at `samplerate` hertz. Raises `LoadAudioError`."""
    from .audio import AudioFile

    return AudioFile(track).read(streams=0, samplerate=samplerate, channels=audio_channels)


def main(opts: Sequence[str] | None = None) -> None:
    """Run the command line with `opts` (default: those of the process).

    Exits with a status other than 0 if something fails; returns if all went well.
    """
    parser = get_parser()
    args = parser.parse_args(opts)
    _log_to_stderr(args.verbose)
    try:
        if args.list_models:
            print_models(args)
            return
        if args.download:
            download_models(args)
            return
        if not args.tracks:
            parser.error("no track is given")
        failed = _separate_tracks(args)
    except OptionError as exc:
        logger.debug("", exc_info=exc)
        fatal(exc, status=EXIT_USAGE)
    except DemucsInferError as exc:
        logger.debug("", exc_info=exc)
        fatal(exc)
    except BrokenPipeError:  # the reader of --list-models has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        fatal("interrupted", status=EXIT_INTERRUPTED)
    if failed:
        raise SystemExit(EXIT_FAILED)


def _log_to_stderr(verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("demucs-infer: %(levelname)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)


def _separate_tracks(args: argparse.Namespace) -> int:
    """Separate every track and return how many failed."""
    from .audio import check_encoder

    _check_format(args)
    check_encoder(f".{args.ext}")
    folder = args.out / (args.sig or args.name or DEFAULT_MODEL)
    _check_filename(args.filename, folder)
    _make_output_folder(folder)
    separator = _make_separator(args)
    failed = 0
    for track in args.tracks:
        try:
            _separate_track(track, separator, folder, args)
        except DemucsInferError as exc:
            logger.debug("", exc_info=exc)
            print(f"demucs-infer: error: {exc}", file=sys.stderr)
            failed += 1
    return failed


def _check_format(args: argparse.Namespace) -> None:
    if args.float32 and args.ext != "wav":
        raise OptionError(f"--float32 is for WAV, not for --{args.ext}")
    if args.int24 and args.ext == "mp3":
        raise OptionError("--int24 is for WAV and FLAC, not for --mp3")


def _check_filename(template: str, folder: Path) -> None:
    first, second = (_stem_path(template, folder, Path("a.wav"), stem, "wav") for stem in "ab")
    if first == second:
        raise OptionError(f"--filename {template!r} lacks {{stem}}: all stems would be one file")


def _stem_path(template: str, folder: Path, track: Path, stem: str, ext: str) -> Path:
    """The file of a stem, which is within `folder` whatever the names are."""
    name, _, suffix = track.name.rpartition(".")
    try:
        relative = template.format(track=name or track.name, trackext=suffix, stem=stem, ext=ext)
    except (KeyError, IndexError, ValueError, AttributeError) as exc:
        raise OptionError(
            f"--filename {template!r} is no template of {{track}}, {{trackext}}, {{stem}}, {{ext}}"
        ) from exc
    path = Path(os.path.normpath(folder / relative))
    if Path(os.path.normpath(folder)) not in path.parents:
        raise OptionError(f"{path} would be outside of the output folder {folder}")
    return path


def _make_output_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        raise SaveAudioError(f"{folder}: cannot be written to ({exc.strerror or exc})") from exc


def _make_separator(args: argparse.Namespace) -> Separator:
    from .api import Separator

    stems = args.stems
    if args.stem is not None and args.other_method != "add":
        stems = [args.stem]
    separator = Separator(
        model=args.sig or args.name or DEFAULT_MODEL,
        repo=args.repo,
        cache_dir=args.cache_dir,
        offline=args.offline,
        device=args.device,
        shifts=args.shifts,
        overlap=args.overlap,
        split=args.split,
        segment=args.segment,
        jobs=args.jobs,
        progress=sys.stderr.isatty(),
        stems=stems,
    )
    sources: Any = separator.model.sources
    if args.stem is not None and args.stem not in sources:
        raise OptionError(f"there is no stem {args.stem!r}: the model has {', '.join(sources)}")
    return separator


def _separate_track(
    track: Path, separator: Separator, folder: Path, args: argparse.Namespace
) -> None:
    from .api import save_audio

    print(f"Separating {bold(track)}", file=sys.stderr)
    mixture, stems = separator.separate_audio_file(track)
    for name, stem in _wanted_stems(mixture, stems, args.stem, args.other_method):
        path = _stem_path(args.filename, folder, track, name, args.ext)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SaveAudioError(f"{path.parent}: cannot be made ({exc.strerror or exc})") from exc
        save_audio(
            stem,
            path,
            samplerate=separator.samplerate,
            bitrate=args.mp3_bitrate,
            clip=args.clip_mode,
            bits_per_sample=24 if args.int24 else 16,
            as_float=args.float32,
            preset=args.mp3_preset,
        )


def _wanted_stems(
    mixture: Tensor, stems: dict[str, Tensor], stem: str | None, other_method: str
) -> Iterator[tuple[str, Tensor]]:
    """Names and samples of what is written, for `--two-stems` and `--other-method`."""
    if stem is None:
        yield from stems.items()
        return
    yield stem, stems[stem]
    if other_method == "minus":
        yield f"minus_{stem}", mixture - stems[stem]
    elif other_method == "add":
        yield f"no_{stem}", sum(other for name, other in stems.items() if name != stem)  # type: ignore[misc]


if __name__ == "__main__":
    main()
