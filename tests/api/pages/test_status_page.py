"""The status page in a real browser."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.applications import Starlette
from starlette.routing import Route

from serve_app.api.app import create_app
from serve_app.api.routes.status import HostWatch, StatusRoute
from serve_app.config.schema import AppConfig
from serve_app.core.requests import ReplicaHealth, ReplicaLoad, ServiceHealth
from serve_app.observability.activity import NUM_SLOTS, SLOT_S, Activity, ActivityReport
from tests.fake_host import write_host


def busy_minutes() -> ActivityReport:
    """Five minutes of waves, with a pause, some errors and both kinds of answers."""
    now = [0.0]
    activity = Activity(lambda: now[0])
    newest = int(time.time() // SLOT_S)
    for place in range(NUM_SLOTS):
        now[0] = (newest - NUM_SLOTS + place + 1) * SLOT_S
        wave = 1 + math.sin(place / 6)
        if not 20 <= place < 26:
            for request in range(1 + int(4 * wave)):
                activity.note_first_token(0.12 + 0.11 * wave + request / 100)
                activity.note_finish(0.021 + 0.004 * wave, 180)
                activity.note_served("local")
    activity.note_served("fallback")
    now[0] = time.time()
    activity.note_error(400, "invalid_request_error", "invalid_value", "/v1/completions", "a" * 32)
    activity.note_error(
        503, "overloaded_error", "queue_full", "/v1/chat/completions", "0123456789abcdef" * 2
    )
    activity.num_in_flight = 7
    return activity.report()


@pytest.fixture
def busy_backend(backend: Any) -> Any:
    """Two replicas, one of them stuck, and a report of busy minutes."""
    load = ReplicaLoad(num_streams=37, max_num_seqs=32, num_waiting_tokens=5120, num_blocks=4000)
    busy = ReplicaLoad(
        num_streams=12, max_num_seqs=32, num_blocks=4000, num_used_blocks=1480, ttft_p95_s=0.231
    )
    full = ReplicaLoad(**{**_fields(load), "num_used_blocks": 3880})
    backend.state = ServiceHealth(
        True,
        "ready",
        (
            ReplicaHealth(
                "k3v9x2ab",
                "ready",
                device="Intel Arc B580",
                load=busy,
                engine="native",
                engine_reason="openvino decodes at 0.81 × its speed",
            ),
            ReplicaHealth(
                "p0q8w7er",
                "stuck",
                detail="no step for 12 s; the engine is being restarted",
                device="Intel Arc B580",
                last_progress_age_s=12,
                load=full,
            ),
        ),
    )
    backend.reports = [busy_minutes()]
    return backend


def _fields(load: ReplicaLoad) -> dict[str, Any]:
    return {name: getattr(load, name) for name in ReplicaLoad.__slots__}


@pytest.fixture
def host_root(tmp_path: Path) -> Path:
    """A host with one card that is hot, held down and half full."""
    write_host(tmp_path, temperature_c=91, is_throttled=True)
    return tmp_path


@pytest.fixture
def status_app(make_app: Any, host_root: Path) -> Starlette:
    """The application, on a host with that card."""
    app = make_app()
    for place, route in enumerate(app.router.routes):
        if isinstance(route, Route) and route.path == "/status.json":
            watched = StatusRoute(HostWatch(host_root)).__call__
            app.router.routes[place] = Route("/status.json", watched)
    return app


@pytest.mark.parametrize(("width", "height"), [(1200, 800), (390, 844)])
def test_shows_everything_and_fits(
    open_page: Any, busy_backend: Any, status_app: Starlette, width: int, height: int
) -> None:
    browser = open_page(size=(width, height), path="/status", app=status_app)
    browser.wait(lambda: "1 of 2 replicas ready" in browser.text("#state"), "the data")
    assert "org/tiny" in browser.text("#lead")
    assert "7 in flight" in browser.text("#lead")
    replicas = browser.text("#replicas .card")
    assert "12 of 32" in replicas
    assert "37 %" in replicas
    assert "5 waiting" in replicas
    assert "no step for 12 s" in replicas
    assert "engine native, because openvino decodes at 0.81 × its speed" in replicas
    browser.wait(lambda: "Arc B580" in browser.text("#host"), "the card")
    assert "91 °C" in browser.text("#host")
    assert "held down by thermal" in browser.text("#host")
    assert "ms" in browser.text("#ttft")
    assert browser.text("#errors .number").split("|") == ["503", "400"]
    assert "the fallback: 1" in browser.text("#served")
    paths = "return [...document.querySelectorAll('.tiles .line')].map(p => p.getAttribute('d'))"
    assert all("L" in path for path in browser.run(paths))
    assert browser.is_as_wide_as_the_screen()
    _keep_whole(browser, f"status-{width}", width)
    browser.prefer_dark(True)
    _keep_whole(browser, f"status-{width}-dark", width)
    assert browser.console_errors() == []


def _keep_whole(browser: Any, name: str, width: int) -> None:
    browser.resize(width, browser.run("return document.documentElement.scrollHeight"))
    browser.keep_picture(name)


def test_follows_what_changes_and_says_when_nobody_answers(
    open_page: Any, busy_backend: Any, make_app: Any
) -> None:
    busy_backend.state = replace(busy_backend.state, replicas=busy_backend.state.replicas[:1])
    browser = open_page(path="/status")
    browser.wait(lambda: "All is well" in browser.text("#state"), "the data")
    busy_backend.state = ServiceHealth(False, "draining", ())
    browser.wait(lambda: "Draining" in browser.text("#state"), "the change")
    assert "None." in browser.text("#replicas")
    browser.run("window.fetch = () => Promise.reject(new TypeError('gone'))")
    browser.wait(lambda: "cannot be reached" in browser.text("#trouble"), "the notice")
    browser.keep_picture("status-unreachable")


def test_asks_for_a_key_and_keeps_it(
    open_page: Any, busy_backend: Any, tmp_path: Path, fakes: dict[str, Any]
) -> None:
    entry = {"name": "watch", "sha256": hashlib.sha256(b"watch-it").hexdigest()}
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": [{**entry, "scopes": ["metrics"]}]}))
    config = {"auth": {"keys_file": str(path)}, "model": {"name": "org/tiny"}}
    app = create_app(busy_backend, AppConfig.model_validate(config))
    browser = open_page(size=(390, 844), path="/status", app=app)
    browser.wait(lambda: "Key needed" in browser.text("#state"), "the question")
    assert browser.run("return document.querySelector('#content').hidden")
    browser.keep_picture("status-key")
    browser.type("#key", "wrong")
    browser.click("#ask button")
    browser.wait(lambda: "not known" in browser.text("#refusal"), "the refusal")
    browser.run("document.querySelector('#key').value = ''")
    browser.type("#key", "watch-it")
    browser.click("#ask button")
    browser.wait(lambda: "replicas ready" in browser.text("#state"), "the data")
    assert browser.run("return document.querySelector('#ask').hidden")
    browser.run("location.reload()")
    browser.wait(lambda: "replicas ready" in browser.text("#state"), "the data, no question")
