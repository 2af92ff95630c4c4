"""Find tracks, plan the files of their stems, and describe the results.

Importing this needs no PyTorch.
"""

from __future__ import annotations

import codecs
import glob
import io
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import __version__
from ..errors import DemucsInferError, LoadAudioError, OptionError
from ..log import logger
from ..storage.locations import (
    Identities,
    Location,
    Named,
    Url,
    check,
    exists,
    full_text,
    location,
    reading,
)
from ..write.output import PIPE, Output
from .console import standard_input
from .folders import Folders

if TYPE_CHECKING:
    from ..read.packets import Damage
    from ..write.writer import StemFile

# Suffixes by which a track is found in a folder; a file that is named itself may have any.
SUFFIXES = frozenset(
    ".3gp .aac .ac3 .aif .aifc .aiff .alac .amr .ape .asf .au .avi .caf .dsf .dts .eac3 .flac .flv"
    " .m2ts .m4a .m4b .m4p .m4v .mka .mkv .mov .mp2 .mp3 .mp4 .mpc .mpeg .mpg .oga .ogg .ogv .opus"
    " .ra .snd .spx .ts .tta .vob .voc .w64 .wav .wave .webm .wma .wmv .wv".split()
)


MAX_LEVELS = 100  # of folders in each other
MAX_LINE = 2**16  # characters of a line in a list: longer ones are not names
ENCODINGS = {  # by the mark at the start of a list; longer ones first, as they begin alike
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # PowerShell writes this one
    codecs.BOM_UTF16_BE: "utf-16",
}

Report = Callable[[Location, DemucsInferError], None]


@dataclass(frozen=True)
class TrackResult:
    """The result of a track.

    `seconds` is the duration of the audio and `elapsed` the time that the work took. `offsets` are
    the samples that were drawn for the shifts, model by model. `damaged` describes the parts of the
    track that could not be read, `error` made it fail, and `player` the page to listen
    with.
    """

    input: Location
    model: str
    stems: Mapping[str, StemFile] = field(default_factory=dict)
    seconds: float | None = None
    elapsed: float | None = None
    offsets: Sequence[int] = ()
    skipped: bool = False
    damaged: Damage | None = None
    error: Exception | None = None
    player: Location | None = None
    version: str = __version__

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        message = None if self.error is None else str(self.error)
        if self.error is not None and not isinstance(self.error, DemucsInferError):
            message = f"{self.input}: {type(self.error).__name__}: {self.error}"
        changed = {
            "input": full_text(self.input),
            "stems": {
                name: {"path": full_text(stem.path), "peak": stem.peak, "gain": stem.gain}
                for name, stem in self.stems.items()
            },
            "offsets": list(self.offsets),
            "damaged": None if self.damaged is None else asdict(self.damaged),
            "error": message,
            "player": None if self.player is None else full_text(self.player),
        }
        return {**vars(self), **changed}


@dataclass(frozen=True, slots=True)
class TrackJob:
    """A track, and the files that its stems become in `output`.

    The paths are made when they are asked for: those of a million tracks would not fit into memory.
    """

    track: Location
    output: Output
    model: str
    stems: Sequence[str]
    folders: Folders

    @property
    def paths(self) -> Mapping[str, Location]:
        """The file of each stem."""
        return self.output.paths(self.track, self.model, self.stems, self._folder)

    @property
    def page(self) -> Location | None:
        """The page to listen with, if there is to be one."""
        return self.output.page(self.track, self.model, self._folder)

    @property
    def _folder(self) -> str:
        # Looking a folder up takes long for a million tracks.
        return self.folders.of(self.track) if "{folder" in self.output.filename else ""

    @property
    def files(self) -> Iterable[Location]:
        """All files of the track, each once."""
        return dict.fromkeys(filter(None, [*self.paths.values(), self.page]))

    @property
    def is_done(self) -> bool:
        """True if all of its files are there; they appear when they are whole."""
        return all(map(self.output.is_written, self.files))


def _raise(name: Location, error: DemucsInferError) -> None:
    raise error


def find_tracks(
    names: Iterable[Named],
    *,
    leave_out: Named | None = None,
    expand: bool = os.name == "nt",
    report: Report = _raise,
    seen: set[int] | None = None,
) -> Iterator[Location]:
    """Yield the tracks that `names` stand for: files, all audio files below a folder, "-" once.

    With `expand`, a name without a file may be a pattern, for shells that leave that to programs;
    a URL may always be one. Hidden files, and those in the folder `leave_out`, are found only if
    they are named themselves. A file that is named twice comes once. Hashes of the identities of
    all tracks are added to `seen`: of a million tracks, the names would be gigabytes.

    Missing files, folders without audio and other errors are told to `report`, which raises them by
    default. The other names go on.
    """
    identities, seen = Identities(), set() if seen is None else seen
    apart = None if leave_out is None else identities.of(location(leave_out))
    search = _Search(apart, expand, report, identities)
    for name in names:
        for track in search.tracks(location(name)):
            identity = hash(identities.of(track))
            if identity not in seen:
                seen.add(identity)
                yield track


def read_list(source: Named, report: Report = _raise) -> Iterator[Location]:
    """Yield the paths and URLs in a text file, or "-" for standard input: one a line.

    Lines that begin with `#` are comments. The text is UTF-8, unless its byte-order mark differs.
    Errors of the file and of lines that are not names are told to `report`.
    """
    listed = location(source)
    try:
        with nullcontext(standard_input()) if listed == PIPE else reading(listed) as file:
            buffered = io.BufferedReader(cast(Any, file))
            head = buffered.peek(4)
            found = (name for mark, name in ENCODINGS.items() if head.startswith(mark))
            encoding = next(found, "utf-8-sig")
            errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
            text, number = io.TextIOWrapper(buffered, encoding, errors), 0
            while line := text.readline(MAX_LINE + 1):
                number += 1
                name = (rest := line).strip()
                while len(rest) > MAX_LINE and not rest.endswith("\n"):
                    rest = text.readline(MAX_LINE + 1)
                if len(line) > MAX_LINE or "\0" in name:
                    fault = "is too long" if len(line) > MAX_LINE else "has a NUL"
                    report(listed, LoadAudioError(f"{listed}: line {number} {fault}, not a name"))
                elif name and not name.startswith("#"):
                    yield location(name)
            # The file stays open: it may be standard input.
            text.detach()
            buffered.detach()
    except DemucsInferError as exc:
        report(listed, exc)
    except OSError as exc:
        report(listed, _unreadable(listed, exc))


@dataclass(frozen=True)
class _Search:
    """A search for tracks that leaves out the folder of the identity `apart`."""

    apart: str | None
    expand: bool
    report: Report
    identities: Identities

    def tracks(self, name: Location) -> Iterable[Location]:
        """Return the tracks that a name stands for. Errors are reported."""
        try:
            check(name)
            return self._remote(name) if isinstance(name, Url) else self._local(name, self.expand)
        except DemucsInferError as exc:
            self.report(name, exc)
        except OSError as exc:
            self.report(name, _unreadable(name, exc))
        return []

    def _local(self, name: Path, expand: bool) -> Iterable[Path]:
        if name == PIPE:
            return [name]
        try:
            is_folder = stat.S_ISDIR(name.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError) as exc:
            if expand and glob.has_magic(str(name)):
                names = sorted(glob.glob(str(name), recursive=True))  # noqa: PTH207
                matches = [path for path in map(Path, names) if _is_regular(path) or path.is_dir()]
                if found := [track for match in matches for track in self._local(match, False)]:
                    return found
            raise LoadAudioError(f"{name}: no such file") from exc
        except OSError:  # The decoder tells the reason.
            is_folder = False
        return self._below(name) if is_folder else [name]

    def _remote(self, url: Url) -> Iterable[Location]:
        """Find the tracks of a URL. A store is not asked about a name that looks like a file's."""
        pattern = glob.has_magic(url.text)
        if url.is_web or (_is_audio(url.name) and not pattern):
            return [url]
        if url.scheme == "file":
            return [
                Url(f"file://{path}") for path in self._local(Path(url.rest).absolute(), pattern)
            ]
        if exists(url):
            return [url]
        if pattern:
            found = [track for match in url.find(True) for track in self._remote(match)]
        else:
            files = url.find(False)
            visible = [f for f in files if "/." not in f.text.removeprefix(url.text)]
            left_out = f"{self.apart}/"
            found = [f for f in visible if _is_audio(f.name) and not f.text.startswith(left_out)]
            if files and not found:
                self.report(url, _without_audio(url, len(files)))
                return []
        return found or [url]

    def _below(self, folder: Path) -> list[Path]:
        """Find all tracks below a folder, through links that stay in it. Enter each folder once."""
        found, faults, others = list[Path](), list[OSError](), 0
        root = self.identities.of(folder)
        entered = {root, self.apart}

        def is_entered(path: Path) -> bool:
            identity = self.identities.of(path)
            if identity in entered or not self._is_within(path, root):
                return False
            entered.add(identity)
            return True

        for parent, folders, files in os.walk(folder, onerror=faults.append, followlinks=True):
            if folders and parent.count(os.sep) - str(folder).count(os.sep) >= MAX_LEVELS:
                logger.warning("%s: its folders are skipped, after %d levels", parent, MAX_LEVELS)
                folders.clear()
            visible = [name for name in sorted(folders) if not name.startswith(".")]
            folders[:] = [name for name in visible if is_entered(Path(parent, name))]
            for name in sorted(files):
                path = Path(parent, name)
                if not name.startswith(".") and _is_audio(name) and _is_regular(path):
                    found += [path] if self._is_within(path, root) else []
            others += len(files)
        for fault in faults:
            at = Path(fault.filename or folder)
            self.report(at, _unreadable(at, fault))
        if not found and not faults:
            self.report(folder, _without_audio(folder, others))
        return found

    def _is_within(self, path: Path, root: str) -> bool:
        """Return False, with a warning, for a link that leads out of the folder that was named."""
        if path.is_symlink():
            target = self.identities.of(path)
            if not target.startswith(root.rstrip(os.sep) + os.sep) and target != root:
                logger.warning("%s: is skipped, as it links out of the folder", path)
                return False
        return True


def _is_regular(path: Path) -> bool:
    """Return False for a missing file, a named pipe, which would block, and an endless device."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError:  # Reading it tells the reason.
        return True


def _without_audio(folder: Location, others: int) -> LoadAudioError:
    passed = f"{others} other {'file' if others == 1 else 'files'} passed over"
    return LoadAudioError(f"{folder}: no audio files in {folder} ({passed}). Name a file itself")


def _unreadable(name: Location, exc: OSError) -> LoadAudioError:
    return LoadAudioError(f"{name}: cannot be read ({exc.strerror or exc})")


def _is_audio(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def plan_jobs(
    tracks: Iterable[Location],
    output: Output,
    model: str,
    sources: Sequence[str],
    folders: Folders | None = None,
    seen: set[int] | None = None,
) -> list[TrackJob]:
    """Return the jobs for `tracks`, whose stems do not collide.

    `folders` are those below which the tracks were found. `seen` has the hashes of their identities
    if they come from `find_tracks`.

    Raises `OptionError` if two stems would be one file, or a stem would replace a track.
    """
    names, folders, identities = output.stems(sources), folders or Folders(), Identities()
    jobs = [TrackJob(track, output, model, names, folders) for track in tracks]
    if seen is None:
        for job in jobs:
            check(job.track)
        seen = {hash(identities.of(job.track)) for job in jobs}
    taken: set[int] = set()
    for job in jobs:
        for path in job.files:
            identity = identities.of(path)
            if path == PIPE:
                continue
            if hash(identity) in seen:
                raise OptionError(f"{path}, a stem, would replace a track: use another -o")
            if hash(identity) in taken:
                other = next(j for j in jobs if identity in map(identities.of, j.files))
                if other is not job:
                    raise OptionError(
                        f"{other.track} and {job.track} would both become {path}: tell them apart"
                        " with {folder}, {parent} or {trackext} in --filename"
                    )
            taken.add(hash(identity))
    return jobs
