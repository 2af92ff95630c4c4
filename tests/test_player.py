"""The page to listen with: its file, and its behaviour in a browser."""

from __future__ import annotations

import base64
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
from demucs_infer.resample import resample
from demucs_infer.write.output import Output
from demucs_infer.write.player import LONGEST
from demucs_infer.write.writer import Target, TrackWriter

from .helpers import SOURCES, Command, json_lines, lag
from .tools.browser import Listener, chromium
from .tools.synth import RATE, song

SECONDS = 4
GAIN = 0.6  # of the stems below, for a sum that needs no lowering
TONE = 440  # hertz
PHONE = (390, 844)  # pixels
INJECTION = "</script><script>window.injected = 1</script><img src=x onerror='injected = 1'>@TRACK@"


@cache
def stems() -> dict[str, np.ndarray]:
    return {name: GAIN * stem for name, stem in song(5, SECONDS).items()}


def write(path: Path, parts: dict[str, np.ndarray], title: str, artist: str = "") -> Path:
    output = Output(path.parent / "out", player=True)
    mix = sum(parts.values())
    progress: list[float] = []
    with output.workspace() as space:
        tags = {"title": title, "artist": artist}
        target = Target(output.file_format, "rescale", space, RATE, RATE, 2, "tiny", tags)
        paths = {name: path.with_name(f"{index}.wav") for index, name in enumerate(parts)}
        writer = TrackWriter(paths, target, path)
        for start in range(0, mix.shape[-1], 70_001):
            blocks = [part[:, start : start + 70_001] for part in (mix, *parts.values())]
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


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 40 seconds of a tone and of silence."""
    tone = 0.3 * np.sin(2 * np.pi * TONE / RATE * np.arange(40 * RATE, dtype=np.float32))
    parts = {"tone": np.stack([tone, tone]), "rest": np.zeros((2, len(tone)), np.float32)}
    return write(tmp_path_factory.mktemp("long") / "player.html", parts, "A tone")


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
    (result,) = json_lines(command(*options, "--stems", "vocals,mix=drums+bass+other"))
    assert tmp_path / result["player"] == page
    about = track_of(page)
    assert (about["title"], about["model"], about["stems"]) == ("track", "tiny", ["vocals", "mix"])
    *stems, original = re.findall(r'<script class="sound"[^>]*>([^<]*)<', page.read_text("utf-8"))
    assert len(stems) == 2
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(original)), dtype="float32")
    given = resample(torch.from_numpy(soundfile.read(track, dtype="float32")[0].T), 48_000, rate)
    assert np.corrcoef(heard[:, 0], given[0])[0, 1] > 0.9
    options += ["--format", "stem.mp4", "--skip-existing"]
    file = tmp_path / "separated/tiny/track.stem.mp4"
    for damaged, skipped in ((page, False), (None, True), (page, False), (file, False)):
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
    # The original is alone, whatever is on, until a stem is wanted alone.
    listener.run("page.toggle(1, 'solo'); page.toggle(4, 'solo')")
    assert listener.run("return player.levels") == [0, 0, 0, 0, 1]
    original = listener.sound(0, length)
    assert lag(original[0], mix[0]) == 0
    assert np.abs(original - mix).std() < 0.1 * mix.std()
    listener.run("page.toggle(1, 'solo'); page.toggle(2, 'solo')")
    assert listener.run("return player.levels") == [0, 0, 1, 0, 0]
    listener.run("page.toggle(2, 'solo')")
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
@pytest.mark.parametrize("speed", [0.75, 1.2])
def test_rows_stay_in_step_at_another_speed(listener: Listener, speed: float) -> None:
    """A grain is a piece of the sum of all rows at 100 %, from near the sample that is due."""
    whole = listener.sound(0, SECONDS * RATE)
    looped = np.tile(whole[:, RATE : RATE + RATE // 2], 6)
    times = listener.run("return [HOP, CROSSFADE, REACH].map((s) => s * player.track.rate)")
    hop, fade, reach = map(int, times)
    for loop, start, given in (
        ("", 0.5, whole[:, RATE // 2 :]),
        ("player.setLoop(1.5, 1)", 1, looped),
    ):
        listener.run(f"player.change({{speed: {speed}}}); {loop}")
        heard = listener.sound(start, 2 * RATE)
        for at in range(0, 2 * RATE - hop, hop):
            grain = heard[:, None, at + fade : at + hop]
            due = int(speed * at) + fade
            near = given[:, max(0, due - reach - 2) : due + reach + 2 + hop - fade]
            pieces = np.lib.stride_tricks.sliding_window_view(near, hop - fade, axis=1)
            assert np.abs(pieces - grain).max((0, 2)).min() < 1e-4


LEVEL = """new Promise((done) => {
  const analyser = new AnalyserNode(player.context, { fftSize: 32768 });
  player.mixer.output.connect(analyser);
  const heard = new Float32Array(analyser.fftSize);
  const began = player.context.currentTime;
  const look = () => {
    analyser.getFloatTimeDomainData(heard);
    if (player.context.currentTime < began + 1.5) setTimeout(look, 20);
    else done(Array.from(heard));
  };
  look();
})"""


@pytest.mark.slow
def test_slow_sound_keeps_its_pitch(driver: Any, long_page: Path) -> None:
    """An analyser at the output hears the tone while the page plays."""
    from selenium.webdriver import Keys

    def heard(listener: Listener) -> tuple[float, float]:
        """Return the level and the frequency of the tone that leaves the graph."""
        sound = np.array(listener.wait(LEVEL))
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
        return np.abs(sound).max(), spectrum.argmax() * RATE / len(sound)

    listener = Listener(driver, long_page)
    listener.press("-" * 5)
    assert listener.find("#speed").text == "75 %"
    listener.press(Keys.SPACE)
    level, hertz = heard(listener)
    assert level == pytest.approx(0.3, rel=0.1)
    assert hertz == pytest.approx(TONE, abs=RATE / 32768)
    assert listener.find("#play").text == "Pause"
    listener.run("page.setVolume(0.5); page.seek(25)")
    assert heard(listener)[0] == pytest.approx(0.15, rel=0.1)
    assert listener.run("return player.position") > 25
    listener.find("[aria-label='Solo rest']").click()
    assert heard(listener)[0] < 1e-3
    listener.press(*"-" * 20)
    assert listener.find("#speed").text == "50 %"
    listener.press(*"+" * 20)
    assert listener.find("#speed").text == "120 %"


@pytest.mark.slow
def test_keys_move_and_space_plays(driver: Any, long_page: Path) -> None:
    from selenium.webdriver import Keys

    listener = Listener(driver, long_page)

    def position(*keys: str) -> float:
        listener.press(*keys)
        return listener.run("return player.position")

    for focus in ("element('seek').focus()", "document.activeElement.blur()"):
        listener.run(f"page.seek(10); {focus}")
        assert position(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT) == 20
        assert position(Keys.ARROW_LEFT) == 15
        assert position(Keys.END) == 40
        assert position(Keys.HOME) == 0
    listener.run("element('seek').focus()")
    assert position(Keys.PAGE_UP, Keys.ARROW_UP) == 35
    assert position(Keys.ARROW_DOWN, Keys.PAGE_DOWN) == 0
    assert listener.find("#seek").get_attribute("value") == "0"
    # Space neither presses the element of the last click, nor does it scroll the page.
    for selector in ("#seek", ".mute", ".solo", "#loop-start", "#slower", "summary", "#play"):
        listener.find(selector).click()
        *before, playing = listener.run("return [player.levels, player.speed, player.playing]")
        listener.press(Keys.SPACE)
        expected = [*before, not playing]
        assert listener.run("return [player.levels, player.speed, player.playing]") == expected
    assert listener.run("return document.querySelector('details').open") is True


@pytest.mark.slow
def test_keys_mute_solo_and_loop(listener: Listener) -> None:
    listener.press(*"1234")
    assert listener.run("return player.levels") == [0, 0, 0, 0, 0]
    listener.press(*"2#")
    assert listener.run("return player.levels") == [0, 0, 0, 0, 0]  # soloed, and still muted
    listener.press("3")
    assert listener.run("return player.levels") == [0, 0, 1, 0, 0]
    listener.press(*"95o")
    assert listener.run("return player.levels") == [0, 0, 0, 0, 1]
    listener.press("\ue015")
    assert listener.run("return player.volume") == pytest.approx(0.95)
    for start, end in ((1, 3), (3, 1)):
        listener.run(f"page.seek({start})")
        listener.press("a")
        listener.run(f"page.seek({end})")
        listener.press("b")
        assert listener.run("return player.loop") == {"start": 1, "end": 3}
        assert listener.find("#loop-text").text == "Loop 0:01.0 to 0:03.0"
        listener.press("c")
        assert listener.run("return player.loop") is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mouse", "touch", "pen"])
def test_dragging_selects_a_loop_and_a_click_seeks(driver: Any, long_page: Path, kind: str) -> None:
    listener = Listener(driver, long_page, PHONE[0], 600)
    for ends in ((0.2, 0.7), (0.7, 0.2)):
        listener.drag(".wave", *ends, kind)
        loop = listener.run("return player.loop")
        assert (loop["start"], loop["end"]) == pytest.approx((8, 28), abs=0.2)
        assert listener.run("return player.position") == pytest.approx(loop["start"], abs=1 / RATE)
        listener.drag(".wave", 0.5, 0.5, kind)
        assert listener.run("return player.position") == pytest.approx(20, abs=0.2)
        assert listener.run("return player.loop") == loop
        listener.press("c")
    # A finger that moves up over a waveform scrolls the page.
    where = listener.find(".wave").rect
    for up in range(0, 160, 15):
        touch = {"x": where["x"] + 100 + up / 15, "y": where["y"] + 60 - up}
        event = {"type": "touchMove" if up else "touchStart", "touchPoints": [touch]}
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", event)
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert listener.run("return scrollY") > 50
    assert listener.run("return [player.loop, page.selection]") == [None, None]
    assert listener.run("return player.position") == pytest.approx(20, abs=0.2)


@pytest.mark.slow
def test_downloaded_stem_is_the_file(listener: Listener, page: Path, tmp_path: Path) -> None:
    file = listener.download("[aria-label='Download vocals']", tmp_path)
    assert file.name == "A song (vocals).mp3"
    assert base64.b64encode(file.read_bytes()).decode() in page.read_text("utf-8")
    downloaded, written = (soundfile.read(each)[0] for each in (file, page.with_name("3.wav")))
    assert lag(downloaded[:, 0], written[:, 0]) == 0
    assert np.abs(downloaded - written).std() < 0.2 * written.std()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_controls_keep_their_places(driver: Any, long_page: Path, width: int) -> None:
    listener = Listener(driver, long_page, width, PHONE[1])
    widths = "return Array.from(document.querySelectorAll('button'), (b) => b.offsetWidth)"
    before = listener.run(widths)
    for row in range(3):
        listener.run(f"page.toggle({row}, 'mute'); page.toggle({row}, 'solo')")
    listener.wait("page.togglePlay()")
    assert listener.find("#play").text == "Pause"
    assert listener.run(widths) == before
    listener.run("player.setLoop(22, 35); page.seek(30)")
    assert listener.run("return document.documentElement.scrollWidth") <= width
    if width == PHONE[0]:
        assert listener.find(".transport").rect["height"] <= PHONE[1] / 5
    label, slider = (listener.find(s).rect for s in ("label[for=volume]", "#volume"))
    assert label["x"] + label["width"] <= slider["x"]
    middles = [each["y"] + each["height"] / 2 for each in (label, slider)]
    assert middles[0] == pytest.approx(middles[1], abs=3)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(driver: Any, page: Path, scheme: str) -> None:
    axe = pytest.importorskip("selenium_axe_python").Axe
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    for width in (1280, 390):
        listener = Listener(driver, page, width)
        axe(driver).inject()
        for action in ("toggle(0, 'mute')", "toggle(4, 'solo')", "player.setLoop(1, 3)"):
            listener.run(f"document.querySelector('details').open = true; page.{action}")
            found = axe(driver).run()["violations"]
            assert [(each["id"], each["nodes"]) for each in found] == []


@pytest.mark.slow
def test_screen_reader_finds_names_and_values(listener: Listener) -> None:
    nodes = listener.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names = {
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if node.get("name") and not node.get("ignored")
    }
    rows = [*stems(), "original mix"]
    sliders = {name for role, name in names if role == "slider"}
    assert sliders == {"Position", "Volume", *(f"Volume of {name}" for name in rows)}
    buttons = {name for role, name in names if role == "button"}
    assert buttons >= {"Play", "Loop from here", "Loop to here", "No loop", "Slower", "Faster"}
    assert buttons >= {f"Solo {name}" for name in rows} | {f"Mute {name}" for name in stems()}
    assert {name for role, name in names if role == "link"} == {f"Download {n}" for n in rows}
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
    parts = {f"<b>{INJECTION[:50]}{name}": stem for name, stem in stems().items()}
    listener = Listener(driver, write(tmp_path / "player.html", parts, INJECTION, INJECTION))
    assert listener.run("return window.injected") is None
    assert listener.run("return [document.title, element('title').textContent]") == [INJECTION] * 2
    shown = listener.run("return Array.from(document.querySelectorAll('h2'), (h) => h.textContent)")
    assert shown == [*parts, "original mix"]
    assert listener.run("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    name = listener.find("a").get_dom_attribute("download")
    assert re.fullmatch(r"__script__script_window.*@TRACK@ \(_b___script_.*drums\)\.mp3", name)


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
