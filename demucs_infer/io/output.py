"""Where the stems of a track go, in which format, and how they get there whole.

    block of stems ──pick──▶ ──resample──▶ ──clip──▶ encoder ──▶ temporary file ──rename──▶ stem
                                   └──▶ spool ──rescale──▶ ┘

A stem that is to be rescaled waits in a spool until its peak is known. All stems of a track take
their names when the last of them is whole.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..choices import DEFAULT_FILENAME, OTHER_METHODS
from ..engine.threads import worker_pool
from ..errors import OptionError
from ..resample import Resampler
from .encode import check_encoder, encoder, encoding_errors
from .formats import DEFAULT_BITS, Encoding
from .pcm import RESCALING, check_clip_mode, prevent_clip, rescale_divisor
from .spool import Spool, Workspace
from .storage import Place, Url, place

PIPE = Path("-")  # stands for standard input or standard output
PIPE_NAME = "stdin"  # what a track from standard input is called
BLOCK = 2**16  # samples that are read from a spool at once


@dataclass(frozen=True)
class Output:
    """What is written of a track, where and how. Raises `OptionError` for what cannot be.

    Args:
        folder: the output folder, or its URL, or "-" for standard output (one stem only).
        filename: name of each stem's file in it, from `{track}`, `{trackext}`, `{parent}` (the
            name of the track's folder), `{model}`, `{stem}` and `{ext}`.
        format: "wav", "flac", "mp3", "ogg", "opus" or "m4a".
        bits_per_sample: 16 or 24, or 32 for float32 (WAV only).
        as_float: write WAV as float32.
        bitrate: kbit/s, of MP3 (default: 320), M4A (256) and Opus (192).
        preset: of MP3, from 2 (best quality) to 7 (fastest).
        clip: what happens to samples beyond ±1: see `prevent_clip`; `rescale-all` divides all stems
            of a track by the same, so that they still sum to the mixture.
        keep_rate: write at the sample rate of the track instead of the model's.
        two_stems: a stem: only this one and the rest are written.
        other_method: what the rest is: "add" (the sum of the other stems, `no_STEM`), "minus"
            (the mixture minus the stem, `minus_STEM`), or "none".
    """

    folder: str | os.PathLike[str] | Url = "separated"
    filename: str = DEFAULT_FILENAME
    format: str = "wav"
    bits_per_sample: int = DEFAULT_BITS
    as_float: bool = False
    bitrate: int | None = None
    preset: int = 2
    clip: str | None = "rescale"
    keep_rate: bool = False
    two_stems: str | None = None
    other_method: str = "add"
    encoding: Encoding = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bits = self.bits_per_sample
        if self.as_float:
            if self.format != "wav":
                raise OptionError(f"float32 is for WAV, not for {self.format.upper()}")
            bits = 32
        encoding = Encoding(self.format, bits, self.bitrate, self.preset)
        object.__setattr__(self, "encoding", encoding)
        check_encoder(encoding)
        check_clip_mode(self.clip)
        if self.other_method not in OTHER_METHODS:
            raise OptionError(f"other_method={self.other_method!r}: use {', '.join(OTHER_METHODS)}")
        if isinstance(self._place, Url) and self._place.is_web:
            raise OptionError(f"{self.folder}: addresses of the web can only be read")
        self._path(Path("track.wav"), "model", "stem")  # the template makes sense

    @property
    def _place(self) -> Place:
        return self.folder if isinstance(self.folder, Url) else place(os.fspath(self.folder))

    @property
    def is_pipe(self) -> bool:
        """Whether the stem goes to standard output."""
        return self._place == PIPE

    def workspace(self) -> Workspace:
        """Room for what is not finished: among the stems if they are local, to be renamed there.

        Raises `SaveAudioError` if the stems cannot be written to where they are wanted.
        """
        folder = self._place
        elsewhere = Workspace(Path(tempfile.gettempdir()))
        if isinstance(folder, Url):
            folder.check_writable()
            return elsewhere
        return elsewhere if self.is_pipe else Workspace(folder)

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

    def paths(self, track: Place, model: str, stems: Sequence[str]) -> dict[str, Place]:
        """The file of each stem of `track`; all are within the folder, whatever the names are."""
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
            "parent": _safe(_folder_name(track)),
            "model": model,
            "stem": stem,
            "ext": self.format,
        }
        try:
            relative = self.filename.format(**values)
        except (KeyError, IndexError, ValueError, AttributeError) as exc:
            known = ", ".join(f"{{{value}}}" for value in values)
            raise OptionError(f"the file name {self.filename!r} is no template of {known}") from exc
        return _below(self._place, relative)


def _below(folder: Place, relative: str) -> Place:
    """`relative` in `folder`. Raises `OptionError` if that is another place."""
    path: Place
    if isinstance(folder, Url):
        normal = posixpath.normpath(relative)
        path, inside = folder / normal, not re.match(r"/|\.$|\.\.(/|$)", normal)
    else:
        path = Path(os.path.normpath(folder / relative))
        inside = Path(os.path.normpath(folder)) in path.parents
    if not inside:
        raise OptionError(f"{path} would be outside of the output folder {folder}")
    return path


def _folder_name(track: Place) -> str:
    """What `{parent}` stands for."""
    return track.folder_name if isinstance(track, Url) else Path.cwd().joinpath(track).parent.name


def _split(track: Place) -> tuple[str, str]:
    """Name and suffix of a track; ".name" has no suffix, and "..." is no more than a name."""
    name, _, suffix = track.name.rpartition(".")
    return (name, suffix) if name.strip(".") else (track.name, "")


def _safe(name: str) -> str:
    """`name` as the name of a folder: dots alone mean another one; Windows drops them at an end."""
    if os.name == "nt":
        name = name.rstrip(". ")
    return name if name.strip(".") else "_"


@dataclass(frozen=True)
class StemFile:
    """A stem that is there: `peak` is its magnitude before it was multiplied by `gain`."""

    path: Place
    peak: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Target:
    """What the files of a track have in common.

    `length` is the number of samples that each gets at `rate` hertz; None: what resampling gives.
    """

    output: Output
    space: Workspace
    samplerate: int  # of the model
    channels: int
    rate: int
    length: int | None
    tags: Mapping[str, str]


class _StemWriter:
    """One stem on its way into its file."""

    def __init__(self, target: Target, name: str) -> None:
        self.target = target
        self.peak = 0.0
        self.divisor = 1.0
        self.file = target.space.file()
        self._handle = self.file.open("w+b")
        self._encoder = encoder(
            self._handle,
            target.output.encoding,
            target.rate,
            target.channels,
            {**target.tags, "title": f"{target.tags['title']} ({name})"},
        )
        self._resampler = Resampler(target.samplerate, target.rate, target.length)
        rescales = target.output.clip in RESCALING
        self._spool: Spool | None = target.space.spool(target.channels) if rescales else None

    def write(self, block: Tensor) -> None:
        """Take samples `[C, n]` at the model's rate."""
        self._take(self._resampler.push(block))

    def flush(self) -> None:
        """Take what is still in the resampler."""
        last = self._resampler.flush()
        if last is not None:
            self._take(last)

    def _take(self, block: Tensor) -> None:
        if not block.shape[-1]:
            return
        self.peak = max(self.peak, block.abs().max().item())
        if self._spool is not None:
            self._spool.write(block)
        else:
            self._encoder.write(prevent_clip(block, self.target.output.clip))

    def encode(self, check: Callable[[], None]) -> None:
        """Encode what is in the spool, and make the file whole; `check` may end that at a block."""
        check()
        if self._spool is not None:
            for block in self._spool.blocks(BLOCK):
                check()
                self._encoder.write(block / self.divisor)
        self._encoder.close()
        self.close()

    def close(self) -> None:
        """Give everything back but the file, whole or not."""
        self._handle.close()
        if self._spool is not None:
            self._spool.close()


class TrackWriter:
    """Takes the stems of a track block by block, and makes them appear together.

    Raises `SaveAudioError` if something cannot be written; nothing of the track is left then.
    """

    def __init__(self, paths: Mapping[str, Place], target: Target) -> None:
        self.paths = paths
        self.target = target
        self._writers: dict[str, _StemWriter] = {}
        for name, path in paths.items():
            with self._writing(path):
                self._writers[name] = _StemWriter(target, name)

    @contextmanager
    def _writing(self, path: Place) -> Iterator[None]:
        try:
            with encoding_errors(path):
                yield
        except BaseException:
            self.discard()
            raise

    def write(self, stems: Sequence[Tensor]) -> None:
        """Take a block of every stem, each `[C, n]`, in the order of the paths."""
        for block, (name, writer) in zip(stems, self._writers.items()):
            with self._writing(self.paths[name]):
                writer.write(block)

    def finish(self, check: Callable[[], None]) -> dict[str, StemFile]:
        """Encode what is left and let the files appear; what `check` raises ends that."""
        for name, writer in self._writers.items():
            with self._writing(self.paths[name]):
                writer.flush()
        self._choose_divisors()
        with worker_pool(min(len(self._writers), os.cpu_count() or 1)) as pool:
            encoded = [pool.submit(writer.encode, check) for writer in self._writers.values()]
        for name, future in zip(self._writers, encoded):
            with self._writing(self.paths[name]):
                future.result()
        for name, writer in self._writers.items():
            with self._writing(self.paths[name]):
                _publish(writer.file, self.paths[name])
        return {
            name: StemFile(self.paths[name], writer.peak, 1 / writer.divisor)
            for name, writer in self._writers.items()
        }

    def _choose_divisors(self) -> None:
        clip, writers = self.target.output.clip, self._writers.values()
        if clip in RESCALING:
            loudest = max(writer.peak for writer in writers)
            for writer in writers:
                writer.divisor = rescale_divisor(loudest if clip == "rescale-all" else writer.peak)

    def discard(self) -> None:
        """Remove what has been written of the track."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # of a full disk, when the rest is written out
                writer.close()
            writer.file.unlink(missing_ok=True)


def _publish(file: Path, path: Place) -> None:
    """Give `file`, which is whole, its name, or copy it to a store or to standard output."""
    if isinstance(path, Url):
        path.publish(file)
        file.unlink()
    elif path == PIPE:
        with file.open("rb") as source:
            shutil.copyfileobj(source, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        file.replace(path)
