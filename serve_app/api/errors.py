"""The one place where an exception becomes an answer: OpenAI's error body, sanitised and capped."""

from __future__ import annotations

import json
import logging
import math
import re

from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve_app.core.errors import (
    ClientError,
    ConfigError,
    ErrorInfo,
    MethodNotAllowedError,
    NotFoundError,
    XeRayError,
)
from serve_app.observability.metrics import IngressMetrics
from serve_app.observability.tracing import current_span

_logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 500
_INTERNAL = "Internal error; the server's log has the details under this request's id."
_PATH = re.compile(r"(?<![\w/.:])(?:[A-Za-z]:\\|/)(?:[\w.+@-]+[/\\])+[\w.+@-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class ClientDisconnectedError(Exception):
    """Nobody listens any more; nothing is answered. Logged as status 499."""


def error_info(error: BaseException) -> ErrorInfo:
    """Return what a client may know of `error`; anything that is not ours is an internal error."""
    if isinstance(error, HTTPException):
        error = _from_http_exception(error)
    if not isinstance(error, XeRayError) or isinstance(error, ConfigError):
        return ErrorInfo(500, "server_error", "internal_error", _INTERNAL)
    info = error.info()
    return ErrorInfo(
        status=info.status if 400 <= info.status <= 599 else 500,
        type=info.type,
        code=str(info.code),
        message=_sanitise(info.message, info.status),
        param=None if info.param is None else info.param[:200],
        retry_after_s=info.retry_after_s,
        is_retryable=info.is_retryable,
    )


def error_message(info: ErrorInfo, request_id: str = "") -> str:
    """Return the message; a 500 tells the request id, so that a report can name it."""
    if info.status == 500 and request_id:
        return f"{info.message.removesuffix('.')}. Request id: {request_id}"
    return info.message


def error_body(info: ErrorInfo, request_id: str = "") -> dict[str, object]:
    """Return OpenAI's error body."""
    return {
        "error": {
            "message": error_message(info, request_id),
            "type": info.type,
            "param": info.param,
            "code": info.code,
        }
    }


def error_response(error: BaseException, request_id: str = "") -> Response:
    """Return the answer to `error` and log it: bugs with their traceback, the rest in one line."""
    info = error_info(error)
    log_error(error, info)
    headers = retry_headers(info)
    if isinstance(error, HTTPException) and error.headers:
        headers.update({key: error.headers[key] for key in error.headers if key == "Allow"})
    if info.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(info, request_id), info.status, headers)


def error_event(error: BaseException, request_id: str = "") -> bytes:
    """Return the stream's event for an error after the first token."""
    info = error_info(error)
    log_error(error, info)
    return b"data: " + json.dumps(error_body(info, request_id)).encode() + b"\n\n"


def note_error(
    metrics: IngressMetrics, endpoint: str, request_id: str, error: BaseException
) -> None:
    """Remember an error for the status page and the request's span: its type, never its text."""
    info = error_info(error)
    metrics.activity.note_error(info.status, info.type, info.code, endpoint, request_id)
    if info.status >= 500:
        current_span().fail(info.code)


def retry_headers(info: ErrorInfo) -> dict[str, str]:
    """Return what tells a client whether and when to try again (openai-python reads all three).

    A deadline is not worth a second try: the work was long, and would be as long again.
    """
    if info.status in (429, 503):
        wait_s = 1.0 if info.retry_after_s is None else info.retry_after_s
        return {
            "Retry-After": str(max(1, math.ceil(wait_s))),
            "retry-after-ms": str(max(1, round(wait_s * 1000))),
            "x-should-retry": "true",
        }
    if info.status >= 500:
        return {"x-should-retry": "true" if info.is_retryable else "false"}
    return {}


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return `body` as JSON."""
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(content, status, headers, "application/json")


def log_error(error: BaseException, info: ErrorInfo) -> None:
    """Log what went wrong at the level it deserves; never the request's content."""
    if isinstance(error, XeRayError | HTTPException):
        level = logging.INFO if info.status < 500 else logging.WARNING
        where = f" param={info.param}" if info.param else ""
        text = info.message if info.status < 500 else str(error)
        _logger.log(level, "%d %s%s: %s", info.status, info.code, where, text)
    else:
        _logger.error("unexpected %s", type(error).__name__, exc_info=error)


def _from_http_exception(error: HTTPException) -> XeRayError:
    if error.status_code == 404:
        return NotFoundError("There is no such route.")
    if error.status_code == 405:
        return MethodNotAllowedError("This route does not take that method.")
    if 400 <= error.status_code < 500:
        return ClientError("The request could not be read.")
    return XeRayError(_INTERNAL)


def _sanitise(message: str, status: int) -> str:
    # The first line only: a traceback that slipped into a message starts with a line of its own.
    line = _CONTROL.sub(" ", message.split("\n", 1)[0]).strip()
    if status >= 500:
        line = _PATH.sub("<path>", line)
    if not line:
        return _INTERNAL
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"
