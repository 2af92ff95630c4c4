"""Tags and covers from tracks of every format into stems of every format, read back by mutagen."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import mutagen
import pytest
from mutagen import flac, id3, mp4

from demucs_infer.audio import AudioFile, save_audio
from demucs_infer.write.formats import FORMATS

from .helpers import Command, noise, probe

TAGS = {
    "bpm": "128",
    "initialkey": "8A",
    "publisher": "A label",
    "isrc": "USABC1234567",
    "comment": "A comment",
    "lyrics": "One line\nand another",
    "subtitle": "Club mix",
    "remixer": "Sömebody",
}
FRAMES = dict(zip(TAGS, "TBPM TKEY TPUB TSRC COMM::XXX USLT::XXX TIT3 TPE4".split()))
COMMENTS = dict(zip(TAGS, "bpm initialkey label isrc comment lyrics subtitle remixer".split()))
ITEMS = {name: f"----:com.apple.iTunes:{text.upper()}" for name, text in COMMENTS.items()} | {
    "bpm": "tmpo",
    "initialkey": "----:com.apple.iTunes:initialkey",
    "comment": "\xa9cmt",
    "lyrics": "\xa9lyr",
}
BACK, FRONT = (b"\x89PNG\r\n\x1a\n" + side.ljust(100) for side in (b"back", b"front"))


def tagged(path: Path) -> Path:
    """Write a track with `TAGS` and two pictures as other programs write it."""
    suffix = path.suffix[1:]
    save_audio(noise(2, 12_000), path, 8000)
    song: Any = mutagen.File(path)
    if suffix in ("mp3", "wav"):
        song.add_tags()
        for name, value in TAGS.items():
            frame_name, _, _ = FRAMES[name].partition(":")
            more = {"lang": "eng"} if ":" in FRAMES[name] else {}
            song.tags.add(getattr(id3, frame_name)(encoding=3, text=value, **more))
        song.tags.add(id3.TXXX(encoding=3, desc="Energy Level", text="7"))
        for kind, data in ((4, BACK), (3, FRONT)):
            song.tags.add(id3.APIC(mime="image/png", type=kind, desc=str(kind), data=data))
    elif suffix == "m4a":
        for name, value in TAGS.items():
            text = value.encode() if ITEMS[name].startswith("----") else value
            song[ITEMS[name]] = [128] if name == "bpm" else [text]
        song["covr"] = [mp4.MP4Cover(FRONT, mp4.MP4Cover.FORMAT_PNG)]
    else:
        song.update({COMMENTS[name]: value for name, value in TAGS.items()})
        for kind, data in ((4, BACK), (3, FRONT)):
            picture = flac.Picture()
            picture.type, picture.mime, picture.data = kind, "image/png", data
            if suffix == "flac":
                song.add_picture(picture)
            else:
                block = base64.b64encode(picture.write()).decode()
                song["metadata_block_picture"] = [*song.get("metadata_block_picture", []), block]
    song.save()
    return path


def read_back(path: Path) -> tuple[dict[str, str], bytes | None]:
    """Return `TAGS` and the cover as mutagen reads them from a file."""
    song: Any = mutagen.File(path)
    if path.suffix in (".mp3", ".wav"):
        tags = {name: str(song.tags[frame]) for name, frame in FRAMES.items()}
        covers = [picture.data for picture in song.tags.getall("APIC")]
    elif path.suffix in (".m4a", ".mp4"):
        tags = {name: song[item][0] for name, item in ITEMS.items()}
        covers = list(map(bytes, song.get("covr", [])))
    else:
        tags = {name: song[comment][0] for name, comment in COMMENTS.items()}
        blocks = map(base64.b64decode, song.get("metadata_block_picture", []))
        covers = [p.data for p in [*getattr(song, "pictures", []), *map(flac.Picture, blocks)]]
    texts = {n: text.decode() if isinstance(text, bytes) else str(text) for n, text in tags.items()}
    return texts, covers[0] if covers else None


@pytest.mark.parametrize("format", [*FORMATS, "stem.mp4", "mka"])
def test_tags_and_cover_reach_every_format(format: str, command: Command, tmp_path: Path) -> None:
    tagged(tmp_path / "song.mp3")
    options = ["--format", format, "--shifts", 0, "--stems", "bass", "--filename", "a.{ext}"]
    assert command(*options, "song.mp3").returncode == 0
    path = tmp_path / f"separated/tiny/a.{format}"
    if format == "mka":
        found = probe(path, "-show_format", "-show_streams")
        names = "BPM INITIAL_KEY LABEL ISRC COMMENT LYRICS SUBTITLE REMIXED_BY".split()
        assert [found["format"]["tags"][name] for name in names] == list(TAGS.values())
    else:
        tags, cover = read_back(path)
        assert tags == TAGS
        assert cover == (None if format == "wav" else FRONT)
    if format == "mp3":
        assert str(mutagen.File(path).tags["TXXX:Energy Level"]) == "7"
    own = AudioFile(path)
    assert own.tags.items() >= TAGS.items()
    assert own.tags["title"] == ("song" if len(own) > 1 else "song (bass)")
    assert own.duration == pytest.approx(1.5, abs=0.2)


@pytest.mark.parametrize("format", ["flac", "opus", "m4a", "wav"])
def test_tags_are_read_from_every_format(format: str, command: Command, tmp_path: Path) -> None:
    tagged(tmp_path / f"song.{format}")
    command("--mp3", "--shifts", 0, "--stems", "bass", f"song.{format}")
    tags, cover = read_back(tmp_path / "separated/tiny/song/bass.mp3")
    assert tags == TAGS
    assert cover == FRONT


@pytest.mark.parametrize("magic", [b"RIFF0000WEBP", b"GIF89a", b"BM"])
def test_covers_of_other_kinds_travel_or_are_mentioned(
    magic: bytes, command: Command, tmp_path: Path
) -> None:
    tagged(tmp_path / "song.mp3")
    song: Any = mutagen.File(tmp_path / "song.mp3")
    song.tags.delall("APIC")
    kind = {b"R": "webp", b"G": "gif", b"B": "bmp"}[magic[:1]]
    cover = magic.ljust(200, b"x")
    # A picture that would fit is not the cover.
    song.tags.add(id3.APIC(mime="image/png", type=4, data=BACK))
    song.tags.add(id3.APIC(mime=f"image/{kind}", type=3, data=cover))
    song.save()
    for format in ("flac", "m4a"):
        result = command("--format", format, "--shifts", 0, "--stems", "bass", "song.mp3")
        allowed = format == "flac" or kind == "bmp"
        path = tmp_path / f"separated/tiny/song/bass.{format}"
        assert read_back(path)[1] == (cover if allowed else None)
        assert (f"image/{kind}" in result.stderr) == (not allowed)
