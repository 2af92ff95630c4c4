"""Videos with a stem as their sound: the streams that come back, and when they are shown."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demucs_infer.api import Separator
from demucs_infer.audio import AudioFile, save_audio
from demucs_infer.errors import OptionError
from demucs_infer.write.metadata import EVERY_COVER, read_cover
from demucs_infer.write.output import Output

from .helpers import Command, assert_one_line, ffmpeg, lag, noise, probe, sound, video

ALL = "all=drums+bass+other+vocals"
PNG = ("-f", "lavfi", "-i", "color=red:size=8x8", "-frames:v", 1)
PICTURE = ("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=25:duration=3")
SUBTITLES = "1\n00:00:00,500 --> 00:00:01,500\nHello\n\n2\n00:00:01,600 --> 00:00:02,500\nBye\n"
CHAPTERS = "".join(
    f"[CHAPTER]\nTIMEBASE=1/1000\nSTART={start}\nEND={end}\ntitle={title}\n"
    for start, end, title in ((0, 1200, "One"), (1200, 3000, "Two\x1b[31m"))
)


def image_subtitle() -> bytes:
    """Return a PGS file that shows a rectangle from 0.5 s to 1.5 s."""

    def segment(time: float, kind: int, content: bytes = b"") -> bytes:
        return b"PG" + struct.pack(">IIBH", int(90_000 * time), 0, kind, len(content)) + content

    screen, window = struct.pack(">HHB", 96, 64, 16), struct.pack(">BBHHHH", 1, 0, 10, 40, 8, 4)
    pixels = (b"\1" * 8 + b"\0\0") * 4
    item = struct.pack(">HBB", 0, 0, 0xC0) + (len(pixels) + 4).to_bytes(3, "big")
    return b"".join(
        [
            segment(0.5, 0x16, screen + bytes([0, 0, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 10, 0, 40])),
            segment(0.5, 0x17, window),
            segment(0.5, 0x14, bytes([0, 0, 1, 235, 128, 128, 255])),
            segment(0.5, 0x15, item + struct.pack(">HH", 8, 4) + pixels),
            segment(0.5, 0x80),
            segment(1.5, 0x16, screen + bytes([0, 1, 0, 0, 0, 0])),
            segment(1.5, 0x17, window),
            segment(1.5, 0x80),
        ]
    )


def film(path: Path, name: str = "Seen") -> Path:
    """Make a film with all that a container holds.

    Its picture has B frames, is turned, and has a `name`. The first sound is late.
    """
    folder, text = path.parent, "srt" if path.suffix == ".mkv" else "mov_text"
    (folder / "film.srt").write_text(SUBTITLES)
    (folder / "film.sup").write_bytes(image_subtitle())
    (folder / "film.txt").write_text(f";FFMETADATA1\ntitle=A film\n{CHAPTERS}")
    ffmpeg("-y", *PNG, folder / "cover.png")
    streams, options = [*PICTURE, "-itsoffset", 0.75], list[object]()
    for seed, rate in ((1, 44_100), (2, 48_000)):
        sounds = f"anoisesrc=color=pink:sample_rate={rate}:duration=2.2:amplitude=0.3:seed={seed}"
        streams += ["-f", "lavfi", "-i", sounds]
    streams += ["-i", folder / "film.srt", "-f", "ffmetadata", "-i", folder / "film.txt"]
    maps = [0, 1, 2, 3]
    if path.suffix == ".mkv":
        cover = ["-attach", folder / "cover.png", "-metadata:s:t", "mimetype=image/png"]
        streams, maps = [*streams, "-i", folder / "film.sup"], [*maps, 5]
        options += ["-metadata:s:s:1", "language=spa", "-c:s:1", "copy", *cover]
    elif path.suffix == ".mp4":
        streams, maps = [*streams, "-i", folder / "cover.png"], [*maps, 5]
        options += ["-c:v:1", "copy", "-disposition:v:1", "attached_pic"]
    for stream, language in {"a:0": "eng", "a:1": "deu", "s:0": "fra"}.items():
        options += [f"-metadata:s:{stream}", f"language={language}"]
    named = ["-metadata:s:v:0", f"handler_name={name}", "-metadata:s:v:0", f"title={name}"]
    codecs = ["-c:v:0", "libx264", "-bf", 2, "-g", 12, "-c:a", "aac", "-ac", 2, "-c:s:0", text]
    mapped = [option for number in maps for option in ("-map", number)]
    whole = ["-map_metadata", 4, "-map_chapters", 4, *codecs, *options, *named]
    ffmpeg(*streams, *mapped, *whole, path)
    data = bytearray(path.read_bytes())
    if (at := data.find(b"tkhd")) >= 0:
        matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
        data[at + 44 : at + 80] = matrix
    path.write_bytes(data)
    return path


def split(path: Path, out: Path, **options: Any) -> Path:
    """Separate a video with the demo model, and return the one whose sound is all stems."""
    options = {"stems": [ALL], "filename": "{stem}.{ext}", **options}
    Separator("demo", device="cpu", shifts=0).separate_to_files(path, out, **options)
    return out / f"all.{options['format']}"


def about(path: Path) -> dict[str, Any]:
    """Return ffprobe's description of a film."""
    found = probe(path, "-show_streams", "-show_chapters", "-show_format")
    streams = [s for s in found["streams"] if not s["disposition"]["attached_pic"]]
    kinds: dict[str, list[Any]] = {"video": [], "audio": [], "subtitle": []}
    for stream in streams:
        kinds.setdefault(stream["codec_type"], []).append(stream)
    side = kinds["video"][0].get("side_data_list", [])
    return {
        "languages": {
            kind: [stream.get("tags", {}).get("language", "und") for stream in streams]
            for kind, streams in kinds.items()
        },
        "subtitles": [stream["codec_name"] for stream in kinds["subtitle"]],
        "played": [stream["disposition"]["default"] for stream in kinds["audio"]],
        "rotation": [data["rotation"] for data in side if "rotation" in data],
        "chapters": [
            (float(c["start_time"]), float(c["end_time"]), c["tags"]["title"])
            for c in found["chapters"]
        ],
        "names": kinds["video"][0].get("tags", {}),
        "title": found["format"]["tags"]["title"],
    }


def packets(path: Path) -> list[str]:
    """Return the digests of the picture's packets."""
    text = ffmpeg("-i", path, "-map", "0:V:0", "-c", "copy", "-f", "framemd5", "-").decode()
    return [line.split(",")[5].strip() for line in text.splitlines() if not line.startswith("#")]


def shown(path: Path) -> float:
    """Return the time of the first picture."""
    entries = ("-show_entries", "frame=pts_time", "-select_streams", "V:0")
    frames = probe(path, *entries, "-read_intervals", "%+#9")["frames"]
    return float(next(frame["pts_time"] for frame in frames if "pts_time" in frame))


def cues(path: Path) -> list[tuple[float, float]]:
    """Return times and durations of the first subtitles. MP4 has empty ones between."""
    entries = ("-show_entries", "packet=pts_time,duration_time,size", "-select_streams", "s:0")
    packets = [p for p in probe(path, *entries)["packets"] if int(p["size"]) > 2]
    return [(float(packet["pts_time"]), float(packet["duration_time"])) for packet in packets]


def placed(path: Path, stream: int) -> np.ndarray:
    """Return a sound at 44.1 kHz from the time on at which the first picture is shown."""
    filters = "aresample=44100:async=1:min_hard_comp=0.001:first_pts=0"
    command = ["-copyts", "-i", path, "-map", f"0:a:{stream}", "-af", filters, "-ac", 1]
    wave = np.frombuffer(ffmpeg(*command, "-f", "f32le", "-"), np.float32)
    return wave[round(shown(path) * 44_100) :]


@pytest.mark.parametrize(
    ("source", "format"),
    [
        ("mp4", "mkv"),
        ("mkv", "mov"),
        *(
            pytest.param(*pair.split(), marks=pytest.mark.slow)
            for pair in (
                "mov mp4",
                "mkv mkv",
                "mp4 mp4",
                "mov mov",
                "mp4 mov",
                "mkv mp4",
                "mov mkv",
            )
        ),
    ],
)
def test_film_comes_back_whole(
    source: str, format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = film(tmp_path / f"film.{source}")
    made = split(path, tmp_path, format=format, keep_audio=True)
    before, after = about(path), about(made)
    assert packets(made) == packets(path)
    sounds = before["languages"]["audio"]
    assert after["languages"]["audio"] == [sounds[0], *sounds]  # the stem, and those of the film
    assert after["played"] == [1, 0, 0]
    for stream, given in enumerate((0, 0, 1)):
        heard, wanted = placed(made, stream), placed(path, given)
        assert abs(lag(heard, wanted)) <= 44  # a millisecond
    is_image = source == "mkv" and format != "mkv"
    subtitles = before["languages"]["subtitle"]
    assert after["languages"]["subtitle"] == (subtitles[:1] if is_image else subtitles)
    text = "subrip" if format == "mkv" else "mov_text"
    assert after["subtitles"][0] == text
    for (time, seconds), wanted in zip(cues(made), cues(path), strict=True):
        assert (time - shown(made), seconds) == pytest.approx(
            (wanted[0] - shown(path), wanted[1]), abs=0.002
        )
    text = ffmpeg("-i", made, "-map", "0:s:0", "-f", "srt", "-")
    assert b"Hello" in text and b"Bye" in text
    assert [title for *_, title in after["chapters"]] == ["One", "Two[31m"]
    starts, given = ([c[0] for c in film["chapters"]] for film in (after, before))
    assert starts == pytest.approx(given, abs=0.03)  # the delay of an encoder
    assert after["rotation"] == before["rotation"]
    assert read_cover(AudioFile(made), EVERY_COVER) == read_cover(AudioFile(path), EVERY_COVER)
    assert after["title"] == "A film (all)"
    warned = "subtitles spa" in caplog.text
    assert warned == is_image


def test_warning_names_sounds_that_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = split(film(tmp_path / "film.mp4"), tmp_path, format="mp4")
    assert about(made)["languages"]["audio"] == ["eng"]
    assert "sound deu" in caplog.text and "--keep-audio" in caplog.text
    assert "eng" not in caplog.text  # replaced by the stem


@pytest.mark.parametrize(
    "format", ["mkv", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mp4", "mov"))]
)
def test_excerpt_has_the_subtitles_and_chapters_of_its_time(format: str, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4")
    made = split(path, tmp_path, format=format, keep_audio=True, start=0.4, duration=1.0)
    start = sound_start(path) + 0.4  # in the middle of the first subtitle and chapter
    (first, end, _), (middle, *_) = about(made)["chapters"]
    assert end == middle == pytest.approx(first + 1.2 - start, abs=0.03)
    heard = sound(made, 0)[0, round(44_100 * (first - sound_start(made))) :]
    assert abs(lag(heard, sound(path, 0)[0, 17_640 : 17_640 + len(heard)])) <= 1764  # a picture
    assert sound(made, 1).shape[-1] == pytest.approx(44_100, abs=2048)
    early, late = cues(made)
    assert early == pytest.approx((first, 1.5 - start), abs=0.03)
    assert late[0] == pytest.approx(first + 1.6 - start, abs=0.03)


@pytest.mark.parametrize(
    ("codec", "name", "format", "tag"),
    [
        ("prores_ks -profile:v 4", "clip.mov", "mov", "ap4h"),
        ("libx265 -tag:v hvc1 -x265-params log-level=none", "clip.mp4", "mp4", "hvc1"),
        ("libvpx -c:a libvorbis", "clip.webm", "mkv", None),
        ("prores_ks", "clip.mov", "mkv", None),
        ("dnxhd -profile:v dnxhr_hq -vf scale=1280:720", "clip.mov", "mov", "AVdn"),
        ("libtheora -c:a libvorbis", "clip.ogv", "mkv", None),
        ("ffv1", "clip.mkv", "mkv", None),
    ],
)
def test_picture_of_any_codec_keeps_its_packets(
    codec: str, name: str, format: str, tag: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    noises = ("-f", "lavfi", "-i", "anoisesrc=duration=1")
    ffmpeg(*PICTURE, *noises, "-t", 1, "-pix_fmt", "yuv422p", "-c:v", *codec.split(), path)
    made = split(path, tmp_path / "out", format=format)
    assert packets(made) == packets(path)
    (stream,) = probe(made, "-show_streams", "-select_streams", "v")["streams"]
    assert tag in (None, stream["codec_tag_string"])


def test_names_of_streams_are_cleaned(tmp_path: Path) -> None:
    made = split(film(tmp_path / "film.mp4", "x\x1b[31m"), tmp_path, format="mp4")
    assert about(made)["names"]["handler_name"] == "x[31m"
    made = split(film(tmp_path / "long.mkv", "x" * 30_000), tmp_path, format="mkv")
    assert "title" not in about(made)["names"]


def test_own_sound_is_kept_only_in_videos() -> None:
    with pytest.raises(OptionError, match=r"keep_audio.*WAV"):
        Output(keep_audio=True)


def pictures(path: Path) -> list[tuple[float, str]]:
    """Return time and digest of every picture that FFmpeg shows."""
    base = 1000
    shown = ["-fps_mode", "passthrough", "-enc_time_base", f"1:{base}", "-f", "framemd5", "-"]
    text = ffmpeg("-copyts", "-i", path, "-map", "0:v", *shown).decode()
    rows = [line.split(",") for line in text.splitlines() if not line.startswith("#")]
    return [(int(row[2]) / base, row[5].strip()) for row in rows]


def clicks(path: Path) -> np.ndarray:
    """Return the times of the clicks in seconds, on the clock of the file."""
    wave = np.abs(sound(path, 0)[0])
    (starts,) = np.nonzero(wave > 0.4 * wave.max())
    apart = starts[np.diff(starts, prepend=-9999) > 2000]
    return apart / 44_100 + sound_start(path)


def sound_start(path: Path) -> float:
    """Return the time of the first sample, on the clock of the file."""
    shown = ("-show_entries", "frame=pts_time", "-read_intervals", "%+#3")
    return float(probe(path, *shown, "-select_streams", "a:0")["frames"][0]["pts_time"])


@pytest.mark.parametrize(
    ("suffix", "sound_at", "picture_at"),
    [
        ("mp4", 0.75, 0),
        pytest.param("mkv", 0, 0.4, marks=pytest.mark.slow),
        pytest.param("avi", 0, 0, marks=pytest.mark.slow),
        pytest.param("ts", 0.75, 0, marks=pytest.mark.slow),
    ],
)
def test_video_keeps_its_pictures_and_their_distance_to_the_sound(
    suffix: str, sound_at: float, picture_at: float, tmp_path: Path
) -> None:
    path = video(tmp_path / f"clip.{suffix}", sound_at, picture_at)
    separator = Separator("demo", device="cpu", shifts=0)
    separator.separate_to_files(
        path, tmp_path / "out", format="mp4", stems=["all=drums+bass+other+vocals"]
    )
    made = tmp_path / "out/clip/all.mp4"
    before, after = pictures(path), pictures(made)
    assert [digest for _, digest in after] == [digest for _, digest in before]
    heard, given = clicks(made), clicks(path)
    apart = (heard - after[0][0]) - (given - before[0][0])
    assert len(heard) == len(given) == 8
    assert np.abs(apart).max() < 0.002


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.mp4", "libx264"),
        ("clip.ts", "libx264"),
        ("clip.vob", "mpeg2video"),
        pytest.param("clip.avi", "mpeg4", marks=pytest.mark.slow),
    ],
)
def test_excerpt_of_a_video_shows_no_picture_before_it(
    name: str, codec: str, tmp_path: Path
) -> None:
    """It begins in the middle of a group of pictures, and on a key frame that is hidden."""
    path = video(tmp_path / name, 0.5, codec=codec)
    separator = Separator("demo", device="cpu", shifts=0)
    whole = "all=drums+bass+other+vocals"
    result = separator.separate_to_files(
        path, tmp_path / "out", format="mp4", stems=[whole], start=0.54, duration=1.0
    )
    assert result.seconds == 1.0
    made = tmp_path / "out/clip/all.mp4"
    before, after = pictures(path), pictures(made)
    start = sound_start(path) + 0.54
    first = max(time for time, _ in before if time <= start)
    assert first < start  # the sound begins while a picture is shown
    packets = probe(made, "-select_streams", "v", "-show_entries", "packet=flags")["packets"]
    assert packets[0]["flags"].startswith("K")
    wanted = [(time - first, digest) for time, digest in before if first <= time < start + 1]
    assert [digest for _, digest in after[: len(wanted)]] == [digest for _, digest in wanted]
    assert [time for time, _ in after[: len(wanted)]] == pytest.approx([t for t, _ in wanted])
    expected = [time - first for time in clicks(path) if start <= time < start + 1]
    assert clicks(made)[:3] == pytest.approx(expected[:3], abs=0.001)


def test_tracks_without_a_picture_for_a_video_fail(command: Command, tmp_path: Path) -> None:
    song = tmp_path / "song.m4a"
    save_audio(0.3 * noise(2, 8000), song, 8000)
    wmv = video(tmp_path / "clip.avi", codec="wmv2")
    for path, format, words in (
        (song, "mp4", ["no picture", "m4a"]),
        (wmv, "mp4", ["wmv2", "MP4"]),
        (video(tmp_path / "clip.mkv", codec="vp8"), "mov", ["vp8", "MOV", "mkv"]),
    ):
        result = command("--format", format, "--stems", "vocals", path)
        assert result.returncode == 1
        assert_one_line(result, path.name, *words)
