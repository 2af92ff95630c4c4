"""The output of a track: its stems, their folder, and their format.

Importing this needs no PyTorch.
"""

from __future__ import annotations

import os
import re
import string
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from ..engine.options import STEMS
from ..errors import LoadAudioError, OptionError, SaveAudioError
from ..fields import check as check_options
from ..fields import number, option
from ..log import logger
from ..storage.locations import (
    TEMPORARY,
    Location,
    Url,
    below,
    check,
    check_folder,
    exists,
    location,
    parent_name,
    reading,
)
from .formats import ALL_FORMATS, CODECS, DEFAULT_BITS, MIX, MP3_PRESETS, Format, find_format
from .stems import Stem, mix

if TYPE_CHECKING:
    from torch import Tensor

    from ..storage.spool import Workspace

PIPE = Path("-")  # stands for standard input or standard output
PIPE_NAME = "stdin"  # the name of a track from standard input
WHERE, FORMAT = "output", "format of the stems (default: WAV, 16 bit)"
# A field of a template, with its letter, conversion, and alignment, width and precision.
FIELD = re.compile(r"[a-z]+(\[\d{1,3}\])?![rsa]:(.?[<>^])?\d{0,3}(\.\d{1,3})?s?")
PAGE_FORMAT = find_format("mp3", bitrate=128)  # of the sounds of a page to listen with
OTHER_METHODS = ("none", "add", "minus")
DEFAULT_FILENAME = "{track}/{stem}.{ext}"
TOGETHER_FILENAME = "{track}.{ext}"  # where one file holds all stems
PAGE = "player"  # the name of a track's page to listen with, among its stems
CLIP_MODE_NAMES = ("rescale", "rescale-all", "clamp", "tanh", "none")
BITRATE = number(int, "a bit rate from 6 to 512", lambda n: 6 <= n <= 512)


@dataclass(frozen=True)
class Output:
    """The output of a track. Raises `OptionError` for options that do not fit."""

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
        " (for DJs, or as FLAC); mp4, mkv or mov, a video with the stem as its sound (default:"
        " %(default)s)",
        section=FORMAT,
        choices=tuple(ALL_FORMATS),
        shortcuts={"--flac": "flac", "--mp3": "mp3"},
    )
    codec: str | None = option(
        None, "of M4A and stem.mp4: aac, or alac, which is lossless (default: aac)", choices=CODECS
    )
    keep_audio: bool = option(
        False,
        "of MP4, MKV and MOV: the sounds of the video follow the stem",
        action="store_true",
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
        "kbit/s, of MP3 (default: 320), AAC (M4A, stem.mp4 and videos: 256) and Opus (192)",
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
        False, "write at the sample rate of the track instead of the model's", action="store_true"
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
    file_format: Format = field(init=False, repr=False)  # `format`, with its options
    _mentioned: list[Path] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_options(self)
        if self.as_float and 32 not in ALL_FORMATS[self.format].codecs:
            raise OptionError(f"float32 is for WAV, not for {self.format.upper()}")
        bits = 32 if self.as_float else self.bits_per_sample
        chosen = find_format(self.format, bits, self.bitrate, self.preset, self.codec)
        object.__setattr__(self, "file_format", chosen)
        if self.is_together and self.clip in ("clamp", "tanh"):
            raise OptionError(
                f"clip={self.clip!r}: the streams of {self.format} sum to the mix, so they have one"
                " gain: use rescale-all"
            )
        if self.keep_audio and not chosen.is_video:
            raise OptionError(f"keep_audio is for videos, not for {self.format.upper()}")
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
        # Check the template, and that the encoders are there.
        self._file(self._template, Path("track.wav"), "model", "folder", "stem")
        chosen.check_encoder()
        if self.player:
            PAGE_FORMAT.check_encoder()

    @property
    def is_together(self) -> bool:
        """True if one file holds all stems of a track, behind the mix."""
        return self.file_format.is_together

    @property
    def clip_mode(self) -> str | None:
        """The clip mode; stems in one file are all lowered by the same."""
        return "rescale-all" if self.is_together and self.clip == "rescale" else self.clip

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
        """True if the stem goes to standard output."""
        return self._folder == PIPE

    def workspace(self, timeout: float = 0) -> Workspace:
        """Return a hidden folder for unfinished files: among the stems if these are local.

        Raises `SaveAudioError` if files in the output folder cannot be made. Makes nothing before
        it is entered.
        """
        from ..storage.spool import Workspace

        if isinstance(self._folder, Path) and not self.is_pipe:
            folder = self._folder.absolute()
            there = next(path for path in (folder, *folder.parents) if path.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                reason = "Permission denied" if there.is_dir() else f"{there} is not a folder"
                raise SaveAudioError(f"{self.folder}: cannot be written to ({reason})")
            return Workspace(self._folder, timeout)
        check_folder(self._folder)
        try:
            return Workspace(Path(tempfile.gettempdir()), timeout)
        except OSError as exc:
            raise SaveAudioError(
                f"no folder for temporary files, set TMPDIR: {exc.strerror}"
            ) from exc

    def _sums(self, sources: Sequence[str]) -> list[Stem]:
        """Return the stems that are written as sums of `sources`."""
        stem, method = self.two_stems, self.other_method
        if stem is None:
            return self.file_format.arranged(sources)
        rest = Stem(f"no_{stem}", tuple(source for source in sources if source != stem))
        return [Stem(stem, (stem,)), *([rest] if method == "add" else [])]

    def stems(self, sources: Sequence[str]) -> list[str]:
        """Return the names of the stems that are written, for those that the model gives.

        Raises `OptionError` if one file cannot hold them.
        """
        names = [stem.name for stem in self._sums(sources)]
        if self.two_stems is not None and self.other_method == "minus":
            names.append(f"minus_{self.two_stems}")
        if not self.is_together:
            return names
        if MIX in names:
            raise OptionError(f"a stem {MIX!r} and the mix would have one name: use another")
        return [MIX, *names]

    def pick(self, mixture: Callable[[], Tensor], stems: dict[str, Tensor]) -> list[Tensor]:
        """Return a block of each name of `stems`, from the model's and the `mixture` on demand.

        The mixture comes first if the file or the page of all stems needs it.
        """
        picked = [mix(stem, stems) for stem in self._sums(list(stems))]
        if self.two_stems is not None and self.other_method == "minus":
            picked.append(mixture() - picked[0])
        return [mixture(), *picked] if self.is_together or self.player else picked

    def check_stems(self, sources: Sequence[str], separated: Sequence[str]) -> None:
        """Raise `OptionError` if the stems need others than are `separated` of `sources`.

        Stems that are written as a part of another one are mentioned.
        """
        if self.two_stems is None:
            for stem in self._sums(separated):
                if len(stem.sources) > 1:
                    rest = " and ".join(stem.sources[1:])
                    logger.warning("%s: %s are added to %r", self.format, rest, stem.name)
            return
        if self.two_stems not in sources:
            raise OptionError(
                f"the model has no stem {self.two_stems!r}: choose among {', '.join(sources)}"
            )
        missing = [name for name in self.needed or sources if name not in separated]
        if missing:
            raise OptionError(f"two stems need {', '.join(missing)}, too: choose no stems for that")

    @property
    def needed(self) -> list[str] | None:
        """The sources that have to be separated; None for all."""
        return None if self.two_stems is None or self.other_method == "add" else [self.two_stems]

    def paths(
        self, track: Location, model: str, stems: Sequence[str], folder: str = ""
    ) -> dict[str, Location]:
        """Return the file of each stem of `track`, within our folder whatever the names are.

        `folder` is that of the track below the one that was named.
        """
        if self.is_pipe:
            if len(stems) != 1 and not self.is_together:
                raise OptionError(
                    f"standard output takes one stem, not {len(stems)}: choose with --stems"
                )
            return dict.fromkeys(stems, PIPE)
        paths = {stem: self._file(self._template, track, model, folder, stem) for stem in stems}
        if len(set(paths.values())) < len(stems) and not self.is_together:
            raise OptionError(
                f"the file name {self.filename!r} lacks {{stem}}: all stems would be one file"
            )
        return paths

    def page(self, track: Location, model: str, folder: str = "") -> Location | None:
        """Return the page to listen to `track` with, if one is wanted.

        It is beside the stems, or in a folder that is called like their one file.
        """
        if not self.player:
            return None
        template = self._template
        if "{stem}" not in template:
            name = template.removesuffix(".{ext}")
            template = name + ("." if name == template else "/") + "{stem}.{ext}"
        return self._file(template, track, model, folder, PAGE, "html")

    def _file(
        self, template: str, track: Location, model: str, folder: str, stem: str, ext: str = ""
    ) -> Location:
        """Return the file in the output folder that a template means."""
        values = {
            "track": _safe(self.track_name(track)),
            "trackext": _split(track)[1],
            "parent": _safe(parent_name(track)),
            "folder": "/".join(_safe(name) for name in folder.split("/") if name),
            "model": model,
            "stem": stem,
            "ext": ext or self.format,
        }
        try:
            _check_template(template)
            relative = template.format(**values)
        except (LookupError, ValueError) as exc:
            known = ", ".join(f"{{{value}}}" for value in values)
            raise OptionError(f"the file name {template!r} is not a template of {known}") from exc
        if template.startswith("{folder") and not folder:
            relative = relative.lstrip("/")
        # Folders of this prefix are workspaces, which are removed. No track becomes one of them.
        if TEMPORARY in relative.casefold():
            pattern = rf"(^|[/\\])(?={re.escape(TEMPORARY)})"
            relative = re.sub(pattern, r"\1_", relative, flags=re.IGNORECASE)
        return below(self._folder, relative)

    def is_written(self, path: Location) -> bool:
        """Return True if a file is there that is of the format, as far as its header shows.

        Raises an error of a store that is out of reach.
        """
        from ..read.decode import AudioFile
        from ..read.packets import AV_ERRORS

        if not exists(path):
            return False
        try:
            with reading(path) as file:
                if path.name.endswith(".html"):
                    return file.read(15).lower().startswith(b"<!doctype html")
                with AudioFile(cast(BinaryIO, file))._open() as container:
                    return ALL_FORMATS[self.format].fits(container)
        except (LoadAudioError, *AV_ERRORS):
            return False

    def mention_leftovers(self, files: Iterable[Location]) -> None:
        """Warn once of files that are in the folder of a track and not among its `files`."""
        own = [path for path in files if isinstance(path, Path)]
        *_, folder_name, _ = ("", *self._template.split("/"))
        if self._mentioned or self.is_pipe or "{track" not in folder_name:
            return
        for folder in {path.parent for path in own if path.parent.is_dir()}:
            others = sorted(path.name for path in set(folder.iterdir()) - set(own))
            if others := [name for name in others if not name.startswith(".")]:
                self._mentioned.append(folder)
                names = ", ".join(others[:5]) + (" …" if len(others) > 5 else "")
                logger.warning("%s: also has files that are not of this run: %s", folder, names)
                return

    def track_name(self, track: Location) -> str:
        """Return the value of `{track}`."""
        return PIPE_NAME if track == PIPE else _split(track)[0]


@lru_cache(maxsize=16)
def _check_template(template: str) -> None:
    """Raise `ValueError` for a template that reaches into Python, or makes much of little."""
    if "\0" in template:
        raise ValueError("a NUL is in it")
    for _, name, width, conversion in string.Formatter().parse(template):
        if name is not None and not FIELD.fullmatch(f"{name}!{conversion or 's'}:{width}"):
            raise ValueError(f"{name} is not a field")


def _split(track: Location) -> tuple[str, str]:
    """Split a track's name and suffix; ".name" has no suffix, and "..." is only a name."""
    name, _, suffix = track.name.rpartition(".")
    return (name, suffix) if name.strip(".") else (track.name, "")


def _safe(name: str) -> str:
    """Make `name` safe as a directory name: never "." or "..", without dots that Windows strips."""
    if os.name == "nt":
        name = re.sub(r'[<>:"/\\|?*]', "_", name).rstrip(". ")
    return name if name.strip(".") else "_"
