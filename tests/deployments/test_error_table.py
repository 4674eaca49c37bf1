"""The rows of the error table that need a service of their own settings, over a real socket.

The other rows (bad JSON, unknown route, body too large, …) are in tests/e2e/test_http.py; a dead
engine and a full queue under load are in test_failures.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx
import pytest

NARROW: dict[str, Any] = {
    "model": {"aliases": ["house-model"], "max_model_len": 64},
    "ingress": {"request_timeout_s": 3.0, "max_body_bytes": 2000},
    "engine": {"fixed_rate_tokens_per_s": 5, "max_num_seqs": 1},
    "model_replica": {"max_queued_requests": 0},
}
MESSAGES = [{"role": "user", "content": "Hi"}]


def check_error(
    response: httpx.Response, status: int, error_type: str, code: str
) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (error_type, code)
    assert response.headers["x-request-id"]
    assert "Traceback" not in response.text
    assert "/" not in error["message"].replace("/v1/", ""), "no path"
    return error


@pytest.fixture(scope="module")
def narrow(shared_serve: Any) -> Any:
    """A service with no alias for every name, a short context, one place and a short deadline."""
    app = shared_serve.deploy(NARROW)
    yield app
    app.delete()


def ask(app: Any, **changes: Any) -> httpx.Response:
    body = {"model": "house-model", "messages": MESSAGES, "max_tokens": 1, **changes}
    return httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=60)


def test_a_name_of_the_config_is_served(narrow: Any) -> None:
    assert ask(narrow).status_code == 200


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_another_model_is_not_found(narrow: Any, path: str) -> None:
    body = {"model": "gpt-4o", "messages": MESSAGES, "prompt": "Hi", "max_tokens": 1}

    response = httpx.post(f"{narrow.url}/v1/{path}", json=body, timeout=30)

    error = check_error(response, 404, "not_found_error", "model_not_found")
    assert error["param"] == "model"
    assert "house-model" in error["message"] or "SmolLM2" in error["message"]


def test_another_model_has_no_card(narrow: Any) -> None:
    response = httpx.get(f"{narrow.url}/v1/models/nobody/nothing", timeout=30)

    check_error(response, 404, "not_found_error", "model_not_found")


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"temperature": "warm"}, 400, "invalid_value", "temperature"),
        ({"messages": None}, 400, "invalid_value", "messages"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"modalities": ["audio"]}, 400, "unsupported_parameter", "modalities"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded", None),
    ],
)
def test_what_is_wrong_with_a_request_is_named(
    narrow: Any, changes: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    error = check_error(ask(narrow, **changes), status, "invalid_request_error", code)

    assert param is None or error["param"] == param


def test_a_prompt_beyond_the_context(narrow: Any) -> None:
    messages = [{"role": "user", "content": "word " * 100}]

    check_error(
        ask(narrow, messages=messages), 400, "invalid_request_error", "context_length_exceeded"
    )


def test_a_body_over_the_limit(narrow: Any) -> None:
    messages = [{"role": "user", "content": "word " * 1000}]

    check_error(ask(narrow, messages=messages), 413, "invalid_request_error", "request_too_large")


def test_administration_from_elsewhere_is_refused(narrow: Any) -> None:
    response = httpx.get(
        f"{narrow.url}/admin/stats", headers={"Host": "elsewhere.example"}, timeout=30
    )

    check_error(response, 403, "permission_error", "not_allowed")


def test_a_deadline_that_passes(narrow: Any) -> None:
    check_error(ask(narrow, max_tokens=30), 504, "timeout_error", "deadline_exceeded")


def test_a_full_queue_and_a_drain(narrow: Any) -> None:
    """Last of this service: it takes nothing after the drain."""
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(ask, narrow, max_tokens=12)
        narrow.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 1)
        response = ask(narrow)
        assert running.result(timeout=30).status_code == 200

    check_error(response, 503, "overloaded_error", "queue_full")
    assert int(response.headers["retry-after"]) >= 1
    assert httpx.post(f"{narrow.url}/admin/drain", timeout=10).status_code == 200
    refused = ask(narrow)
    check_error(refused, 503, "overloaded_error", "draining")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_model_that_is_loading(deployed: Callable[..., Any]) -> None:
    """The replica waits for a card that this test holds, while the ingress answers already."""
    from serve_app.hardware.card_lock import acquire_all, release_all

    cards = acquire_all(["arc-0", "arc-1"], timeout_s=30)
    try:
        app = deployed({"model_replica": {"pool": "arc"}}, wait=False)
        response = wait_for_the_ingress(app)
        ready = httpx.get(f"{app.url}/readyz", timeout=10)
    finally:
        release_all(cards)

    check_error(response, 503, "overloaded_error", "model_loading")
    assert int(response.headers["retry-after"]) >= 1
    assert ready.status_code == 503
    app.wait_ready()
    assert app.chat().status_code == 200


def wait_for_the_ingress(app: Any) -> httpx.Response:
    """Ask until the answer is the application's own; Serve's proxy answers in plain text."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        response = app.chat()
        if response.headers.get("x-request-id") and response.status_code != 404:
            return cast(httpx.Response, response)
        time.sleep(0.1)
    raise AssertionError("the ingress did not answer")
