"""Options of a separation: a field of a dataclass is an option's default, help, type and flag.

`Separator`, `update_parameter`, `--help` and the docstrings are made of these fields (`takes`
and `add_flags`). One frozen `SeparationOptions` goes from the interface to the decoder, the
engine and the backends. Importing this module does not import PyTorch.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ..errors import OptionError

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "htdemucs"
# Engines, each with its module in `backends`.
ENGINES: Mapping[str, str] = {
    "torch": "pytorch",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
}
PRECISIONS = ("float32", "bfloat16", "float16")
GRAPH_PRECISIONS = ("float32", "float16")  # of a network in ONNX
# Titles in --help.
HOW, RUNS, STEMS = "how to separate", "what runs the model", "which stems"
READ = "which tracks are accepted"

CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)")  # hours, minutes, seconds

Callback = Callable[[dict[str, Any]], Any]
Given = ParamSpec("Given")
Result = TypeVar("Result")


def option(default: Any, help: str, *flags: str, section: str = "", **how: Any) -> Any:
    """Return a field of options.

    Args:
        default: the value of an option that is not given.
        help: the text for `--help` and `help()`, in which `%(default)s` stands for the default.
        flags: the flags on the command line (default: the field's name); "" for none.
        section: a title in `--help`, for this option and those after it.
        how: arguments of `add_argument`; and `group`: options of one group exclude each other; and
            `shortcuts`: further flags, with the value that each stands for. An option that is False
            by default needs no `action`, and one with a `number` as its `type` no `metavar`.
    """
    if default is False:
        how.setdefault("action", "store_true")
    if isinstance(how.get("type"), number):
        how.setdefault("metavar", how["type"].metavar)
    metadata = {"help": help, "flags": flags, "section": section, "how": how}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class number:
    """A type for argparse: a number that `fits`, described as `wanted`."""

    kind: Callable[[str], Any]
    wanted: str
    fits: Callable[[Any], bool]
    metavar: str | None = None

    def __call__(self, text: str) -> Any:
        """Parse `text`."""
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {self.wanted}")
        return value


def parse_time(text: str) -> float:
    """Return the seconds of "90", "1:30" or "1:02:03.5". Raises `ValueError` for another text."""
    match = CLOCK.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    hours, minutes, seconds = match.groups()
    if (minutes and float(seconds) >= 60) or (hours and int(minutes) >= 60):
        raise ValueError(text)
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)


COUNT = number(int, "a whole number, 0 or more", lambda n: n >= 0 and n == n // 1, "N")
POSITIVE = number(int, "a whole number, 1 or more", lambda n: n >= 1 and n == n // 1, "N")
WHOLE = number(int, "a whole number", lambda n: n == n // 1, "N")
OVERLAP = number(float, "a number from 0 to less than 1", lambda x: 0 <= x < 1, "PART")
SECONDS = number(float, "a number of seconds above 0", lambda x: 0 < x < math.inf, "SECONDS")
TIME = number(
    parse_time, "a time such as 90, 1:30 or 1:02:03.5", lambda x: 0 <= x < math.inf, "TIME"
)
DURATION = replace(TIME, wanted="a time above 0 such as 90 or 1:30", fits=SECONDS.fits)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it comes from."""

    model: str = option(
        DEFAULT_MODEL,
        "name of a bag or signature of a model (see `list_models`), its file, or"
        " hf://[NAMESPACE/]NAME[@REVISION]",
        "",
    )
    repo: str | os.PathLike[str] | None = option(
        None,
        "folder of checkpoints (SIGNATURE[-CHECKSUM].th or .safetensors) and bags (NAME.yaml)"
        " to use instead of the released models",
        type=Path,
        metavar="DIR",
    )
    _: KW_ONLY
    cache_dir: str | os.PathLike[str] | None = option(
        None,
        "folder to keep released models in (default: DEMUCS_INFER_CACHE, or where PyTorch and"
        " demucs keep them, ~/.cache/torch/hub/checkpoints)",
        type=Path,
        metavar="DIR",
    )
    offline: bool | None = option(
        None,
        "never download models; those on this machine need no network anyway (also:"
        " DEMUCS_INFER_OFFLINE=1). Tracks by URL are still read",
        action="store_true",
    )


@dataclass(frozen=True)
class SeparationOptions:
    """How a track is separated: the options that `Separator.update_parameter` can change.

    Raises `OptionError` for a value out of range.
    """

    device: str | torch.device | None = option(
        None,
        "cpu, cuda, cuda:1, mps, or a device of another engine's, such as openvino:GPU or"
        " onnxruntime:directml (default: a GPU if there is one)",
        "-d",
        "--device",
        section=RUNS,
    )
    shifts: int = option(
        1,
        "average N passes with random offsets: slower by that factor, slightly better; 0: one pass"
        " without an offset, always the same result (default: %(default)s)",
        section=HOW,
        type=COUNT,
    )
    overlap: float = option(
        0.25,
        "part of a window that the next one covers, from 0 to less than 1 (default: %(default)s)",
        type=OVERLAP,
    )
    split: bool = option(
        True,
        "work window by window; --no-split: the whole track in one, which needs much memory, and a"
        " model that can do it",
        "--no-split",
        action="store_false",
        group="windows",
    )
    segment: float | None = option(
        None,
        "length of a window in seconds: less needs less memory (default: the model's)",
        type=SECONDS,
        group="windows",
    )
    jobs: int = option(
        0,
        "windows that run at once on a CPU: needs N times the memory (default: %(default)s, one)",
        "-j",
        "--jobs",
        section=RUNS,
        type=COUNT,
    )
    progress: bool = option(False, "show progress bars on standard error", "")
    callback: Callback | None = option(
        None, "called before and after each window with a dictionary, see `apply_model`", ""
    )
    callback_arg: Mapping[str, Any] | None = option(None, "entries to add to that dictionary", "")
    _: KW_ONLY
    stems: str | Sequence[str] | None = option(
        None,
        "only these stems: models of a bag that do not count for them are not run; a stem may be a"
        " sum with a name, as in vocals,instrumental=drums+bass+other; all: every source",
        section=STEMS,
        type=lambda text: text.split(","),
        metavar="STEM,...",
        group="stems",
    )
    start: float | None = option(
        None,
        "separate a file from this time on: 90, 1:30 or 1:02:03.5 (in Python seconds)",
        section=HOW,
        type=TIME,
    )
    duration: float | None = option(
        None, "separate as much of a file: 90, 1:30 or 1:02:03.5", type=DURATION
    )
    seed: int | None = option(
        None,
        "draw the offsets of the shifts of each track from this number: the same stems each time",
        section=HOW,
        type=WHOLE,
    )
    precision: str = option(
        "float32",
        "precision of the network: bfloat16 is faster on CPUs and GPUs that have it (on others,"
        " float32 is used), float16 on GPUs; the error is far too small to hear (default:"
        " %(default)s)",
        section=RUNS,
        choices=PRECISIONS,
    )
    engine: str = option(
        "torch",
        "library that runs the network; openvino is faster on a CPU, onnxruntime has providers for"
        " the GPUs of many makers (default: %(default)s)",
        choices=tuple(ENGINES),
    )
    compile: bool = option(
        False, "compile the network with PyTorch, which takes minutes: for many tracks on a GPU"
    )
    batch_size: int | None = option(
        None,
        "windows in one batch (default: on a GPU what its memory holds, else 1)",
        type=POSITIVE,
    )
    max_duration: float | None = option(
        None,
        "refuse tracks that are longer, as soon as that is known (default: any length)",
        section=READ,
        type=SECONDS,
    )
    strict: bool = option(
        False,
        "a track that is damaged or cut off is an error, instead of separated without the damage",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, how = getattr(self, option.name), option.metadata.get("how", {})
            kind, known = how.get("type"), how.get("choices")
            if known is not None and value not in known:
                raise OptionError(f"{option.name}={value!r}: choose from {', '.join(known)}")
            if isinstance(kind, number) and value is not None and not kind.fits(value):
                raise OptionError(f"{option.name}={value} must be {kind.wanted}")

    def excerpt(self, rate: int) -> tuple[int, int | None]:
        """Return the first sample of a file at `rate` hertz, and the end or None for the file's."""
        first = round((self.start or 0) * rate)
        return first, None if self.duration is None else first + round(self.duration * rate)


@dataclass(frozen=True)
class SeparatorOptions(SeparationOptions, ModelOptions):
    """The options of a `Separator`, in the order of demucs."""


@dataclass(frozen=True)
class GraphOptions:
    """The options of a network in ONNX, see `export`."""

    precision: str = option(
        "float32",
        "of weights and network in ONNX; inputs and outputs stay in float32 (default: %(default)s)",
        choices=GRAPH_PRECISIONS,
    )
    dynamic: bool = option(False, "take any batch in ONNX, not one window", action="store_true")


# The flags of the command line.


def add_flags(parser: argparse.ArgumentParser, *tables: type) -> None:
    """Give `parser` the flags of the fields of each dataclass, under the titles of their sections.

    A field without a section belongs to that of the field before it.
    """
    sections: dict[str, Any] = {"": parser}
    excluding: dict[str, Any] = {}
    for table in tables:
        title = ""
        for option in fields(table):
            if "flags" in option.metadata:
                title = option.metadata["section"] or title
                if title not in sections:
                    sections[title] = parser.add_argument_group(title)
                _add_flag(sections[title], option, excluding)


def _add_flag(section: Any, option: Field[Any], excluding: dict[str, Any]) -> None:
    how = dict(option.metadata["how"])
    shortcuts = how.pop("shortcuts", {})
    group = how.pop("group", option.name if shortcuts else None)
    if group is not None:
        section = excluding.get(group) or section.add_mutually_exclusive_group()
        excluding[group] = section
    dest = how.setdefault("dest", option.name)
    flags = option.metadata["flags"] or (f"--{option.name.replace('_', '-')}",)
    if flags != ("",):
        text = option.metadata["help"]
        section.add_argument(*flags, default=option.default, help=text, **how)
    for flag, value in shortcuts.items():
        said = f"{option.name.replace('_', ' ')}: {value}"
        how = {"action": "store_const", "const": value, "default": option.default}
        section.add_argument(flag, dest=dest, help=said, **how)


def values_of(options: type, args: argparse.Namespace) -> dict[str, Any]:
    """The values that `args` have for the fields of `options`."""
    names = {f.name: f.metadata["how"].get("dest", f.name) for f in fields(options) if f.metadata}
    return {name: getattr(args, dest) for name, dest in names.items() if hasattr(args, dest)}


# The parameters of functions.


class _NotProvided:
    """Stands for an argument that was not given, where `None` is a value."""

    def __repr__(self) -> str:
        return "NotProvided"


NotProvided: Any = _NotProvided()


def takes(
    options: Callable[Given, Any], *, some: bool = False
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, Given], Result]]:
    """Decorate a method of (self, options) so that it is called with the fields of `options`.

    Its signature and docstring then show each of them, and type checkers know them. With `some`,
    each field may be left out, and the method gets a dictionary of those that are given.
    """
    signature = inspect.signature(options)

    def decorate(method: Callable[..., Result]) -> Callable[Concatenate[Any, Given], Result]:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Given.args, **kwargs: Given.kwargs) -> Result:
            if not some:
                return method(self, options(*args, **kwargs))
            given = signature.bind(*args, **kwargs).arguments
            return method(self, {n: v for n, v in given.items() if v is not NotProvided})

        parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        for parameter in signature.parameters.values():
            parameters.append(parameter.replace(default=NotProvided) if some else parameter)
        new: Any = wrapped
        new.__signature__ = inspect.Signature(parameters, return_annotation=None)
        lines = [inspect.getdoc(method) or "", "", "Args:"]
        for f in fields(options):  # type: ignore[arg-type]
            if f.metadata:
                text = f"    {f.name}: {f.metadata['help'] % {'default': f.default}}"
                lines.append(textwrap.fill(text, width=96, subsequent_indent=" " * 8))
        new.__doc__ = "\n".join(lines)
        return new

    return decorate
