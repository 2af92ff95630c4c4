"""What is written of a track: which stems, where, and in which format.

Importing this needs no PyTorch.
"""

from __future__ import annotations

import os
import re
import string
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.options import STEMS
from ..errors import OptionError, SaveAudioError
from ..fields import number, option
from ..log import logger
from ..storage.locations import (
    TEMPORARY,
    Location,
    Named,
    Url,
    below,
    check,
    check_folder,
    location,
    parent_name,
)
from .formats import ALL_FORMATS, CODECS, DEFAULT_BITS, MP3_PRESETS, TOGETHER, Encoding
from .stems import Stem, mix

if TYPE_CHECKING:
    from torch import Tensor

    from ..storage.spool import Workspace

PIPE = Path("-")  # stands for standard input or standard output
PIPE_NAME = "stdin"  # what a track from standard input is called
WHERE, FORMAT = "where the stems go", "format of the stems (default: WAV, 16 bit)"
# A field of a template, with its letter, conversion, and alignment, width and precision.
FIELD = re.compile(r"[a-z]+(\[\d{1,3}\])?![rsa]:(.?[<>^])?\d{0,3}(\.\d{1,3})?s?")
OTHER_METHODS = ("none", "add", "minus")
DEFAULT_FILENAME = "{track}/{stem}.{ext}"
TOGETHER_FILENAME = "{track}.{ext}"  # where one file holds all stems
PAGE = "player"  # the name of a track's page to listen with, among its stems
MIX = "mix"  # the first stream of a file of all stems
MOST_STEMS = 4  # of a stem file
STANDARD = ("drums", "bass", "other", "vocals")  # in the order of a stem file
REST = ("guitar", "piano")  # which such a file has no room for: they go to "other"
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
        type=location,
        metavar="DIR",
    )
    filename: str = option(
        DEFAULT_FILENAME,
        "name of each stem's file, from {track}, {trackext}, {parent} (the track's folder),"
        " {folder} (its folders below the one that was named, to keep their shape), {model}, {stem}"
        " and {ext} (default: %(default)s, or {track}.{ext} for one of all stems)",
        metavar="TEMPLATE",
    )
    player: bool = option(
        False,
        "also write a page to listen with, {track}/player.html: one file that plays all stems in"
        " step, with solo and mute",
        action="store_true",
    )
    format: str = option(
        "wav",
        "format of the stems: a file each; stem.mp4 or mka, one file with the mix and all stems"
        " (for DJs, or as FLAC); mp4, the picture of a video with the stem as its sound (default:"
        " %(default)s)",
        section=FORMAT,
        choices=tuple(ALL_FORMATS),
        shortcuts={"--flac": "flac", "--mp3": "mp3"},
    )
    codec: str | None = option(
        None, "of M4A and stem.mp4: aac, or alac, which is lossless (default: aac)", choices=CODECS
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
    depth: str | None = option(
        None,
        "auto: 24 bit or float where the track has that, for WAV and FLAC",
        choices=("auto",),
        group="depth",
    )
    bitrate: int | None = option(
        None,
        "kbit/s, of MP3 (default: 320), AAC (M4A, MP4, stem.mp4: 256) and Opus (192)",
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
        object.__setattr__(self, "encoding", self._encoding())
        self._check_choices()
        check(self._folder)
        if isinstance(self._folder, Url) and self._folder.is_web:
            raise OptionError(f"{self._folder}: URLs of the web can only be read")
        if self.is_together and "{stem}" in self._template:
            raise OptionError(
                f"{self.format} holds all stems in one file: leave {{stem}} out of the file name"
                f" {self.filename!r}"
            )
        if self.is_pipe and (sys.stdout is None or sys.stdout.closed):
            raise SaveAudioError("standard output is closed: nothing can be written to it")
        if self.is_pipe and self.player:
            raise OptionError("a page to listen with cannot go to standard output: leave it out")
        values = self._values(Path("track.wav"), "model", str)
        self._file(self._template, {**values, "folder": "folder"}, "stem", self.format)
        from .encode import check_encoder  # not before an output is wanted

        check_encoder(self.encoding)

    def _encoding(self) -> Encoding:
        bits = self.bits_per_sample
        if self.as_float:
            if self.format != "wav":
                raise OptionError(f"float32 is for WAV, not for {self.format.upper()}")
            bits = 32
        return Encoding(self.format, bits, self.bitrate, self.preset, self.codec)

    def _check_choices(self) -> None:
        if self.clip not in (None, *CLIP_MODE_NAMES):
            raise OptionError(f"clip={self.clip!r}: use {', '.join(CLIP_MODE_NAMES)}")
        if self.is_together and self.clip in ("clamp", "tanh"):
            raise OptionError(
                f"clip={self.clip!r}: the streams of {self.format} sum to the mix, so they have one"
                " gain: use rescale-all"
            )
        if self.other_method not in OTHER_METHODS:
            raise OptionError(f"other_method={self.other_method!r}: use {', '.join(OTHER_METHODS)}")
        if self.depth not in (None, "auto"):
            raise OptionError(f"depth={self.depth!r}: use 'auto', or bits_per_sample")

    @property
    def is_together(self) -> bool:
        """Whether one file holds all stems of a track, behind the mix."""
        return self.format in TOGETHER

    @property
    def clip_mode(self) -> str | None:
        """What happens to samples beyond ±1; stems in one file are all lowered by the same."""
        return "rescale-all" if self.is_together and self.clip == "rescale" else self.clip

    def encoding_for(self, bits: int) -> Encoding:
        """How the stems of a track are encoded that has `bits` (32: float)."""
        fits = [depth for depth in self.encoding.kind.codecs if depth <= bits]
        if self.depth is None or self.encoding.kind.is_lossy or not fits:
            return self.encoding
        return replace(self.encoding, bits=max(fits))

    @property
    def _template(self) -> str:
        if self.is_together and self.filename == DEFAULT_FILENAME:
            return TOGETHER_FILENAME
        return self.filename

    @cached_property
    def _folder(self) -> Location:
        return location(self.folder)

    @property
    def is_pipe(self) -> bool:
        """Whether the stem goes to standard output."""
        return self._folder == PIPE

    def workspace(self, patience: float = 0) -> Workspace:
        """Room for what is not finished: among the stems if they are local, to be renamed there.

        Raises `SaveAudioError` if the stems cannot be written to where they are wanted.
        """
        from ..storage.spool import Workspace

        folder = self._folder
        if isinstance(folder, Path) and not self.is_pipe:
            return Workspace(folder, patience)
        check_folder(folder)
        return Workspace(_temporary_folder(), patience)

    def stems(self, sources: Sequence[str]) -> list[str]:
        """Names of the stems that are written of those that the model gives.

        Raises `OptionError` if one file cannot hold them.
        """
        if self.two_stems is not None:
            names = [self.two_stems, *self._rest]
        else:
            names = [stem.name for stem in self._arranged(sources)]
        if not self.is_together:
            return names
        if MIX in names:
            raise OptionError(f"a stem {MIX!r} and the mix would have one name: use another")
        return [MIX, *names]

    def _arranged(self, stems: Sequence[str]) -> list[Stem]:
        """The stems in their order, and which of `stems` are summed where there is no room."""
        kept = [Stem(name, (name,)) for name in stems]
        if self.format != "stem.mp4":
            return kept
        if set(stems) == {*STANDARD, *REST}:
            rest = {"other": REST}
            return [Stem(name, (name, *rest.get(name, ()))) for name in STANDARD]
        if len(stems) > MOST_STEMS:
            raise OptionError(
                f"stem.mp4 holds {MOST_STEMS} stems, not {len(stems)}: choose with --stems, or"
                " write mka"
            )
        if set(stems) == {*STANDARD}:
            return [Stem(name, (name,)) for name in STANDARD]
        return kept

    def warn(self, sources: Sequence[str]) -> None:
        """Say which of the stems that the model gives are not written as they are."""
        if self.two_stems is None:
            for stem in self._arranged(sources):
                if len(stem.sources) > 1:
                    rest = " and ".join(stem.sources[1:])
                    logger.warning(
                        "%s holds %d stems: %s are added to %r",
                        *(self.format, MOST_STEMS, rest, stem.name),
                    )

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
        first = [mixture()] if self.is_together else []
        return first + self._pick(mixture, stems)

    def _pick(self, mixture: Callable[[], Tensor], stems: dict[str, Tensor]) -> list[Tensor]:
        if self.two_stems is None:
            return [mix(stem, stems) for stem in self._arranged(list(stems))]
        stem = stems[self.two_stems]
        if self.other_method == "none":
            return [stem]
        if self.other_method == "minus":
            return [stem, mixture() - stem]
        others = (other for name, other in stems.items() if name != self.two_stems)
        return [stem, sum(others, stem.new_zeros(()).expand_as(stem))]

    def paths(
        self,
        track: Named,
        model: str,
        stems: Sequence[str],
        folder_of: Callable[[Location], str] = lambda track: "",
    ) -> dict[str, Location]:
        """The file of each stem of `track`; all are within the folder, whatever the names are.

        `folder_of` gives the track's folder below the one that was named.
        """
        track = location(track)
        if self.is_pipe:
            if len(stems) != 1 and not self.is_together:
                raise OptionError(
                    f"standard output takes one stem, not {len(stems)}: choose with --stems"
                )
            return dict.fromkeys(stems, PIPE)
        values = self._values(track, model, folder_of)
        paths = {stem: self._file(self._template, values, stem, self.format) for stem in stems}
        if len(set(paths.values())) < len(stems) and not self.is_together:
            raise OptionError(
                f"the file name {self.filename!r} lacks {{stem}}: all stems would be one file"
            )
        return paths

    def page(
        self, track: Location, model: str, folder_of: Callable[[Location], str] = lambda track: ""
    ) -> Location | None:
        """The page to listen to `track` with, if one is wanted: beside the stems."""
        if not self.player:
            return None
        values = self._values(track, model, folder_of)
        return self._file(self._page_template, values, PAGE, "html")

    @property
    def _page_template(self) -> str:
        """The template of a page: beside the stems, or in a folder named like their one file."""
        template = self._template
        if "{stem}" in template:
            return template
        folder = template.removesuffix(".{ext}")
        return folder + ("." if folder == template else "/") + "{stem}.{ext}"

    def track_name(self, track: Location) -> str:
        """What `{track}` stands for."""
        return PIPE_NAME if track == PIPE else _split(track)[0]

    def _values(
        self, track: Location, model: str, folder_of: Callable[[Location], str]
    ) -> dict[str, str]:
        """What the fields of a template stand for, but for the stem."""
        # Looked up only where it is wanted: it takes long, for a million tracks.
        folder = folder_of(track) if "{folder" in self._template else ""
        return {
            "track": _safe(self.track_name(track)),
            "trackext": _split(track)[1],
            "parent": _safe(parent_name(track)),
            "folder": "/".join(_safe(name) for name in folder.split("/") if name),
            "model": model,
        }

    def _file(self, template: str, values: dict[str, str], stem: str, ext: str) -> Location:
        """Return the file in the output folder that a template means."""
        values = {**values, "stem": stem, "ext": ext}
        try:
            _check_template(template)
            relative = template.format(**values)
        except (LookupError, ValueError) as exc:
            known = ", ".join(f"{{{value}}}" for value in values)
            raise OptionError(f"the file name {template!r} is no template of {known}") from exc
        relative = relative if values["folder"] else relative.lstrip("/")
        # Folders of this prefix are workspaces, which are removed. No track becomes one of them.
        if TEMPORARY in relative.lower():
            pattern = rf"(^|[/\\])(?={re.escape(TEMPORARY)})"
            relative = re.sub(pattern, r"\1_", relative, flags=re.IGNORECASE)
        return below(self._folder, relative)


@lru_cache(maxsize=16)
def _check_template(template: str) -> None:
    """Raise `ValueError` for a template that reaches into Python, or makes much of little."""
    if "\0" in template:
        raise ValueError("a NUL is in it")
    for _, name, width, conversion in string.Formatter().parse(template):
        if name is not None and not FIELD.fullmatch(f"{name}!{conversion or 's'}:{width}"):
            raise ValueError(f"{name} is no field")


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as exc:
        raise SaveAudioError(f"no folder for temporary files, set TMPDIR: {exc.strerror}") from exc


def _split(track: Location) -> tuple[str, str]:
    """Name and suffix of a track; ".name" has no suffix, and "..." is no more than a name."""
    name, _, suffix = track.name.rpartition(".")
    return (name, suffix) if name.strip(".") else (track.name, "")


def _safe(name: str) -> str:
    """`name` as the name of a folder: dots alone mean another one; Windows drops them at an end."""
    if os.name == "nt":
        name = re.sub(r'[<>:"/\\|?*]', "_", name).rstrip(". ")
    return name if name.strip(".") else "_"
