"""The chat page in a real browser."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future

import pytest
import yaml

from serve_app.api.app import create_app
from serve_app.config.schema import AppConfig
from serve_app.core.errors import EngineError
from serve_app.core.requests import GenerateChunk

ENTER, ESCAPE, SHIFT = "\ue007", "\ue00c", "\ue008"
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
    browser.keep_picture("welcome")
    browser.type("#prompt", f"What is the{SHIFT}{ENTER}{SHIFT}capital of France?{ENTER}")
    browser.wait(lambda: "The capital" in browser.text(".assistant .body"), "the first words")
    assert "bonjour" not in browser.text(".assistant .body")
    assert browser.run("return document.body.classList.contains('is-busy')")
    browser.keep_picture("streaming")
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
    browser.keep_picture("answer")
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
    browser.keep_picture("thinking-390")
    release.set_result(None)
    browser.wait(lambda: "Paris." in browser.text(".assistant .body"), "the answer")
    browser.wait(lambda: not browser.run(is_open), "the fold")
    browser.click(".assistant summary")
    assert browser.run(is_open)
    browser.keep_picture("thought-390")
    assert browser.fits_the_screen()


def test_error_banner_shows_the_servers_message(open_page, backend, fakes):
    backend.script = [EngineError("The card was lost.")]
    browser = open_page()
    browser.type("#prompt", f"Hi{ENTER}")
    browser.wait(lambda: "The card was lost." in browser.text("#banner"), "the banner")
    assert browser.run("return document.querySelectorAll('.assistant').length") == 0
    browser.keep_picture("error")
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
    browser.keep_picture("dark-390-welcome")
    backend.script = fakes["chunks"](ANSWER)
    browser.type("#prompt", f"What is the capital of France?{ENTER}")
    browser.wait(lambda: "first token" in browser.text(".assistant .stats"), "the answer")
    assert browser.fits_the_screen()
    browser.keep_picture("dark-390")
    browser.click("#toggle-panel")
    browser.keep_picture("dark-390-parameters")
    browser.click("#close-panel")
    browser.click("#theme")
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(251, 251, 250)"
    browser.keep_picture("light-390")


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
    browser.keep_picture("parameters")
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
    browser.keep_picture("docs")
    assert browser.console_errors() == []


@pytest.fixture
def keyed_app(backend, tmp_path):
    """The application, where a key is asked for: open-sesame, for inference alone."""
    entry = {"name": "ann", "sha256": hashlib.sha256(b"open-sesame").hexdigest()}
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [{**entry, "scopes": ["inference"]}]}))
    config = {"auth": {"keys_file": str(path)}, "model": {"name": "org/tiny"}}
    return create_app(backend, AppConfig.model_validate(config))


def give_key(browser, key):
    browser.run("document.querySelector('#key').value = ''")
    browser.type("#key", f"{key}{ENTER}")


def is_asked(browser):
    return browser.run("return !document.querySelector('#ask').hidden")


@pytest.mark.parametrize("size", [(1200, 800), (390, 844)])
def test_asks_for_a_key_and_keeps_it_for_the_tab_alone(open_page, keyed_app, size):
    browser = open_page(size=size, app=keyed_app)
    browser.wait(lambda: is_asked(browser), "the question")
    assert browser.run("return document.querySelector('#composer').hidden")
    assert browser.text("#refusal") == ""
    browser.keep_picture(f"key-{size[0]}")
    give_key(browser, "wrong")
    browser.wait(lambda: "not known" in browser.text("#refusal"), "the refusal")
    browser.keep_picture(f"key-refused-{size[0]}")
    assert browser.fits_the_screen()
    give_key(browser, "open-sesame")
    browser.wait(lambda: "org/tiny" in browser.text("#model"), "the models")
    assert not is_asked(browser)
    browser.type("#prompt", f"Hi{ENTER}")
    browser.wait(lambda: "Hello" in browser.text(".assistant .body"), "the answer")
    browser.run("location.reload()")
    browser.wait(lambda: "org/tiny" in browser.text("#model"), "the models, no question")
    assert "open-sesame" not in browser.run("return JSON.stringify(localStorage)")
    assert "open-sesame" not in browser.run("return document.cookie + location.href")
    browser.click("#toggle-panel")
    browser.click("#forget-key")
    browser.wait(lambda: is_asked(browser), "the question again")
    assert browser.run("return sessionStorage.length") == 0


def test_a_key_that_ends_meanwhile_is_asked_for_and_the_question_goes_on(open_page, keyed_app):
    browser = open_page(app=keyed_app)
    browser.wait(lambda: is_asked(browser), "the question")
    give_key(browser, "open-sesame")
    browser.wait(lambda: "org/tiny" in browser.text("#model"), "the models")
    browser.run("Server.setKey('revoked')")
    browser.type("#prompt", f"Hi{ENTER}")
    browser.wait(lambda: "not known" in browser.text("#refusal"), "the refusal")
    assert browser.text(".user .body") == "Hi"
    give_key(browser, "open-sesame")
    browser.wait(lambda: "Hello" in browser.text(".assistant .body"), "the answer")


def test_links_to_the_status_page(open_page):
    browser = open_page(size=(390, 844))
    browser.click(".hint a[href=status]")
    browser.wait(lambda: "All is well" in browser.text("#state"), "the status page")
    assert browser.run("return location.pathname") == "/status"
