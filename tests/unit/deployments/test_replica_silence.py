"""Calls to replicas that are paused or cut off, and what asks all replicas in spite of one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve_app.core.clock import ManualClock
from serve_app.core.errors import EngineError
from serve_app.deployments.handles import call_all
from serve_app.deployments.replica_silence import SILENT_S, SilenceWatch


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


async def test_only_a_silent_call_of_a_silent_replica_is_given_up(clock: ManualClock) -> None:
    watch = SilenceWatch(clock.now)
    silent, busy, other, unknown = (watch.add(name) for name in ("a", "a", "b", None))
    gone = watch.add("a")
    watch.remove(gone)

    clock.advance(SILENT_S + 1)
    busy.heard()
    watch.update({"b"})

    assert [call.lost.done() for call in (silent, busy, other, unknown, gone)] == [
        True,
        False,
        False,
        False,
        False,
    ]


async def test_a_given_up_call_raises_a_retryable_error(clock: ManualClock) -> None:
    watch = SilenceWatch(clock.now)
    call = watch.add("a")
    reading: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    racing = asyncio.ensure_future(call.race(reading))
    await asyncio.sleep(0)

    clock.advance(SILENT_S + 1)
    watch.update(set())

    with pytest.raises(EngineError, match="does not answer") as failure:
        await racing
    assert failure.value.is_retryable
    assert reading.cancelled()


async def test_what_comes_in_time_is_returned_and_counts_as_heard(clock: ManualClock) -> None:
    call = SilenceWatch(clock.now).add("a")
    reading: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    clock.advance(2.0)
    reading.set_result(7)

    assert await call.race(reading) == 7
    assert call.heard_s == clock.now()


async def test_leaving_a_race_cancels_the_reading(clock: ManualClock) -> None:
    call = SilenceWatch(clock.now).add("a")
    reading: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    racing = asyncio.ensure_future(call.race(reading))
    await asyncio.sleep(0)

    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing

    assert reading.cancelled()


class Replica:
    """One replica's part of a broadcast."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def get_async(self) -> Any:
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class Handle:
    """A Serve handle as far as a broadcast goes; `None` hangs."""

    def __init__(self, *answers: Any) -> None:
        self._answers = answers

    def broadcast(self, method: str) -> Handle:
        return self

    async def _fetch_replica_results_async(self) -> list[Replica]:
        return [Replica(answer) for answer in self._answers]


@pytest.mark.parametrize(
    ("answers", "heard"),
    [((1, None, 2), [1, 2]), ((1, ValueError("died")), [1]), ((None,), []), ((), [])],
)
async def test_a_replica_that_hangs_hides_no_other(answers: Any, heard: list[int]) -> None:
    assert await call_all(Handle(*answers), "health", 0.05) == heard  # type: ignore[arg-type]
