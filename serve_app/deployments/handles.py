"""Calls through Serve handles: to one replica with a retry, and to all replicas of a deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.core.errors import OverloadedError
from serve_app.deployments.ray_errors import to_xeray_error
from serve_app.deployments.ray_private import replica_calls

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_MAX_ATTEMPTS = 3


async def call_one(call: Callable[[], Awaitable[_T]], what: str, timeout_s: float) -> _T:
    """Await `call()`, again where the replica died under it; for calls that may run twice.

    Raises an error of ours: OverloadedError where no replica answers within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            for attempt in range(1, _MAX_ATTEMPTS + 1):
                try:
                    return await call()
                except RayActorError as error:
                    if attempt == _MAX_ATTEMPTS:
                        raise to_xeray_error(error, what) from None
                    logger.warning("a %s died under a call; trying another", what)
                except Exception as error:
                    raise to_xeray_error(error, what) from error
    except TimeoutError:
        raise OverloadedError(
            f"no {what} answered within {timeout_s:g} s", code="no_replica", retry_after_s=2.0
        ) from None
    raise AssertionError("unreachable")


async def call_all(
    handle: DeploymentHandle, method: str, timeout_s: float, *args: Any
) -> list[Any]:
    """Return the answers of every replica that answers within `timeout_s`; [] where there is none.

    Replicas that fail or hang are left out: they must not hide the others.
    """
    try:
        broadcast = handle.broadcast(method, *args)
        async with asyncio.timeout(timeout_s):
            calls = await replica_calls(broadcast)
            if calls is None:
                results = await broadcast.results_async(return_exceptions=True)
                return [result for result in results if not isinstance(result, BaseException)]
    except (RayServeException, TimeoutError):
        return []
    if not calls:
        return []
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.wait(tasks, timeout=timeout_s)
    finally:
        for task in tasks:
            task.cancel()
    ended = [task for task in tasks if task.done() and not task.cancelled()]
    return [task.result() for task in ended if task.exception() is None]
