"""The console in a browser: how tests start it and what they do on its page. The fixtures are those of conftest.py."""

import os
import socket
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import browser
import pytest
import requests
from browser import Browser, browsing, until

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-console"
# axe-core, https://github.com/dequelabs/axe-core, in a package of PyPI that carries it.
AXE = "axe-playwright-python==0.1.8"
TEXT = "warm room, cold staff"
# The field for a model that is not listed.
NAME = "#model :is(input, textarea)"


@pytest.fixture(scope="session")
def browser_environment() -> None:
    """What the page and its tests need."""
    if words := browser.missing():
        pytest.fail(words)
    done = subprocess.run([ROOT / "scripts" / "setup-console"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = f"scripts/setup-console failed: {done.stderr.strip()[-500:]}"
        pytest.fail(words) if os.environ.get("CI") == "true" else pytest.skip(words)


@pytest.fixture(scope="session")
def axe(browser_environment: None) -> str:
    """The JavaScript of axe-core."""
    folder = ENVIRONMENT / "axe"
    if not list(folder.glob("*.whl")):
        pip = [ENVIRONMENT / "bin" / "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", folder, AXE], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).read("axe_playwright_python/axe.min.js").decode("utf-8")


StartConsole = Callable[..., AbstractContextManager[str]]


def at(url: str) -> tuple[str, ...]:
    """The options for a server whose ports are all one."""
    return "--url", url, "--management-url", url, "--metrics-url", url


@pytest.fixture(scope="session")
def start_console(browser_environment: None, tmp_path_factory: pytest.TempPathFactory) -> StartConsole:
    """Serves the page, within a `with` block, and gives its address."""

    @contextmanager
    def start(*options: str, **variables: str) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("console") / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [ROOT / "scripts" / "console", "--port", str(port), *options],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        url = f"http://127.0.0.1:{port}/"

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return requests.get(url, timeout=10).status_code == 200
            except requests.ConnectionError:
                return False

        try:
            until(up, "the console", 120)
            yield url
        finally:
            process.terminate()
            assert process.wait(30) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
        assert TEXT not in log.read_text()  # what is asked is nobody's business

    return start


@pytest.fixture(scope="session")
def chromium(browser_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("chromium")) as window:
        yield window


def opened(window: Browser, url: str) -> Browser:
    window.resize(1100, 1400)
    window.open(url)
    window.reads("h1", "Marble console")
    return window


def choose(page: Browser, model: str) -> int:
    """Shows the tab of a model; returns its number when the form is there."""
    n = int(click_tab(page, model).removeprefix("tab-"))
    page.reads(f"#heading-{n}", model)
    return n


def click_tab(page: Browser, name: str) -> str:
    """Shows a tab as soon as it is there; returns the id of what it shows."""
    script = """
        const tab = [...document.querySelectorAll('[role=tab]')].find(e => e.innerText == arguments[0]);
        tab?.click();
        return tab?.getAttribute('aria-controls');
    """
    return str(until(lambda: page.run(script, name), f"the tab {name}"))


def holds(page: Browser, css: str) -> str:
    """What a field of the page holds."""
    return str(page.run("return document.querySelector(arguments[0]).value", css))


def faults(page: Browser, axe: str) -> list[str]:
    """What axe-core finds that is serious or critical."""
    page.run(f"if (!window.axe) {{ {axe} }}")
    found = page.run_async(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then(result => done(result.violations))"
    )
    return [
        f"{fault['id']} ({fault['impact']}): {node['html'][:200]}: {node['failureSummary']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]
