"""What is written of a track: which stems, where, and in which format.

Importing this needs no PyTorch.
"""

from __future__ import annotations

import os
import re
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.options import STEMS, number, option
from ..errors import OptionError, SaveAudioError
from .console import check_standard_output
from .formats import DEFAULT_BITS, FORMATS, MP3_PRESETS, Encoding
from .storage import LocalPath, Named, Place, Url, place

if TYPE_CHECKING:
    from torch import Tensor

    from .spool import Workspace

PIPE = LocalPath("-")  # stands for standard input or standard output
PIPE_NAME = "stdin"  # what a track from standard input is called
WHERE, FORMAT = "where the stems go", "format of the stems (default: WAV, 16 bit)"
# A field of a template, with its letter, conversion, and alignment, width and precision.
FIELD = re.compile(r"[a-z]+(\[\d{1,3}\])?![rsa]:(.?[<>^])?\d{0,3}(\.\d{1,3})?s?")
OTHER_METHODS = ("none", "add", "minus")
CLIP_MODE_NAMES = ("rescale", "rescale-all", "clamp", "tanh", "none")
BITRATE = number(int, "a bit rate from 6 to 512", lambda n: 6 <= n <= 512)


@dataclass(frozen=True)
class Output:
    """What is written of a track, where and how. Raises `OptionError` for what cannot be."""

    folder: str | os.PathLike[str] | Url = option(
        "separated",
        "output folder, or its URL; on the command line stems go into a folder per model in it"
        " (default: %(default)s); -: standard output, for one stem",
        "-o",
        "--out",
        section=WHERE,
        dest="out",
        type=place,
        metavar="DIR",
    )
    filename: str = option(
        "{track}/{stem}.{ext}",
        "name of each stem's file, from {track}, {trackext}, {parent} (the track's folder),"
        " {model}, {stem} and {ext} (default: %(default)s)",
        metavar="TEMPLATE",
    )
    format: str = option(
        "wav",
        "format of the stems (default: %(default)s)",
        section=FORMAT,
        choices=tuple(FORMATS),
        shortcuts={"--flac": "flac", "--mp3": "mp3"},
    )
    bits_per_sample: int = option(
        DEFAULT_BITS,
        "16 or 24, for WAV and FLAC, or 32 for float32 (WAV only; default: %(default)s)",
        "",
        group="depth",
        shortcuts={"--int24": 24},
    )
    as_float: bool = option(
        False,
        "32 bit float, for WAV",
        "--float32",
        dest="float32",
        action="store_true",
        group="depth",
    )
    bitrate: int | None = option(
        None,
        "kbit/s, of MP3 (default: 320), M4A (256) and Opus (192)",
        "--bitrate",
        "--mp3-bitrate",
        type=BITRATE,
        metavar="KBITS",
    )
    preset: int = option(
        2,
        "of MP3: 2 is the best quality, 7 the fastest (default: %(default)s)",
        "--mp3-preset",
        dest="mp3_preset",
        type=int,
        choices=MP3_PRESETS,
    )
    clip: str | None = option(
        "rescale",
        "when a stem is too loud for its format: rescale, lower all of it; rescale-all, lower all"
        " stems by the same, so that they still sum to the mix; clamp, cut the peaks; tanh, bend"
        " them; none, leave it to the format (default: %(default)s)",
        "--clip-mode",
        dest="clip_mode",
        choices=CLIP_MODE_NAMES,
    )
    keep_rate: bool = option(
        False,
        "write at the sample rate of the track instead of the model's",
        action="store_true",
    )
    two_stems: str | None = option(
        None,
        "only this stem and all the rest",
        section=STEMS,
        dest="stem",
        metavar="STEM",
        group="stems",
    )
    other_method: str = option(
        "add",
        "with --two-stems, the rest is: add, the sum of the other stems (no_STEM); minus, the"
        " mixture minus the stem (minus_STEM); none, not written. minus and none run only the"
        " models that STEM needs (a quarter of htdemucs_ft), add runs all (default: %(default)s)",
        choices=OTHER_METHODS,
    )
    encoding: Encoding = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bits = self.bits_per_sample
        if self.as_float:
            if self.format != "wav":
                raise OptionError(f"float32 is for WAV, not for {self.format.upper()}")
            bits = 32
        encoding = Encoding(self.format, bits, self.bitrate, self.preset)
        object.__setattr__(self, "encoding", encoding)
        if self.clip not in (None, *CLIP_MODE_NAMES):
            raise OptionError(f"clip={self.clip!r}: use {', '.join(CLIP_MODE_NAMES)}")
        if self.other_method not in OTHER_METHODS:
            raise OptionError(f"other_method={self.other_method!r}: use {', '.join(OTHER_METHODS)}")
        self._place.check()
        if self._place.is_web:
            raise OptionError(f"{self.folder}: addresses of the web can only be read")
        self._path(LocalPath("track.wav"), "model", "stem")  # the template makes sense
        if self.is_pipe:
            check_standard_output()
        from .encode import check_encoder  # not before an output is wanted

        check_encoder(encoding)

    @property
    def _place(self) -> Place:
        return place(self.folder)

    @property
    def is_pipe(self) -> bool:
        """Whether the stem goes to standard output."""
        return self._place == PIPE

    def workspace(self, patience: float = 0) -> Workspace:
        """Room for what is not finished: among the stems if they are local, to be renamed there.

        Raises `SaveAudioError` if the stems cannot be written to where they are wanted.
        """
        from .spool import Workspace

        folder = self._place
        if isinstance(folder, LocalPath) and not self.is_pipe:
            return Workspace(folder, patience)
        folder.check_writable()
        return Workspace(_temporary_folder(), patience)

    def stems(self, sources: Sequence[str]) -> list[str]:
        """Names of the stems that are written of those that the model gives."""
        if self.two_stems is None:
            return list(sources)
        return [self.two_stems, *self._rest]

    @property
    def needed(self) -> list[str] | None:
        """The sources that have to be separated; None for all."""
        return None if self.two_stems is None or self.other_method == "add" else [self.two_stems]

    @property
    def _rest(self) -> list[str]:
        prefix = {"add": "no", "minus": "minus"}.get(self.other_method)
        return [f"{prefix}_{self.two_stems}"] if prefix else []

    def pick(self, mixture: Callable[[], Tensor], stems: dict[str, Tensor]) -> list[Tensor]:
        """What is written of a block: `stems` `[C, n]` by name, and `mixture` on demand."""
        if self.two_stems is None:
            return list(stems.values())
        stem = stems[self.two_stems]
        if self.other_method == "none":
            return [stem]
        if self.other_method == "minus":
            return [stem, mixture() - stem]
        others = (other for name, other in stems.items() if name != self.two_stems)
        return [stem, sum(others, stem.new_zeros(()).expand_as(stem))]

    def paths(self, track: Named, model: str, stems: Sequence[str]) -> dict[str, Place]:
        """The file of each stem of `track`; all are within the folder, whatever the names are."""
        track = place(track)
        if self.is_pipe:
            if len(stems) != 1:
                raise OptionError(
                    f"standard output takes one stem, not {len(stems)}: choose with --stems"
                )
            return {stems[0]: PIPE}
        paths = {stem: self._path(track, model, stem) for stem in stems}
        if len(set(paths.values())) < len(stems):
            raise OptionError(
                f"the file name {self.filename!r} lacks {{stem}}: all stems would be one file"
            )
        return paths

    def track_name(self, track: Place) -> str:
        """What `{track}` stands for."""
        return PIPE_NAME if track == PIPE else _split(track)[0]

    def _path(self, track: Place, model: str, stem: str) -> Place:
        values = {
            "track": _safe(self.track_name(track)),
            "trackext": _split(track)[1],
            "parent": _safe(track.parent_name),
            "model": model,
            "stem": stem,
            "ext": self.format,
        }
        try:
            relative = _filled(self.filename, values)
        except (LookupError, ValueError) as exc:
            known = ", ".join(f"{{{value}}}" for value in values)
            raise OptionError(f"the file name {self.filename!r} is no template of {known}") from exc
        return self._place.below(relative)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """`template.format(**values)`, but for what reaches into Python or makes much of little.

    Raises `ValueError` or `LookupError` for no template.
    """
    if "\0" in template:
        raise ValueError("a NUL is in it")
    for _, name, width, conversion in string.Formatter().parse(template):
        if name is not None and not FIELD.fullmatch(f"{name}!{conversion or 's'}:{width}"):
            raise ValueError(f"{name} is no field")
    return template.format(**values)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as exc:
        raise SaveAudioError(f"no folder for temporary files, set TMPDIR: {exc.strerror}") from exc


def _split(track: Place) -> tuple[str, str]:
    """Name and suffix of a track; ".name" has no suffix, and "..." is no more than a name."""
    name, _, suffix = track.name.rpartition(".")
    return (name, suffix) if name.strip(".") else (track.name, "")


def _safe(name: str) -> str:
    """`name` as the name of a folder: dots alone mean another one; Windows drops them at an end."""
    if os.name == "nt":
        name = re.sub(r'[<>:"/\\|?*]', "_", name).rstrip(". ")
    return name if name.strip(".") else "_"
