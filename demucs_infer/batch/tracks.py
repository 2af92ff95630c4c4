"""Which tracks are meant, and which files their stems become."""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import DemucsInferError, LoadAudioError, MissingDependencyError, OptionError
from ..io.folders import Folders
from ..log import logger
from ..storage.locations import (
    Identities,
    Location,
    Named,
    Url,
    check,
    check_target,
    exists,
    location,
    reading,
)
from ..write.output import PIPE, Output
from .console import standard_input

# Suffixes by which a track is found in a folder; a file that is named itself may have any.
SUFFIXES = frozenset(
    ".3gp .aac .ac3 .aif .aifc .aiff .alac .amr .ape .asf .au .avi .caf .dsf .dts .eac3 .flac .flv"
    " .m2ts .m4a .m4b .m4p .m4v .mka .mkv .mov .mp2 .mp3 .mp4 .mpc .mpeg .mpg .oga .ogg .ogv .opus"
    " .ra .snd .spx .ts .tta .vob .voc .w64 .wav .wave .webm .wma .wmv .wv".split()
)


MAX_LINE = 2**16  # characters of a line in a list: the rest is no name
ENCODINGS = {  # by what a list begins with; the longer ones first, as they begin alike
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # what PowerShell writes
    codecs.BOM_UTF16_BE: "utf-16",
}

Report = Callable[[Location, DemucsInferError], None]


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
        return self.output.paths(self.track, self.model, self.stems, self.folders.of)

    @property
    def page(self) -> Location | None:
        """The page to listen with, if there is to be one."""
        return self.output.page(self.track, self.model, self.folders.of)

    @property
    def files(self) -> Iterable[Location]:
        """All files of the track, each once."""
        page = {} if self.page is None else {self.page: None}
        return {**dict.fromkeys(self.paths.values()), **page}

    @property
    def is_done(self) -> bool:
        """True if all of its files are there; they appear when they are whole."""
        return all(map(self.output.is_written, self.files))

    def check_targets(self) -> None:
        """Raise `SaveAudioError` if a stem cannot have its name, before it is made."""
        for path in self.files:
            if path != PIPE:
                check_target(path)


def _raise(name: Location, error: DemucsInferError) -> None:
    raise error


def find_tracks(
    names: Iterable[Named],
    *,
    leave_out: Named | None = None,
    expand: bool = os.name == "nt",
    report: Report = _raise,
) -> Iterator[Location]:
    """The tracks that `names` mean: files, all audio files below a folder, "-" once.

    With `expand`, a name that is no file may be a pattern, for shells that leave that to programs;
    a URL may be one in any case.
    What is in the folder `leave_out`, and hidden files, are found only if named themselves. A file
    that is named twice comes once. A folder without audio is reported as an error.
    What goes wrong with a name is told to `report`, and the others go on; by default it is raised.
    """
    identities = Identities()
    apart = None if leave_out is None else identities.of(location(leave_out))
    search = _Search(apart, expand, report, identities)
    seen: set[int] = set()  # hashes: of a million tracks, the names would be gigabytes
    for name in names:
        for track in search.tracks(location(name)):
            identity = hash(identities.of(track))
            if identity not in seen:
                seen.add(identity)
                yield track


def read_list(source: Named, report: Report = _raise) -> Iterator[Location]:
    """The paths and URLs in a text file, or "-" for standard input: one a line, `#` for comments.

    The text is UTF-8, or what its byte-order mark says. What cannot be read is told to `report`:
    all of it, or a line that is no name.
    """
    listed = location(source)
    try:
        with _open(listed) as file:
            for number, line in enumerate(_lines(file), 1):
                name = line.strip()
                if len(line) > MAX_LINE or "\0" in name:
                    fault = "is too long" if len(line) > MAX_LINE else "has a NUL"
                    report(listed, LoadAudioError(f"{listed}: line {number} {fault}: no name"))
                elif name and not name.startswith("#"):
                    yield location(name)
    except (LoadAudioError, MissingDependencyError) as exc:
        report(listed, exc)
    except OSError as exc:
        reason = exc.strerror or exc
        report(listed, LoadAudioError(f"{listed}: cannot be read ({reason})"))


def _open(source: Location) -> AbstractContextManager[IO[bytes]]:
    if source == PIPE:
        return nullcontext(standard_input())
    return reading(source)


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Lines with their ends; of one that is too long, a character more than it may have."""
    head = file.read(4)
    found = (name for mark, name in ENCODINGS.items() if head.startswith(mark))
    encoding = next(found, "utf-8-sig")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    text = io.TextIOWrapper(io.BufferedReader(_Rest(head, file)), encoding, errors)
    while line := text.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith("\n"):
            line = text.readline(MAX_LINE + 1)


class _Rest(io.RawIOBase):
    """A stream of which the head has been read."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head or self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._head = b""
        return len(data)


@dataclass(frozen=True)
class _Search:
    """A search for tracks that leaves out the folder of the identity `apart`."""

    apart: str | None
    expand: bool
    report: Report
    identities: Identities

    def tracks(self, name: Location) -> Iterable[Location]:
        """The tracks that a name means; what goes wrong is reported."""
        try:
            _check_name(name)
            return self._remote(name) if isinstance(name, Url) else self._local(name, self.expand)
        except (LoadAudioError, MissingDependencyError) as exc:
            self.report(name, exc)
        except OSError as exc:
            self.report(name, _unreadable(name, exc))
        return []

    def _local(self, name: Path, expand: bool) -> Iterable[Path]:
        if name.is_dir():
            return self._below(name)
        if expand and name != PIPE and not name.exists() and glob.has_magic(str(name)):
            matches = map(Path, sorted(glob.glob(str(name), recursive=True)))  # noqa: PTH207
            return [track for match in matches for track in self._local(match, False)]
        return [name]

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
            found = [file for file in files if self._is_track_below(file, url)]
            if files and not found:
                self.report(url, _without_audio(url, len(files)))
                return []
        return found or [url]

    def _is_track_below(self, file: Url, folder: Url) -> bool:
        hidden = "/." in file.text.removeprefix(folder.text)
        return _is_audio(file.name) and not hidden and not file.text.startswith(f"{self.apart}/")

    def _below(self, folder: Path) -> list[Path]:
        """Find all tracks below a folder, through links that stay in it. Enter each folder once."""
        found, faults, others = list[Path](), list[OSError](), 0
        root = self.identities.of(folder)
        entered = {root}
        for parent, folders, files in os.walk(folder, onerror=faults.append, followlinks=True):
            paths = (Path(parent, name) for name in sorted(folders) if not name.startswith("."))
            folders[:] = [path.name for path in paths if self._enters(path, root, entered)]
            paths = (Path(parent, name) for name in sorted(files) if not name.startswith("."))
            # A named pipe would be waited for, and a device may be endless.
            audio = (path for path in paths if _is_audio(path.name) and _is_regular(path))
            found += [path for path in audio if self._is_within(path, root)]
            others += len(files)
        for fault in faults:
            at = Path(fault.filename or folder)
            self.report(at, _unreadable(at, fault))
        if not found and not faults:
            self.report(folder, _without_audio(folder, others))
        return found

    def _enters(self, path: Path, root: str, entered: set[str]) -> bool:
        identity = self.identities.of(path)
        if identity == self.apart or identity in entered or not self._is_within(path, root):
            return False
        entered.add(identity)
        return True

    def _is_within(self, path: Path, root: str) -> bool:
        """Return False, with a warning, for a link that leads out of the folder that was named."""
        if path.is_symlink():
            target = self.identities.of(path)
            if not target.startswith(root.rstrip(os.sep) + os.sep) and target != root:
                logger.warning("%s: is skipped, as it links out of the folder", path)
                return False
        return True


def _is_regular(path: Path) -> bool:
    """Return True for a file that has samples, or whose reading will say why it has none."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _check_name(name: Location) -> None:
    """Raise `LoadAudioError` for what no file can be called, or no address that may be opened."""
    try:
        check(name)
    except OptionError as exc:
        raise LoadAudioError(str(exc)) from exc


def _without_audio(folder: Location, others: int) -> LoadAudioError:
    passed = f"{others} other {'file' if others == 1 else 'files'} passed over"
    return LoadAudioError(f"{folder}: no audio files in {folder} ({passed}). Name a file itself")


def _unreadable(name: Location, exc: OSError) -> LoadAudioError:
    return LoadAudioError(f"{name}: cannot be read ({exc.strerror or exc})")


def _is_audio(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def plan_jobs(
    tracks: Iterable[Named],
    output: Output,
    model: str,
    sources: Sequence[str],
    folders: Folders | None = None,
) -> list[TrackJob]:
    """The jobs for `tracks`, of whose stems none is in another's way.

    `folders` are those below which the tracks were found.

    Raises `OptionError` if two stems would be one file, or a stem would replace a track.
    """
    names, folders = output.stems(sources), folders or Folders()
    jobs = [TrackJob(location(track), output, model, names, folders) for track in tracks]
    for job in jobs:
        _check_name(job.track)
    if output.is_pipe:
        if len(jobs) > 1:
            raise OptionError(f"standard output takes one track, not {len(jobs)}")
        _ = [job.paths for job in jobs]  # one stem
    else:
        _check_apart(jobs)
    return jobs


def _check_apart(jobs: Sequence[TrackJob]) -> None:
    identities = Identities()
    inputs = {hash(identities.of(job.track)) for job in jobs}
    taken: set[int] = set()
    for job in jobs:
        for path in job.files:
            identity = hash(identities.of(path))
            if identity in inputs:
                raise OptionError(f"{path}, a stem, would replace a track: use another -o")
            if identity in taken:
                _check_owner(jobs, job, path)
            taken.add(identity)


def _check_owner(jobs: Sequence[TrackJob], job: TrackJob, path: Location) -> None:
    """Raise `OptionError` if a job before `job` has the stem `path`, too."""
    identities = Identities()
    wanted = identities.of(path)
    for other in itertools.takewhile(lambda other: other is not job, jobs):
        if wanted in map(identities.of, other.files):
            raise OptionError(
                f"{other.track} and {job.track} would both become {path}: tell them apart with"
                " {folder}, {parent} or {trackext} in --filename"
            )
