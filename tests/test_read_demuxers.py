"""Files that name other files or the network: FFmpeg opens none of them."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest

from demucs_infer.audio import AudioFile, save_audio
from demucs_infer.errors import LoadAudioError
from demucs_infer.read.quirks import DEMUXERS

from .helpers import noise
from .tools.web import serving

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:2,\n{0}\n"
DASH = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
 profiles="urn:mpeg:dash:profile:isoff-main:2011" mediaPresentationDuration="PT2S"><Period>
<AdaptationSet contentType="audio" mimeType="audio/mp4"><Representation id="0" bandwidth="9999"
 mimeType="audio/mp4" codecs="mp4a.40.2"><BaseURL>{}</BaseURL></Representation></AdaptationSet>
</Period></MPD>"""
# Files of an attacker, with a place for the name of another user's file.
LISTS = {
    "hls": HLS + "#EXT-X-ENDLIST\n",
    "hls, a key": HLS.replace("#EXTINF:2,", '#EXT-X-KEY:METHOD=AES-128,URI="{0}"\n#EXTINF:2,'),
    "hls, other lists": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\n{}\n",
    "dash": DASH,
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    "real": "[Reference]\nRef1={}\n",
    "m3u": "{}\n",
    "ffmetadata": ";FFMETADATA1\ntitle={}\n",
    "sbagen": "# {}\ntone: 100+1/50\nNOW tone\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_open_no_other_file_and_no_connection(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "theirs" / "secret.mp3"
    secret.parent.mkdir()
    save_audio(noise(2, 44100), secret, 44100)
    with serving() as web:
        entries = [str(secret), f"file://{secret}", "theirs/secret.mp3", f"subfile:{secret}"]
        for name in ("list.m3u8", "song.mp3", "a%d.png", "song"):
            for entry in (*entries, f"{web.url}/live.ts"):
                path = tmp_path / name
                path.write_text(LISTS[kind].format(entry))
                with pytest.raises(LoadAudioError, match="cannot be decoded as audio"):
                    AudioFile(path).read()
        assert not web.paths


@pytest.mark.parametrize(
    "name",
    [
        "concat:a.mp3|b.mp3",
        "http:a.mp3",
        "%d.mp3",
        "-i.mp3",
        "a\nb.mp3",
        "caf\udce9 \N{GRINNING FACE}.mp3",
    ],
)
def test_names_of_files_are_not_interpreted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_audio(noise(2, 4410), "a.mp3", 44100)
    try:
        Path("a.mp3").rename(name)
    except OSError:
        pytest.skip("this file system has no such names")
    assert AudioFile(name).read(streams=0).shape[1] == 4410


def test_readers_of_the_table_exist() -> None:
    known = {name for names in av.formats_available for name in names.split(",")}
    assert set(DEMUXERS) <= known


def movie_with_its_sound_in(other: Path, path: Path) -> None:
    """A QuickTime file whose only track is in `other`, by name and by an alias with its path."""
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("pcm_s16le", rate=44100)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(np.ones((1, 8820), np.int16), "s16", "stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    here = bytes.fromhex("0000000c75726c2000000001")  # "url ": the samples are in this file
    movie = path.read_bytes()
    assert movie.count(here) == 1
    path.write_bytes(_grown(movie, movie.index(here), len(here), _alias(other)))


def _alias(path: Path) -> bytes:
    """A data reference of kind `alis`, as QuickTime's writers make it."""
    name, text = path.name.encode(), str(path).encode()
    body = bytes(4) + bytes(10) + bytes([4]) + b"disk".ljust(27, b"\0") + bytes(12)
    body += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1)
    body += bytes(16) + struct.pack(">hH", 2, len(text)) + text + bytes(len(text) % 2)
    body += struct.pack(">hH", -1, 0)
    return struct.pack(">I", 8 + len(body)) + b"alis" + body


def _grown(movie: bytes, at: int, length: int, box: bytes) -> bytes:
    """`movie` with `box` in place of `length` bytes; the boxes around it grow, too."""
    data = bytearray(movie[:at] + box + movie[at + length :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = movie.rindex(name, 0, at) - 4
        size = int.from_bytes(movie[place : place + 4], "big") + len(box) - length
        data[place : place + 4] = size.to_bytes(4, "big")
    return bytes(data)


def test_movie_whose_sound_is_in_another_file_is_refused(tmp_path: Path) -> None:
    wav = tmp_path / "secret.wav"  # FFmpeg looks for it beside the movie
    save_audio(noise(2, 44100), wav, 44100)
    path = tmp_path / "movie.mov"
    movie_with_its_sound_in(wav, path)
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(path), options=options) as container:  # so it is an attack
        theirs = next(container.decode(audio=0)).to_ndarray()
    assert len(np.unique(theirs)) > 1000
    with pytest.raises(LoadAudioError, match="no audio samples"):
        AudioFile(path).read()
