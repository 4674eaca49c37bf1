"""The end of an application that is told to end: nothing new is taken, what runs goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from serve_app.deployments.handles import call_all
from serve_app.deployments.loop_thread import LoopThread
from serve_app.deployments.options import INGRESS

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
_TOLD_WITHIN_S = 2.0
_POLL_S = 0.1

Ask = Callable[[str], Awaitable[list[Any]]]
"""Calls a method of every ingress replica; returns the answers of those that answer."""


def drain_application(app_name: str, grace_s: float) -> None:
    """Let each ingress replica refuse new requests, and wait for the running ones; blocking.

    New requests get a 503 with the code `draining` for as long as that takes, at most `grace_s`
    seconds; once Serve takes the application down it answers for it, in plain text.
    """
    # Left running: what Serve still tells the handle until the process ends has a place to go.
    LoopThread().run(_drain_ingress(app_name, grace_s))


async def _drain_ingress(app_name: str, grace_s: float) -> None:
    from ray import serve

    handle = serve.get_deployment_handle(INGRESS, app_name)
    await drain(lambda method: call_all(handle, method, _CALL_TIMEOUT_S), grace_s)


async def drain(ask: Ask, grace_s: float, told_within_s: float = _TOLD_WITHIN_S) -> int:
    """Tell the ingress replicas and wait; returns how many requests still ran at the end."""
    deadline_s = time.monotonic() + grace_s
    told_until_s = min(deadline_s, time.monotonic() + told_within_s)
    while not await ask("drain"):
        if time.monotonic() > told_until_s:  # no ingress replica is left to refuse anything
            return 0
        await asyncio.sleep(_POLL_S)  # a new handle hears of the replicas a moment later
    while num_running := sum(state["in_flight"] for state in await ask("state")):
        if time.monotonic() > deadline_s:
            logger.warning("%d requests did not end within %g s", num_running, grace_s)
            break
        await asyncio.sleep(_POLL_S)
    return num_running
