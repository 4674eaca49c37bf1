"""The chat page in a real browser, through chromedriver's own HTTP API."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.core.errors import EngineError
from serve_app.core.requests import GenerateChunk

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"
)
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
ENTER, ESCAPE, SHIFT = "\ue007", "\ue00c", "\ue008"


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
        session = self._post("/session", capabilities={"alwaysMatch": wanted})
        self._session = f"/session/{session['sessionId']}"

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

    def close(self) -> None:
        self._http.delete(self._session)
        self._http.close()


@pytest.fixture(scope="module")
def driver_url(find_free_port: Callable[[], int]) -> Iterator[str]:
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


@pytest.fixture(scope="module")
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

    def open_(size: tuple[int, int] = (1200, 800), path: str = "/") -> Browser:
        browser.open("about:blank")
        browser.console_errors()  # reading forgets what earlier pages wrote
        browser.resize(*size)
        browser.prefer_dark(False)
        browser.open(run_server(make_app()) + path)
        return browser

    return open_


def fits_the_screen(browser: Browser) -> bool:
    """Whether the page itself scrolls in no direction."""
    return bool(
        browser.run(
            "const page = document.documentElement;"
            "return page.scrollWidth <= visualViewport.width"
            " && page.scrollHeight <= visualViewport.height"
        )
    )


def keep_picture(browser: Browser, name: str) -> None:
    """Keep a screenshot where XERAY_SCREENSHOTS names a folder."""
    if folder := os.environ.get("XERAY_SCREENSHOTS"):
        browser.shoot(Path(folder) / f"{name}.png")


ANSWER = (
    "The capital of France is **Paris**.\n\n"
    "1. It lies on the `Seine`.\n   - a river\n2. <img src=x onerror=alert(1)>\n\n"
    "```python\nprint('bonjour')\n```\n\n"
    "[More](https://example.org/paris) or [no](javascript:alert(1))"
)


def test_question_streams_an_answer(open_page, backend, fakes):
    release: Future[None] = Future()
    pieces = [ANSWER[start : start + 9] for start in range(0, len(ANSWER), 9)]
    made = fakes["chunks"](*pieces)
    backend.script = [*made[:3], release, *made[3:]]
    browser = open_page()
    browser.wait(lambda: "org/tiny" in browser.text("#model"), "the models")
    keep_picture(browser, "welcome")
    browser.type("#prompt", f"What is the{SHIFT}{ENTER}{SHIFT}capital of France?{ENTER}")
    browser.wait(lambda: "The capital" in browser.text(".assistant .body"), "the first words")
    assert "bonjour" not in browser.text(".assistant .body")
    assert browser.run("return document.body.classList.contains('is-busy')")
    keep_picture(browser, "streaming")
    release.set_result(None)
    browser.wait(lambda: "first token" in browser.text(".assistant .stats"), "the statistics")
    assert "tokens/s" in browser.text(".assistant .stats")
    assert browser.text(".user .body") == "What is the\ncapital of France?"
    assert browser.run("return document.querySelector('.body strong').textContent") == "Paris"
    items = browser.text(".assistant ol > li").split("|")
    assert items == ["It lies on the Seine.\na river", "<img src=x onerror=alert(1)>"]
    assert browser.run("return document.querySelectorAll('.body img, .body script').length") == 0
    links = browser.run("return [...document.querySelectorAll('.body a')].map(a => a.href)")
    assert links == ["https://example.org/paris"]
    assert browser.text(".body pre") == "print('bonjour')"
    keep_picture(browser, "answer")
    backend.script = fakes["chunks"]("Berlin.")
    browser.type("#prompt", f"And of Germany?{ENTER}")
    browser.wait(lambda: "Berlin." in browser.text(".assistant .body"), "the second answer")
    roles = [message["role"] for message in backend.prepared[-1].messages]
    assert roles == ["user", "assistant", "user"]
    assert browser.console_errors() == []


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_generation(open_page, backend, fakes, way):
    backend.script = [*fakes["chunks"]("One ", "two ")[:2], Future()]
    browser = open_page()
    browser.type("#prompt", f"Count{ENTER}")
    browser.wait(lambda: "two" in browser.text(".assistant .body"), "text")
    if way == "button":
        browser.click("#send")
    else:
        browser.type("#prompt", ESCAPE)
    browser.wait(lambda: "stopped" in browser.text(".assistant .stats"), "the stop")
    browser.wait(backend.all_closed.is_set, "the generator's end")
    assert "One two" in browser.text(".assistant .body")
    assert browser.run("return document.querySelector('#banner').hidden")


def test_thinking_folds_away_when_the_answer_begins(open_page, backend, fakes):
    backend.starts_in_reasoning = True
    release: Future[None] = Future()
    made = fakes["chunks"]("Let me ", "think.", "</think>", "Paris.")
    backend.script = [*made[:2], release, *made[2:]]
    browser = open_page(size=(390, 844))
    browser.type("#prompt", f"Capital?{ENTER}")
    is_open = "return document.querySelector('.assistant details').open"
    browser.wait(lambda: "Let me think." in browser.text(".assistant .thoughts"), "the thoughts")
    assert browser.run(is_open)
    keep_picture(browser, "thinking-390")
    release.set_result(None)
    browser.wait(lambda: "Paris." in browser.text(".assistant .body"), "the answer")
    browser.wait(lambda: not browser.run(is_open), "the fold")
    browser.click(".assistant summary")
    assert browser.run(is_open)
    keep_picture(browser, "thought-390")
    assert fits_the_screen(browser)


def test_error_banner_shows_the_servers_message(open_page, backend, fakes):
    backend.script = [EngineError("The card was lost.")]
    browser = open_page()
    browser.type("#prompt", f"Hi{ENTER}")
    browser.wait(lambda: "The card was lost." in browser.text("#banner"), "the banner")
    assert browser.run("return document.querySelectorAll('.assistant').length") == 0
    keep_picture(browser, "error")
    backend.script = fakes["chunks"]("Back again.")
    browser.click("#try-again")
    browser.wait(lambda: "Back again." in browser.text(".assistant .body"), "the second try")
    assert len(backend.prepared[-1].messages) == 1
    assert browser.run("return document.querySelector('#banner').hidden")
    backend.script = [
        GenerateChunk(text="Half", num_prompt=2, num_generated=1),
        EngineError("Lost later."),
    ]
    browser.type("#prompt", f"Again{ENTER}")
    browser.wait(lambda: "Lost later." in browser.text("#banner"), "the second banner")
    assert "Half" in browser.text(".assistant .body")


def test_answer_again_replaces_the_answer(open_page, backend, fakes):
    browser = open_page()
    browser.type("#prompt", f"Hi{ENTER}")
    browser.wait(lambda: "first token" in browser.text(".assistant .stats"), "the answer")
    backend.script = fakes["chunks"]("Other")
    browser.click(".assistant .retry")
    browser.wait(lambda: browser.text(".assistant .body").strip() == "Other", "the other answer")
    assert [message["content"] for message in backend.prepared[-1].messages] == ["Hi"]


def test_dark_and_narrow(open_page, backend, fakes):
    browser = open_page(size=(390, 844))
    browser.prefer_dark(True)
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(19, 21, 18)"
    keep_picture(browser, "dark-390-welcome")
    backend.script = fakes["chunks"](ANSWER)
    browser.type("#prompt", f"What is the capital of France?{ENTER}")
    browser.wait(lambda: "first token" in browser.text(".assistant .stats"), "the answer")
    assert fits_the_screen(browser)
    keep_picture(browser, "dark-390")
    browser.click("#toggle-panel")
    keep_picture(browser, "dark-390-parameters")
    browser.click("#close-panel")
    browser.click("#theme")
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(251, 251, 250)"
    keep_picture(browser, "light-390")


def test_parameters_reach_the_server(open_page, backend):
    browser = open_page()
    browser.click("#toggle-panel")
    for field, value in {
        "system": "Be brief.",
        "temperature": "0.3",
        "top_p": "0.9",
        "max_tokens": "12",
        "seed": "7",
    }.items():
        browser.type(f"#{field}", value)
    keep_picture(browser, "parameters")
    browser.type("#prompt", f"Hi{ENTER}")
    browser.wait(lambda: "Hello" in browser.text(".assistant .body"), "the answer")
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.3, 0.9)
    assert (sampling.max_tokens, sampling.seed) == (12, 7)
    assert backend.prepared[0].messages[0] == {"role": "system", "content": "Be brief."}
    browser.click("#new-chat")
    assert browser.text("#log") == ""


def test_docs_page_lists_the_endpoints(open_page):
    browser = open_page(path="/docs")
    browser.wait(lambda: "/v1/chat/completions" in browser.text("#operations"), "the operations")
    browser.click(".operation summary")
    assert "messages" in browser.text(".operation[open] table")
    keep_picture(browser, "docs")
    assert browser.console_errors() == []
