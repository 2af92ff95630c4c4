"""Files that name other files or the network: FFmpeg opens none of them."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from demucs_infer.audio import AudioFile, save_audio
from demucs_infer.errors import LoadAudioError
from demucs_infer.read.quirks import DEMUXERS

from .helpers import noise

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:2,\n{0}\n"
DASH = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
 profiles="urn:mpeg:dash:profile:isoff-main:2011" mediaPresentationDuration="PT2S"><Period>
<AdaptationSet contentType="audio" mimeType="audio/mp4"><Representation id="0" bandwidth="9999"
 mimeType="audio/mp4" codecs="mp4a.40.2"><BaseURL>{}</BaseURL></Representation></AdaptationSet>
</Period></MPD>"""
# What an attacker sends, with a place for the file that is somebody else's.
LISTS = {
    "hls": HLS + "#EXT-X-ENDLIST\n",
    "hls, live": HLS,
    "hls, a key": HLS.replace("#EXTINF:2,", '#EXT-X-KEY:METHOD=AES-128,URI="{0}"\n#EXTINF:2,'),
    "hls, a map": HLS.replace("#EXTINF:2,", '#EXT-X-MAP:URI="{0}"\n#EXTINF:2,'),
    "hls, other lists": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\n{}\n",
    "dash": DASH,
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    "real": "[Reference]\nRef1={}\n",
    "m3u": "{}\n",
    "pls": "[playlist]\nFile1={}\nNumberOfEntries=1\n",
    "asx": '<asx version="3"><entry><ref href="{}"/></entry></asx>',
    "xspf": '<playlist version="1"><trackList><track><location>{}</location></track>'
    "</trackList></playlist>",
    "smooth": '<SmoothStreamingMedia MajorVersion="2"><StreamIndex Type="audio" Url="{}"/>'
    "</SmoothStreamingMedia>",
    "ffmetadata": ";FFMETADATA1\ntitle={}\n",
    "sbagen": "# {}\ntone: 100+1/50\nNOW tone\n",
}
NAMES = ["list.m3u8", "song.mp3", "a%d.png", "song"]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Somebody else's sound."""
    path = tmp_path / "theirs" / "secret.mp3"
    path.parent.mkdir()
    save_audio(noise(2, 44100), path, 44100)
    return path


@pytest.fixture
def listener() -> Iterator[tuple[str, list[object]]]:
    """The address of a server that never answers, and who has asked it."""
    asked: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            try:
                while True:
                    asked.append(server.accept())
            except OSError:
                return

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/live.ts", asked
        server.shutdown(socket.SHUT_RDWR)


def entries(secret: Path) -> list[str]:
    return [str(secret), f"file://{secret}", f"theirs/{secret.name}", f"subfile:{secret}"]


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_gives_no_other_file_away(kind: str, secret: Path, tmp_path: Path) -> None:
    for name in NAMES:
        for entry in entries(secret):
            path = tmp_path / name
            path.write_text(LISTS[kind].format(entry))
            with pytest.raises(LoadAudioError, match="cannot be decoded as audio"):
                AudioFile(path).read()


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_opens_no_connection(
    kind: str, listener: tuple[str, list[object]], tmp_path: Path
) -> None:
    url, asked = listener
    for name in NAMES:
        path = tmp_path / name
        path.write_text(LISTS[kind].format(url))
        with pytest.raises(LoadAudioError, match="cannot be decoded as audio"):
            AudioFile(path).read()
    assert not asked


@pytest.mark.parametrize("name", ["concat:a.mp3|b.mp3", "http:a.mp3", "data:,a.mp3", "%d.mp3"])
def test_a_name_that_looks_like_a_protocol_is_a_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save_audio(noise(2, 4410), tmp_path / "a.mp3", 44100)
    path.write_bytes((tmp_path / "a.mp3").read_bytes())
    assert AudioFile(path).read(streams=0).shape[1] == 4410


def test_the_table_names_readers_that_there_are() -> None:
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


def test_a_movie_whose_sound_is_in_another_file(tmp_path: Path) -> None:
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
