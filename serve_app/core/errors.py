"""The error tree: what XeRay raises, and what each error looks like to a client.

::

    XeRayError                     anything of ours; has an HTTP status, a type and a code
    ├── ClientError                the request is at fault (400); names the parameter
    │   ├── ContextLengthError     prompt (plus what is asked for) exceeds the model's context
    │   ├── UnsupportedParameterError   known parameter, but this server or engine lacks it
    │   ├── NotFoundError          no such model or route (404)
    │   ├── MethodNotAllowedError  the route exists, the method does not (405)
    │   ├── AuthenticationError    missing or bad key (401)
    │   ├── PermissionDeniedError  the key lacks the model or scope (403)
    │   ├── RequestTooLargeError   body over the limit (413)
    │   └── RateLimitError         per-key limit (429)
    ├── OverloadedError            queue full, loading, draining, no replica (503 + Retry-After)
    ├── DeadlineError              the server-side deadline passed (504)
    ├── EngineError                the engine failed on this request or died (500)
    └── ConfigError                start-up: bad config, model file or resources; names the fix

An error crosses a process boundary as an `ErrorInfo` (frozen, plain values), never as a pickled
exception: `error.info()` on the way out, `error_from_info(info)` on the way in.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as plain values: what the OpenAI error body, the log line and a retry need.

    `is_retryable` tells the ingress that another replica may succeed with the same request.
    `retry_after_s` is seconds for the Retry-After header, or None.
    """

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    is_retryable: bool = False


class XeRayError(Exception):
    """Base of every error that XeRay raises on purpose. The message is safe to show to a client."""

    status = 500
    type = "server_error"
    code = "internal_error"
    is_retryable = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code

    def info(self) -> ErrorInfo:
        """Return the error as plain values."""
        return ErrorInfo(
            status=self.status,
            type=self.type,
            code=self.code,
            message=self.message,
            param=self.param,
            retry_after_s=self.retry_after_s,
            is_retryable=self.is_retryable,
        )


class ClientError(XeRayError):
    """The request is at fault; `param` names the parameter."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(ClientError):
    """The prompt, or the prompt and what is asked for, does not fit the model's context."""

    code = "context_length_exceeded"


class UnsupportedParameterError(ClientError):
    """A known parameter that would change the output, but that this server or engine lacks."""

    code = "unsupported_parameter"


class NotFoundError(ClientError):
    """No such model (`model_not_found`) or route (`not_found`)."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class MethodNotAllowedError(ClientError):
    """The route exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class AuthenticationError(ClientError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDeniedError(ClientError):
    """The API key lacks the model or the scope."""

    status = 403
    type = "permission_error"
    code = "not_allowed"


class RequestTooLargeError(ClientError):
    """The body is over `ingress.max_body_bytes`."""

    status = 413
    code = "request_too_large"


class RateLimitError(ClientError):
    """A per-key limit is reached."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class OverloadedError(XeRayError):
    """No capacity now (`queue_full`, `model_loading`, `draining`, `no_replica`); retry it."""

    status = 503
    type = "overloaded_error"
    code = "queue_full"
    is_retryable = True

    def __init__(
        self, message: str, *, code: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)


class DeadlineError(XeRayError):
    """The server-side deadline passed before the answer was complete."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class EngineError(XeRayError):
    """The engine failed on this request, died or was killed by the watchdog."""

    is_retryable = True


class ConfigError(XeRayError):
    """Start-up cannot go on: the message is one line that names the cause and the fix."""

    code = "config_error"


_BY_CODE: dict[tuple[int, str], type[XeRayError]] = {
    (cls.status, cls.type): cls
    for cls in (
        NotFoundError,
        AuthenticationError,
        PermissionDeniedError,
        RateLimitError,
        OverloadedError,
        DeadlineError,
        EngineError,
    )
}
_CLIENT_BY_CODE: dict[str, type[ClientError]] = {
    cls.code: cls
    for cls in (
        ContextLengthError,
        UnsupportedParameterError,
        MethodNotAllowedError,
        RequestTooLargeError,
        ClientError,
    )
}


def error_from_info(info: ErrorInfo) -> XeRayError:
    """Rebuild the exception that `info` was taken from; unknown kinds become `EngineError`."""
    cls: type[XeRayError] = (
        _BY_CODE.get((info.status, info.type)) or _CLIENT_BY_CODE.get(info.code) or EngineError
    )
    error = cls.__new__(cls)
    XeRayError.__init__(
        error, info.message, param=info.param, code=info.code, retry_after_s=info.retry_after_s
    )
    return error
