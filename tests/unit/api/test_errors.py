from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.errors import (
    MAX_MESSAGE_CHARS,
    error_body,
    error_info,
    error_message,
    retry_headers,
)
from serve_app.api.protocol.base import dotted_path
from serve_app.core.errors import ClientError, EngineError, ErrorInfo, OverloadedError


@given(st.text(), st.sampled_from([ClientError, EngineError]))
def test_any_message_becomes_one_short_line(message, kind):
    shown = error_info(kind(message)).message
    assert 0 < len(shown) <= MAX_MESSAGE_CHARS
    assert "\n" not in shown
    assert "\x00" not in shown


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("open /opt/models/a.gguf: no", "open <path>: no"),
        (r"open C:\models\a.gguf now", "open <path> now"),
        ("and/or 3/4 of it", "and/or 3/4 of it"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_server_errors_lose_their_paths(message, shown):
    assert error_info(EngineError(message)).message == shown


def test_client_errors_may_name_routes():
    assert error_info(ClientError("use /v1/models")).message == "use /v1/models"


def test_the_request_id_is_a_sentence_of_its_own():
    info = ErrorInfo(500, "server_error", "internal_error", "no step ran")
    assert error_message(info, "id-1") == "no step ran. Request id: id-1"


def test_codes_are_strings_and_the_request_id_is_told_with_a_500():
    info = ErrorInfo(500, "server_error", "internal_error", "Broken.")
    body = error_body(info, "id-1")["error"]
    assert body == {
        "message": "Broken. Request id: id-1",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


def test_retry_after_is_rounded_up_and_exact_in_milliseconds():
    headers = retry_headers(error_info(OverloadedError("full", retry_after_s=1.25)))
    assert headers == {"Retry-After": "2", "retry-after-ms": "1250", "x-should-retry": "true"}


def test_dotted_path_drops_the_tags_of_unions():
    assert dotted_path(("messages", 0, "content", "(parts)", 1, "type")) == (
        "messages.0.content.1.type"
    )
