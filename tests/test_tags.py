"""Tags from one file into another, through the decoder and the encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import mutagen
import pytest

from demucs_infer.audio import AudioFile, save_audio
from demucs_infer.tags import MAX_TAG, MAX_TAGS, clean_tags
from demucs_infer.write.encode import encoder
from demucs_infer.write.formats import FORMATS, find_format

from .helpers import noise

MUSIC = {"title": "Täst\n2", "artist": "A", "album": "B", "genre": "Jazz"}
OF_THE_FILE = {
    "R128_TRACK_GAIN": "-512",
    "r128_album_gain": "7",
    "REPLAYGAIN_TRACK_GAIN": "-3 dB",
    "iTunNORM": " 0001",
    "comment-iTunNORM": " 0001",
    "iTunSMPB": " 0000",
    "MP3GAIN_MINMAX": "1,2",
    "mp3gain_undo": "+1",
    "WAVEFORMATEXTENSIBLE_CHANNEL_MASK": "0x3F",
    "encoder": "LAME",
    "TLEN": "100",
}
WRONG = {"comment": "", "date": " \x00 ", "": "nameless", "lyrics": "x" * (MAX_TAG + 1)}


def test_tags_of_one_file_or_of_harmful_content_are_dropped() -> None:
    assert clean_tags({**OF_THE_FILE, **WRONG, **MUSIC}) == MUSIC
    assert clean_tags({"TITLE": "caf\udce9\x1b[1m\0\x9b"}) == {"title": "caf\ufffd[1m"}
    for name in ("lyrics-eng", "Lyrics-my note-XXX", "lyrics-"):  # as FFmpeg calls them
        assert clean_tags({"lyrics": "b", name: "a"}) == {"lyrics": "a"}
    old = {"TBP": "128", "TKE": "8A", "TPB": "c", "TRC": "d", "TT3": "e", "TP4": "f"}  # ID3v2.2
    assert list(clean_tags(old)) == "bpm initialkey publisher isrc subtitle remixer".split()
    assert len(clean_tags({str(n): "x" for n in range(MAX_TAGS + 1)})) == MAX_TAGS


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_written_with_clean_tags(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{format}"
    rate = find_format(format).samplerate(44_100)
    with path.open("w+b") as file:
        title = {"title": "caf\udce9"}
        sink = encoder(
            file, find_format(format), rate, 2, tags={**OF_THE_FILE, **WRONG, **MUSIC, **title}
        )
        sink.write([noise(2, 10_000)])
        sink.close()
    tags = AudioFile(path).tags
    assert (tags["title"], tags["artist"]) == ("caf\ufffd", "A")
    with av.open(str(path)) as container:
        written = {**container.metadata, **container.streams.audio[0].metadata}
    assert not {name.lower() for name in written} & (
        {name.lower() for name in OF_THE_FILE} - {"encoder"}
    )


def test_gains_of_a_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.opus"
    save_audio(noise(2, 48_000), path, 48_000)
    song: Any = mutagen.File(path)
    song.update({**OF_THE_FILE, **MUSIC})
    song.save()
    assert AudioFile(path).tags == MUSIC
