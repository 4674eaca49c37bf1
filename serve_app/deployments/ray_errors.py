"""Ray's and Serve's exceptions as errors of ours, fit to show to a client."""

from __future__ import annotations

import asyncio

from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)

from serve_app.core.errors import EngineError, OverloadedError, XeRayError


def to_xeray_error(error: BaseException, what: str) -> XeRayError:
    """Return `error`, raised by a call to the replica `what`, as an error of ours.

    The message names neither hosts nor tracebacks. Cancellation is never passed here.
    """
    if isinstance(error, XeRayError):
        return error
    if isinstance(error, RayTaskError):
        return _from_cause(error, what)
    if isinstance(error, BackPressureError):
        return OverloadedError(f"every {what} is busy and its queue is full", code="queue_full")
    if isinstance(error, DeploymentUnavailableError):
        return OverloadedError(f"no {what} is available", code="no_replica", retry_after_s=2.0)
    if isinstance(error, RayActorError):
        return EngineError(f"the {what} that worked on this request died")
    if isinstance(error, TaskCancelledError | RequestCancelledError | asyncio.TimeoutError):
        return EngineError(f"the {what} did not finish this request")
    if isinstance(error, RayServeException | RayError | ConnectionError):
        return EngineError(f"the {what} could not be reached")
    return _bug(what)


def is_ray_error(error: BaseException) -> bool:
    """Whether `error` comes from Ray or Serve, rather than being a bug of ours."""
    return isinstance(error, RayError | RayServeException | ConnectionError | XeRayError)


def _from_cause(error: RayTaskError, what: str) -> XeRayError:
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, XeRayError) else _bug(what)


def _bug(what: str) -> XeRayError:
    failure = EngineError(f"the {what} failed on this request")
    failure.is_retryable = False  # the same request would fail again
    return failure
