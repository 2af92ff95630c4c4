"""Options as fields of dataclasses: a field is an option's default, help, type and flag.

`add_flags` makes the flags of the command line of these fields, and `takes` the parameters of a
function and its docstring. Importing this module does not import PyTorch.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from .errors import OptionError

CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?|\.\d+)")  # hours, minutes, seconds

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


def check(options: Any) -> None:
    """Raise `OptionError` if a field of `options` has a value that its type or choices exclude."""
    for option in fields(options):
        value, how = getattr(options, option.name, None), option.metadata.get("how", {})
        kind, known = how.get("type"), how.get("choices")
        allowed = "None" in str(option.type) and value is None
        if known is not None and value not in known and not allowed:
            raise OptionError(f"{option.name}={value!r}: choose from {', '.join(map(str, known))}")
        if isinstance(kind, number) and value is not None and not kind.fits(value):
            raise OptionError(f"{option.name}={value} must be {kind.wanted}")


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
