"""A headless Chromium, driven over the WebDriver protocol (https://www.w3.org/TR/webdriver2): only what tests need."""

import base64
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import requests

T = TypeVar("T")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
WITHIN_S = 60.0
# Keys that are no characters: https://www.w3.org/TR/webdriver2/#keyboard-actions
ENTER, TAB, LEFT, RIGHT = "\ue007", "\ue004", "\ue012", "\ue014"
_ALL = "\ue009a\ue000"  # Ctrl and A, released


def missing() -> str | None:
    """What has to be installed first, or None."""
    wanted = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{', '.join(wanted)} missing; on Debian: apt-get install chromium chromium-driver" if wanted else None


def until(found: Callable[[], T], what: str, within: float = WITHIN_S) -> T:
    """What `found` returns as soon as it is true; fails if that takes too long."""
    end = time.monotonic() + within
    while not (value := found()):
        assert time.monotonic() < end, f"waited {within:g} s in vain: {what}"
        time.sleep(0.05)
    return value


class Browser:
    """One window."""

    def __init__(self, driver: str, profile: Path) -> None:
        arguments = [
            *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
            *("--window-size=1100,1400", f"--user-data-dir={profile}", "--disable-background-networking"),
            # A camera that shows a green disc, and a microphone that beeps; nobody is asked whether they may be used.
            *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
        ]
        wanted = {
            "goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
        }
        self._session = driver
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"{driver}/session/{made['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        sent = {} if method == "GET" or method == "DELETE" else {"json": {} if body is None else body}
        reply = requests.request(method, self._session + path, timeout=120, **sent)
        value = reply.json()["value"]
        assert reply.status_code == 200, value
        return value

    def close(self) -> None:
        """Ends the browser."""
        self._call("DELETE", "")

    def open(self, url: str) -> None:
        """Loads a page."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript; returns what it returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str) -> Any:
        """Runs JavaScript that hands its result to its last argument."""
        return self._call("POST", "/execute/async", {"script": script, "args": []})

    def elements(self, css: str) -> list[str]:
        """The elements that match."""
        found = self._call("POST", "/elements", {"using": "css selector", "value": css})
        return [element[_ELEMENT] for element in found]

    def click(self, css: str) -> None:
        """Clicks the one element that matches, when it is there and nothing covers it."""

        def clicked() -> bool:
            try:
                [element] = self.elements(css)
                self._call("POST", f"/element/{element}/click")
            except (AssertionError, ValueError):
                return False
            return True

        until(clicked, f"a click on {css}")

    def name(self, css: str) -> str:
        """What a screen reader calls an element."""
        [element] = until(lambda: self.elements(css), css)
        return str(self._call("GET", f"/element/{element}/computedlabel"))

    def type(self, css: str, keys: str) -> None:
        """Writes into a field as a keyboard would, in place of what it holds."""
        [element] = until(lambda: self.elements(css), css)
        self._call("POST", f"/element/{element}/value", {"text": f"{_ALL}{keys}"})

    def upload(self, css: str, path: Path) -> None:
        """Chooses a file."""
        [element] = until(lambda: self.elements(css), css)
        self._call("POST", f"/element/{element}/value", {"text": str(path)})

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def text(self, css: str) -> str:
        """The text that can be read in all elements that match."""
        return str(
            self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')", css)
        )

    def reads(self, css: str, *words: str) -> str:
        """Waits until all of the words can be read there; returns the text."""

        def shown() -> str:
            text = self.text(css)
            return text if all(word in text for word in words) else ""

        return until(shown, f"{words} in {css}")

    def resize(self, width: int, height: int) -> None:
        """Another size of the page, as on another device."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", sizes)

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        """A command of Chromium's own."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since this was asked last."""
        entries: list[dict[str, Any]] = self._call("POST", "/se/log", {"type": kind})
        return entries

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser whose profile is in `folder`; ends it and its driver."""
    environment = {**os.environ, "HOME": str(folder)}
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            while not (port := re.search(r"started successfully on port (\d+)", said)):
                said += (line := process.stdout.readline())
                assert line, f"chromedriver did not start: {said}"
            window = Browser(f"http://127.0.0.1:{port[1]}", folder / "profile")
            try:
                yield window
            finally:
                window.close()
        finally:
            process.terminate()
