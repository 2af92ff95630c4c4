"""Which tracks are meant, and which files their stems become."""

from __future__ import annotations

import glob
import io
import itertools
import os
import posixpath
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from ..errors import LoadAudioError, OptionError
from .console import standard_input
from .folders import Folders
from .output import PIPE, Output
from .storage import Place, Url, place

# Suffixes by which a track is found in a folder; a file that is named itself may have any.
SUFFIXES = frozenset(
    ".3gp .aac .ac3 .aif .aifc .aiff .alac .amr .ape .asf .au .avi .caf .dsf .flac .m4a .m4b .m4v"
    " .mka .mkv .mov .mp2 .mp3 .mp4 .mpc .mpeg .mpg .oga .ogg .ogv .opus .ra .snd .tta .w64 .wav"
    " .wave .webm .wma .wmv .wv".split()
)


@dataclass(frozen=True)
class Job:
    """A track, and the files that its stems become, by `naming`."""

    track: Place
    naming: Callable[[Place], Mapping[str, Place]]
    paging: Callable[[Place], Place | None] = lambda track: None

    @property
    def page(self) -> Place | None:
        """The page to listen with, if there is to be one."""
        return self.paging(self.track)

    @property
    def files(self) -> Iterable[Place]:
        """All files of the track, each once."""
        page = {} if self.page is None else {self.page: None}
        return {**dict.fromkeys(self.paths.values()), **page}

    @property
    def paths(self) -> Mapping[str, Place]:
        """The file of each stem; of a million tracks they would not fit into memory."""
        return self.naming(self.track)

    @property
    def is_done(self) -> bool:
        """Whether all of its stems are there; they appear when they are whole."""
        return all(path.is_file() for path in self.files)


def find_tracks(
    names: Iterable[Place], *, leave_out: Place | None = None, expand: bool = os.name == "nt"
) -> Iterator[Place]:
    """The tracks that `names` mean: files, all audio files below a folder, "-" once.

    With `expand`, a name that is no file may be a pattern, for shells that leave that to programs;
    a URL may be one in any case.
    What is in the folder `leave_out`, and hidden files, are found only if named themselves. A file
    that is named twice comes once. A folder without audio stands for itself, and is no track.
    """
    seen: set[str] = set()
    for name in names:
        for track in _expanded(name, leave_out, expand):
            if _identity(track) not in seen:
                seen.add(_identity(track))
                yield track


def read_list(source: Place) -> Iterator[Place]:
    """The paths and URLs in a text file, or "-" for standard input: one a line, `#` for comments.

    Raises `LoadAudioError` if it cannot be read.
    """
    try:
        with _open(source) as file:
            for line in io.TextIOWrapper(file, "utf-8-sig", "surrogateescape"):
                name = line.strip()
                if name and not name.startswith("#"):
                    yield place(name)
    except OSError as exc:
        raise LoadAudioError(f"{source}: cannot be read ({exc.strerror or exc})") from exc


def _open(source: Place) -> AbstractContextManager[IO[bytes]]:
    if source == PIPE:
        return nullcontext(standard_input())
    return source.open() if isinstance(source, Url) else source.open("rb")


def _expanded(name: Place, leave_out: Place | None, expand: bool) -> Iterable[Place]:
    if isinstance(name, Url):
        return _expanded_url(name, leave_out)
    if name.is_dir():
        return _below(name, leave_out)
    if expand and name != PIPE and not name.exists() and glob.has_magic(str(name)):
        matches = map(Path, sorted(glob.glob(str(name), recursive=True)))  # noqa: PTH207
        return [track for match in matches for track in _expanded(match, leave_out, False)]
    return [name]


def _expanded_url(url: Url, leave_out: Place | None) -> Iterable[Place]:
    """As for a path; what looks like a file is one, so that no store is asked about each track."""
    pattern = glob.has_magic(url.text)
    if url.is_web or (_is_audio(url.name) and not pattern) or url.is_file():
        return [url]
    if pattern:
        found = [track for match in url.matches() for track in _expanded_url(match, leave_out)]
    else:
        found = [file for file in url.files() if _is_track_below(file, url, leave_out)]
    return found or [url]


def _is_track_below(file: Url, folder: Url, leave_out: Place | None) -> bool:
    hidden = "/." in file.text.removeprefix(folder.text)
    return _is_audio(file.name) and not hidden and not file.text.startswith(f"{leave_out}/")


def _is_audio(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def _below(folder: Path, leave_out: Place | None) -> list[Path]:
    apart = None if leave_out is None else _identity(leave_out)
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and _identity(Path(parent, name)) != apart
        )
        found += [
            Path(parent, name)
            for name in sorted(files)
            if not name.startswith(".") and _is_audio(name)
        ]
    return found or [folder]


def plan_jobs(
    tracks: Iterable[Place],
    output: Output,
    model: str,
    sources: Sequence[str],
    folders: Folders | None = None,
) -> list[Job]:
    """The jobs for `tracks`, of whose stems none is in another's way.

    `folders` are those below which the tracks were found.

    Raises `OptionError` if two stems would be one file, or a stem would replace a track.
    """
    below = (folders or Folders()).of
    naming = partial(output.paths, model=model, stems=output.stems(sources), folder_of=below)
    paging = partial(output.page, model=model, folder_of=below)
    jobs = [Job(track, naming, paging) for track in tracks]
    if output.is_pipe:
        if len(jobs) > 1:
            raise OptionError(f"standard output takes one track, not {len(jobs)}")
        _ = [job.paths for job in jobs]  # one stem
    else:
        _check_apart(jobs)
    return jobs


def _check_apart(jobs: Sequence[Job]) -> None:
    inputs = {_identity(job.track) for job in jobs}
    taken: set[int] = set()  # hashes: of a million tracks, the names would be gigabytes
    for job in jobs:
        for path in job.files:
            name = _identity(path)
            if name in inputs:
                raise OptionError(f"{path}, a stem, would replace a track: use another -o")
            if hash(name) in taken:
                _check_owner(jobs, job, path)
            taken.add(hash(name))


def _check_owner(jobs: Sequence[Job], job: Job, path: Place) -> None:
    """Raise `OptionError` if a job before `job` has the stem `path`, too."""
    for other in itertools.takewhile(lambda other: other is not job, jobs):
        if _identity(path) in map(_identity, other.files):
            raise OptionError(
                f"{other.track} and {job.track} would both become {path}: tell them apart with"
                " {folder}, {parent} or {trackext} in --filename"
            )


def _identity(path: Place) -> str:
    """The same for all names of a file, also where capitals do not count."""
    if isinstance(path, Url):
        return path.text
    name = os.path.normcase(os.path.realpath(path)) if path != PIPE else str(path)
    return name.casefold() if sys.platform == "darwin" else name
