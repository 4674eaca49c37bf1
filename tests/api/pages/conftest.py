"""The pages in a real browser, through chromedriver's own HTTP API."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A WebDriver session, as far as these tests need one."""

    def __init__(self, driver_url: str, profile: Path) -> None:
        self._http = httpx.Client(base_url=driver_url, timeout=30, trust_env=False)
        options: dict[str, Any] = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={profile}"],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._session = f"/session/{self._begin(wanted)}"

    def _begin(self, wanted: dict[str, Any]) -> str:
        """Return a new session's id; on a busy machine a browser may come too late once."""
        for is_last in (False, False, True):
            answer = self._http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
            session = answer.json()["value"]
            if "sessionId" in session:
                break
            assert not is_last, session
        return str(session["sessionId"])

    def _post(self, path: str, **body: Any) -> Any:
        answer = self._http.post(path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        self._post(f"{self._session}/url", url=url)

    def resize(self, width: int, height: int) -> None:
        """Emulate a screen; a window may not be as narrow as a phone."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        command = "Emulation.setDeviceMetricsOverride"
        self._post(f"{self._session}/goog/cdp/execute", cmd=command, params=screen)

    def prefer_dark(self, is_dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        command = "Emulation.setEmulatedMedia"
        self._post(f"{self._session}/goog/cdp/execute", cmd=command, params={"features": features})

    def run(self, script: str, *args: Any) -> Any:
        return self._post(f"{self._session}/execute/sync", script=script, args=list(args))

    def text(self, selector: str) -> str:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(n => n.innerText).join('|')",
            selector,
        )

    def _find(self, selector: str) -> str:
        found = self._post(f"{self._session}/element", using="css selector", value=selector)
        return f"{self._session}/element/{found[ELEMENT]}"

    def type(self, selector: str, text: str) -> None:
        self._post(f"{self._find(selector)}/value", text=text)

    def click(self, selector: str) -> None:
        self._post(f"{self._find(selector)}/click")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}"
            time.sleep(0.02)

    def console_errors(self) -> list[str]:
        entries = self._post(f"{self._session}/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def shoot(self, path: Path) -> None:
        image = self._http.get(f"{self._session}/screenshot").json()["value"]
        path.write_bytes(base64.b64decode(image))

    def fits_the_screen(self) -> bool:
        """Whether the page itself scrolls in no direction."""
        return self.is_as_wide_as_the_screen() and bool(
            self.run("return document.documentElement.scrollHeight <= visualViewport.height")
        )

    def is_as_wide_as_the_screen(self) -> bool:
        """Whether the page does not scroll sideways."""
        return bool(self.run("return document.documentElement.scrollWidth <= visualViewport.width"))

    def keep_picture(self, name: str) -> None:
        """Keep a screenshot where XERAY_SCREENSHOTS names a folder."""
        if folder := os.environ.get("XERAY_SCREENSHOTS"):
            self.shoot(Path(folder) / f"{name}.png")

    def close(self) -> None:
        self._http.delete(self._session)
        self._http.close()


@pytest.fixture(scope="package")
def driver_url(find_free_port: Callable[[], int]) -> Iterator[str]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver on the PATH")
    port = find_free_port()
    process = subprocess.Popen(
        [str(DRIVER), f"--port={port}", "--allowed-ips=127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 20
    while True:
        try:
            if httpx.get(f"{url}/status", trust_env=False).json()["value"]["ready"]:
                break
        except httpx.TransportError:
            assert time.monotonic() < end, "chromedriver did not start"
            time.sleep(0.05)
    yield url
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="package")
def browser(driver_url: str) -> Iterator[Browser]:
    """One browser for all tests here; each test opens an address of its own."""
    profile = Path(tempfile.mkdtemp(prefix="xeray-page-"))
    browser = Browser(driver_url, profile)
    yield browser
    browser.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def open_page(
    browser: Browser,
    make_app: Callable[..., Any],
    run_server: Callable[[Any], str],
    backend: Any,
    fakes: dict[str, Any],
) -> Callable[..., Browser]:
    """A function that opens a page in a window of a given size."""
    backend.cards = [replace(fakes["CARD"], max_model_len=4096)]

    def open_(size: tuple[int, int] = (1200, 800), path: str = "/", app: Any = None) -> Browser:
        browser.open("about:blank")
        browser.console_errors()  # reading forgets what earlier pages wrote
        browser.resize(*size)
        browser.prefer_dark(False)
        browser.open(run_server(app or make_app()) + path)
        return browser

    return open_
