"""Which tracks are meant, and which files their stems become."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import OptionError
from .output import PIPE, Output

# Suffixes by which a track is found in a folder; a file that is named itself may have any.
SUFFIXES = frozenset(
    ".3gp .aac .ac3 .aif .aifc .aiff .alac .amr .ape .asf .au .avi .caf .dsf .flac .m4a .m4b .m4v"
    " .mka .mkv .mov .mp2 .mp3 .mp4 .mpc .mpeg .mpg .oga .ogg .ogv .opus .ra .snd .tta .w64 .wav"
    " .wave .webm .wma .wmv .wv".split()
)


@dataclass(frozen=True)
class Job:
    """A track, and the files that its stems become."""

    track: Path
    paths: Mapping[str, Path]

    @property
    def is_done(self) -> bool:
        """Whether all of its stems are there; they appear when they are whole."""
        return all(path.is_file() for path in self.paths.values())


def find_tracks(
    names: Iterable[Path], *, leave_out: Path | None = None, expand: bool = os.name == "nt"
) -> Iterator[Path]:
    """The tracks that `names` mean: files, all audio files below a folder, "-" once.

    With `expand`, a name that is no file may be a pattern, for shells that leave that to programs.
    What is in the folder `leave_out`, and hidden files, are found only if named themselves. A file
    that is named twice comes once. A folder without audio stands for itself, and is no track.
    """
    seen: set[str] = set()
    for name in names:
        for track in _expanded(name, leave_out, expand):
            if _identity(track) not in seen:
                seen.add(_identity(track))
                yield track


def _expanded(name: Path, leave_out: Path | None, expand: bool) -> Iterable[Path]:
    if name.is_dir():
        return _below(name, leave_out)
    if expand and name != PIPE and not name.exists() and glob.has_magic(str(name)):
        matches = map(Path, sorted(glob.glob(str(name), recursive=True)))  # noqa: PTH207
        return [track for match in matches for track in _expanded(match, leave_out, False)]
    return [name]


def _below(folder: Path, leave_out: Path | None) -> list[Path]:
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
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return found or [folder]


def plan_jobs(
    tracks: Iterable[Path], output: Output, model: str, sources: Sequence[str]
) -> list[Job]:
    """The jobs for `tracks`, of whose stems none is in another's way.

    Raises `OptionError` if two stems would be one file, or a stem would replace a track.
    """
    tracks = list(tracks)
    stems = output.stems(sources)
    if output.is_pipe:
        if len(tracks) > 1:
            raise OptionError(f"standard output takes one track, not {len(tracks)}")
        return [Job(track, output.paths(track, model, stems)) for track in tracks]
    inputs = set(map(_identity, tracks))
    owners: dict[str, Path] = {}
    jobs = []
    for track in tracks:
        job = Job(track, output.paths(track, model, stems))
        for path in job.paths.values():
            place = _identity(path)
            if place in inputs:
                raise OptionError(f"{path}, a stem, would replace a track: use another -o")
            if place in owners:
                raise OptionError(
                    f"{owners[place]} and {track} would both become {path}: tell them apart with"
                    " {parent} or {trackext} in --filename"
                )
            owners[place] = track
        jobs.append(job)
    return jobs


def _identity(path: Path) -> str:
    """The same for all names of a file, also where capitals do not count."""
    name = os.path.normcase(os.path.realpath(path)) if path != PIPE else str(path)
    return name.casefold() if sys.platform == "darwin" else name
