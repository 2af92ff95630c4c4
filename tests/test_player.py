"""The page to listen with: its file, and what a browser makes of it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.api import Separator
from demucs_infer.errors import OptionError
from demucs_infer.write.output import Output
from demucs_infer.write.player import LONGEST
from demucs_infer.write.writer import Target, TrackWriter

from .helpers import SOURCES, Command, json_lines, lag
from .tools.browser import Listener, chromium
from .tools.synth import RATE, song

SECONDS = 4
GAIN = 0.6  # of the stems below, for a sum that needs no lowering
INJECTION = "</script><script>window.injected = 1</script><img src=x onerror='injected = 1'>@TRACK@"


@cache
def stems() -> dict[str, np.ndarray]:
    return {name: GAIN * stem for name, stem in song(5, SECONDS).items()}


def write(path: Path, parts: dict[str, np.ndarray], title: str, artist: str = "") -> Path:
    output = Output(path.parent / "out", player=True)
    progress: list[float] = []
    with output.workspace() as space:
        tags = {"title": title, "artist": artist}
        target = Target(output.file_format, "rescale", space, RATE, RATE, 2, "tiny", tags)
        paths = {name: path.with_name(f"{index}.wav") for index, name in enumerate(parts)}
        writer = TrackWriter(paths, target, path)
        for start in range(0, SECONDS * RATE, 70_001):
            blocks = [part[:, start : start + 70_001] for part in parts.values()]
            writer.write([torch.from_numpy(block.copy()) for block in blocks])
        writer.finish(progress.append)
        assert progress == sorted(progress)
        assert progress[-1] == 1
        assert [entry.name for entry in space.path.iterdir()] == ["demucs-infer.lock"]
    return path


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "player.html"
    return write(path, stems(), "A song", "Somebody")


@pytest.fixture
def listener(driver: Any, page: Path) -> Listener:
    return Listener(driver, page)


def track_of(page: Path) -> dict[str, Any]:
    """Return the JSON about the track that is in a page."""
    found = re.search(r'\{"title": [^}]*\}', page.read_text("utf-8"))
    assert found is not None
    return json.loads(found[0])


def test_command_writes_a_page_as_one_of_the_files_of_a_track(
    command: Command, track: Path, tmp_path: Path
) -> None:
    page = tmp_path / "separated/tiny/track/player.html"
    options = ["--player", "--json", track]
    (result,) = json_lines(command(*options, "--stems", "vocals,music=drums+bass+other"))
    assert tmp_path / result["player"] == page
    about = track_of(page)
    assert (about["title"], about["model"], about["stems"]) == (
        "track",
        "tiny",
        ["vocals", "music"],
    )
    options += ["--format", "stem.mp4", "--skip-existing"]
    stems = tmp_path / "separated/tiny/track.stem.mp4"
    for damaged, skipped in ((page, False), (None, True), (page, False), (stems, False)):
        if damaged:
            damaged.write_bytes(b"")
        (result,) = json_lines(command(*options))
        assert result["skipped"] == skipped
        assert track_of(page)["stems"] == SOURCES


def test_page_of_a_track_that_is_too_long_is_refused(separator: Separator, tmp_path: Path) -> None:
    track = tmp_path / "long.flac"
    soundfile.write(track, np.zeros((LONGEST + 60) * 8000, np.int16), 8000)
    with pytest.raises(OptionError, match=r"long\.flac: .*21 minutes.*--player.*--duration"):
        separator.separate_to_files(track, tmp_path / "out", player=True)
    assert list((tmp_path / "out").iterdir()) == []


def press(listener: Listener, code: str, key: str, shift: bool = False) -> None:
    listener.run(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {code: arguments[0],"
        " key: arguments[1], shiftKey: arguments[2], bubbles: true}))",
        code,
        key,
        shift,
    )


@pytest.mark.slow
def test_stems_are_in_step_and_their_sum_is_the_mix(listener: Listener) -> None:
    """All stems are on, then each one alone, then none."""
    parts = stems()
    length = SECONDS * RATE
    mix = sum(parts.values())
    heard = listener.sound(0, length)
    assert lag(heard[0], mix[0]) == 0
    assert np.abs(heard - mix).std() < 0.1 * mix.std()
    alone = []
    for index, part in enumerate(parts.values()):
        listener.run(f"page.toggle({index}, 'solo')")
        alone.append(listener.sound(0, length))
        listener.run(f"page.toggle({index}, 'solo')")
        assert lag(alone[-1][0], part[0]) == 0
        assert np.abs(alone[-1] - part).std() < 0.2 * part.std()
    assert np.abs(sum(alone) - heard).max() < 1e-5
    for index in range(len(parts)):
        listener.run(f"page.toggle({index}, 'mute')")
    assert not listener.sound(0, length).any()


@pytest.mark.slow
def test_seek_volume_and_loop_change_the_sound(listener: Listener) -> None:
    whole = listener.sound(0, SECONDS * RATE)
    assert np.abs(listener.sound(1.5, RATE) - whole[:, 66_150 : 66_150 + RATE]).max() < 1e-6
    listener.run("player.stems[0].level = 0.5; player.volume = 0.5; page.rebalance()")
    quiet = listener.sound(0, RATE)
    listener.run("player.stems[0].level = 1; page.toggle(0, 'solo')")
    drums = listener.sound(0, RATE)
    assert np.abs(quiet - (whole[:, :RATE] / 2 - drums / 2)).max() < 1e-5
    listener.run("page.toggle(0, 'solo'); player.volume = 1; player.setLoop(1, 1.25)")
    looped = listener.sound(1, RATE)
    part = whole[:, RATE : RATE + RATE // 4]
    assert np.abs(looped - np.concatenate([part] * 4, axis=1)).max() < 1e-5


@pytest.mark.slow
def test_space_plays_and_pauses(listener: Listener) -> None:
    """An analyser at the output hears something when the page plays."""
    level = (
        "new Promise((done) => { const a = player.context.createAnalyser();"
        " player.mixer.output.connect(a); const data = new Float32Array(a.fftSize); let n = 0;"
        " const look = () => { a.getFloatTimeDomainData(data);"
        " const peak = Math.max(...data.map(Math.abs));"
        " if (peak > 0.01 || ++n > 100) done(peak); else setTimeout(look, 20); }; look(); })"
    )
    listener.run("page.seek(1)")
    press(listener, "Space", " ")
    assert listener.wait(level) > 0.01
    assert listener.run("return element('play').textContent") == "Pause"
    assert listener.run("return player.position") > 1
    press(listener, "Space", " ")
    assert listener.run("return player.playing") is False
    at = listener.run("return player.position")
    press(listener, "Home", "Home")
    press(listener, "ArrowRight", "ArrowRight")
    assert at < SECONDS == listener.run("return player.position")


@pytest.mark.slow
def test_keys_mute_solo_and_loop(listener: Listener) -> None:
    for number in range(1, 5):
        press(listener, f"Digit{number}", str(number))
    assert listener.run("return player.levels") == [0, 0, 0, 0]
    press(listener, "Digit2", "2")
    press(listener, "Digit3", "#", shift=True)
    assert listener.run("return player.levels") == [0, 0, 0, 0]  # soloed, and still muted
    press(listener, "Digit3", "3")
    assert listener.run("return player.levels") == [0, 0, 1, 0]
    press(listener, "Digit9", "9")
    press(listener, "ArrowDown", "ArrowDown")
    assert listener.run("return player.volume") == pytest.approx(0.95)
    listener.run("page.seek(1)")
    press(listener, "KeyA", "a")
    listener.run("page.seek(3)")
    press(listener, "KeyB", "b")
    assert listener.run("return player.loop") == {"start": 1, "end": 3}
    assert listener.run("return element('loop-text').textContent") == "Loop 0:01.0 to 0:03.0"
    press(listener, "KeyC", "c")
    assert listener.run("return player.loop") is None


@pytest.mark.slow
def test_screen_reader_finds_names_and_values(listener: Listener) -> None:
    nodes = listener.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names = {
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if node.get("name") and not node.get("ignored")
    }
    sliders = {name for role, name in names if role == "slider"}
    assert sliders == {"Position", "Volume", *(f"Volume of {name}" for name in stems())}
    buttons = {name for role, name in names if role == "button"}
    assert buttons >= {"Play", "Loop from here", "Loop to here", "No loop"}
    assert buttons >= {f"{what} {name}" for what in ("Mute", "Solo") for name in stems()}
    assert {name for role, name in names if role == "region"} >= {
        "Player",
        *(f"Stem {name}" for name in stems()),
    }
    listener.run("page.seek(2); page.toggle(0, 'mute')")
    text = listener.run("return element('seek').getAttribute('aria-valuetext')")
    assert text == "0:02.0 of 0:04.0"
    pressed = "return document.querySelector('.mute').getAttribute('aria-pressed')"
    assert listener.run(pressed) == "true"


@pytest.mark.slow
def test_names_cannot_inject_markup(driver: Any, tmp_path: Path) -> None:
    parts = {f"<b>{INJECTION}{name}": stem for name, stem in stems().items()}
    listener = Listener(driver, write(tmp_path / "player.html", parts, INJECTION, INJECTION))
    assert listener.run("return window.injected") is None
    assert listener.run("return [document.title, element('title').textContent]") == [INJECTION] * 2
    shown = listener.run("return Array.from(document.querySelectorAll('h2'), (h) => h.textContent)")
    assert shown == list(parts)
    assert listener.run("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "light"), [("light", True), ("dark", False)])
def test_page_is_light_or_dark_with_a_waveform_for_each_stem(
    listener: Listener, scheme: str, light: bool
) -> None:
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    listener.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    with av.open(io.BytesIO(listener.driver.get_screenshot_as_png())) as picture:
        pixels = next(picture.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert pixels.mean() > 200 if light else pixels.mean() < 60
    colours = {tuple(colour) for colour in pixels[::2, ::2].reshape(-1, 3)}
    assert colours >= {(0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233)}
