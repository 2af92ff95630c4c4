"""A Chromium without a window, for tests that listen to pages on disk."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--autoplay-policy=no-user-gesture-required",
    "--window-size=1200,900",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium and yield its driver. The test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ARGUMENTS:
        options.add_argument(argument)
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    session.set_script_timeout(60)
    try:
        yield session
    finally:
        session.quit()


class Listener:
    """The page of a track in a browser: its values, its controls, and the sound that leaves it."""

    def __init__(self, driver: Any, page: Path, width: int = 1200, height: int = 900) -> None:
        self.driver = driver
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(page.as_uri())
        self.wait("ready")

    def find(self, selector: str) -> Any:
        """Return the first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def press(self, *keys: str) -> None:
        """Press keys of selenium's `Keys`, or characters, on the focused element."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def drag(self, selector: str, first: float, last: float, kind: str = "mouse") -> None:
        """Drag a mouse, a finger (touch) or a pen between two fractions of an element's width."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        element = self.find(selector)
        actions = ActionBuilder(self.driver, mouse=PointerInput(kind, kind), duration=0)
        pointer = actions.pointer_action
        places = [round((fraction - 0.5) * element.rect["width"]) for fraction in (first, last)]
        pointer.move_to(element, places[0], 0).pointer_down()
        if first != last:
            pointer.move_to(element, sum(places) // 2, 5).move_to(element, places[1], 0)
        pointer.pointer_up()
        actions.perform()

    def download(self, selector: str, folder: Path) -> Path:
        """Click a link and return the file that it gives, in `folder`."""
        from selenium.webdriver.support.ui import WebDriverWait

        behaviour = {"behavior": "allow", "downloadPath": str(folder)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        self.find(selector).click()
        # Chromium renames a file when it is whole.
        WebDriverWait(self.driver, 30).until(lambda _: list(folder.glob("*.mp3")))
        (file,) = folder.iterdir()
        return file

    def run(self, code: str, *arguments: object) -> Any:
        """Run `code` in the page and return its result."""
        return self.driver.execute_script(code, *arguments)

    def wait(self, promise: str) -> Any:
        """Wait for the promise that an expression makes, and return its result."""
        code = (
            f"const done = arguments[0]; ({promise}).then(done, (e) => done({{error: `${{e}}`}}))"
        )
        result = self.driver.execute_async_script(code)
        assert not (isinstance(result, dict) and "error" in result), result
        return result

    def sound(self, start: float, length: int) -> np.ndarray:
        """Render `length` samples from `start` seconds on, as `[C, length]`."""
        data = self.wait(
            f"player.render({start}, {length}).then((buffer) => Array.from("
            "{length: buffer.numberOfChannels}, (_, channel) => {"
            "  const bytes = new Uint8Array(buffer.getChannelData(channel).buffer);"
            "  let text = ''; for (const byte of bytes) text += String.fromCharCode(byte);"
            "  return btoa(text); }))"
        )
        return np.stack([np.frombuffer(base64.b64decode(text), np.float32) for text in data])
