"""Options of a separation, each said once: a field with its default, its help and its flag.

`Separator`, `update_parameter` and the command line are made of these fields (`takes`, `updates`,
`add_flags`). Importing this needs no PyTorch.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from .backends import ENGINES, GRAPH_PRECISIONS, PRECISIONS

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "htdemucs"
# Titles in --help.
HOW, RUNS, STEMS = "how to separate", "what runs the model", "which stems"
READ = "which tracks are accepted"

CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)")  # hours, minutes, seconds

Callback = Callable[[dict[str, Any]], Any]
Given = ParamSpec("Given")
Result = TypeVar("Result")


def option(default: Any, help: str, *flags: str, section: str = "", **how: Any) -> Any:
    """A field of options.

    Args:
        default: the value without it.
        help: the text for `--help` and `help()`, in which `%(default)s` stands for the default.
        flags: on the command line (default: the field's name); "" for none.
        how: what `add_argument` takes, and `group`: options of one group exclude each other; and
            `shortcuts`: further flags, with the value that each stands for.
        section: a title in `--help`, for this option and those after it.
    """
    metadata = {"help": help, "flags": flags, "section": section, "how": how}
    return field(default=default, metadata=metadata)


def number(
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


def parse_time(text: str) -> float:
    """Seconds that "90", "1:30" or "1:02:03.5" mean. Raises `ValueError` for another text."""
    match = CLOCK.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    hours, minutes, seconds = match.groups()
    if (minutes and float(seconds) >= 60) or (hours and int(minutes) >= 60):
        raise ValueError(text)
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)


COUNT = number(int, "a whole number, 0 or more", lambda n: n >= 0)
POSITIVE = number(int, "a whole number, 1 or more", lambda n: n >= 1)
WHOLE = number(int, "a whole number", lambda n: True)
OVERLAP = number(float, "a number from 0 to less than 1", lambda x: 0 <= x < 1)
TIME = number(parse_time, "a time such as 90, 1:30 or 1:02:03.5", lambda x: x < float("inf"))
SECONDS = number(float, "a number of seconds above 0", lambda x: 0 < x < float("inf"))


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
    """How a track is separated: what `Separator.update_parameter` can change."""

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
        metavar="N",
    )
    overlap: float = option(
        0.25,
        "part of a window that the next one covers, from 0 to less than 1 (default: %(default)s)",
        type=OVERLAP,
        metavar="PART",
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
        metavar="SECONDS",
        group="windows",
    )
    jobs: int = option(
        0,
        "windows that run at once on a CPU: needs N times the memory (default: %(default)s, one)",
        "-j",
        "--jobs",
        section=RUNS,
        type=COUNT,
        metavar="N",
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
        metavar="TIME",
    )
    duration: float | None = option(
        None, "separate as much of a file: 90, 1:30 or 1:02:03.5", type=TIME, metavar="TIME"
    )
    seed: int | None = option(
        None,
        "draw the offsets of the shifts from this number, anew for each track: the same stems each"
        " time",
        section=HOW,
        type=WHOLE,
        metavar="N",
    )
    precision: str = option(
        "float32",
        "of the network: bfloat16 is faster on CPUs and GPUs that have it (where they have not,"
        " float32 is used), float16 on GPUs; the error stays far below what is heard (default:"
        " %(default)s)",
        section=RUNS,
        choices=PRECISIONS,
    )
    engine: str = option(
        "torch",
        "runs the network; openvino is faster on a CPU, onnxruntime has providers for the GPUs of"
        " many makers (default: %(default)s)",
        choices=tuple(ENGINES),
    )
    compile: bool = option(
        False,
        "compile the network with PyTorch, which takes minutes: for many tracks on a GPU",
        action="store_true",
    )
    batch_size: int | None = option(
        None,
        "windows in one batch (default: on a GPU what its memory holds, else 1)",
        type=POSITIVE,
        metavar="N",
    )
    max_duration: float | None = option(
        None,
        "refuse tracks that are longer, as soon as that is known (default: any length)",
        section=READ,
        type=SECONDS,
        metavar="SECONDS",
    )
    strict: bool = option(
        False,
        "a track that is damaged or cut off is an error, instead of separated without the damage",
        action="store_true",
    )


@dataclass(frozen=True)
class SeparatorOptions(SeparationOptions, ModelOptions):
    """All that a `Separator` takes, in demucs's order."""


@dataclass(frozen=True)
class GraphOptions:
    """What a network is like in ONNX, see `export`."""

    precision: str = option(
        "float32",
        "of weights and network in ONNX; inputs and outputs stay in float32 (default: %(default)s)",
        choices=GRAPH_PRECISIONS,
    )
    dynamic: bool = option(False, "take any batch in ONNX, not one window", action="store_true")


def options_of(options: type, given: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `options` with those of `given` that are fields of it."""
    return options(**{f.name: given[f.name] for f in fields(options) if f.init and f.name in given})


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


def takes(
    options: Callable[Given, Any],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, Given], Result]]:
    """Decorate a method of (self, options) so that it is called with the fields of `options`.

    Its signature and docstring then show each of them, and type checkers know them.
    """

    def decorate(method: Callable[..., Result]) -> Callable[Concatenate[Any, Given], Result]:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Given.args, **kwargs: Given.kwargs) -> Result:
            return method(self, options(*args, **kwargs))

        return _shown(wrapped, options, lambda parameter: parameter)

    return decorate


class _NotProvided:
    """Stands for an argument that was not given, where `None` is a value."""

    def __repr__(self) -> str:
        return "NotProvided"


NotProvided: Any = _NotProvided()


def updates(
    options: Callable[Given, Any],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, Given], Result]]:
    """Decorate a method of (self, changes) so that it is called with some fields of `options`."""
    known = inspect.signature(options)

    def decorate(method: Callable[..., Result]) -> Callable[Concatenate[Any, Given], Result]:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Given.args, **kwargs: Given.kwargs) -> Result:
            given = known.bind(*args, **kwargs).arguments
            return method(self, {n: v for n, v in given.items() if v is not NotProvided})

        return _shown(wrapped, options, lambda parameter: parameter.replace(default=NotProvided))

    return decorate


def _shown(
    method: Any, options: Any, change: Callable[[inspect.Parameter], inspect.Parameter]
) -> Any:
    """`method` with the fields of `options` in its signature and its docstring."""
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = map(change, inspect.signature(options).parameters.values())
    method.__signature__ = inspect.Signature([this, *parameters], return_annotation=None)
    method.__doc__ = f"{inspect.getdoc(method)}\n\nArgs:\n{described(options)}"
    return method


def described(options: Any) -> str:
    """The fields of `options` as the lines of a docstring."""
    return "\n".join(
        textwrap.fill(
            f"{f.name}: {f.metadata['help'] % {'default': f.default}}",
            width=96,
            initial_indent="    ",
            subsequent_indent="        ",
        )
        for f in fields(options)
        if f.metadata
    )
