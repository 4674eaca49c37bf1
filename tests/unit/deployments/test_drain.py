from __future__ import annotations

from typing import Any

import pytest

from serve_app.deployments import drain as module
from serve_app.deployments.drain import drain


class FakeIngress:
    """Two replicas that a new handle does not know at once; their requests end one by one."""

    def __init__(self, in_flight: list[int], unknown_for: int = 0) -> None:
        self.in_flight = in_flight
        self.unknown_for = unknown_for
        self.asked: list[str] = []

    async def ask(self, method: str) -> list[Any]:
        self.asked.append(method)
        if self.unknown_for:
            self.unknown_for -= 1
            return []
        if method == "drain":
            return [None for _ in self.in_flight]
        states = [{"in_flight": count} for count in self.in_flight]
        self.in_flight = [max(0, count - 1) for count in self.in_flight]
        return states


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.0)


async def test_it_waits_until_nothing_runs_any_more() -> None:
    ingress = FakeIngress([3, 1], unknown_for=2)
    assert await drain(ingress.ask, grace_s=60) == 0
    assert ingress.asked == ["drain"] * 3 + ["state"] * 4


async def test_the_grace_time_bounds_the_wait() -> None:
    ingress = FakeIngress([10**9, 0])
    assert await drain(ingress.ask, grace_s=0.01) > 0


async def test_without_an_ingress_there_is_nothing_to_wait_for() -> None:
    ingress = FakeIngress([5], unknown_for=10**9)
    assert await drain(ingress.ask, grace_s=60, told_within_s=0.01) == 0
    assert "state" not in ingress.asked
