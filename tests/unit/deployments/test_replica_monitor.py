import pytest

from serve_app.core.clock import ManualClock
from serve_app.core.requests import ReplicaHealth
from serve_app.deployments.replica_monitor import MISSED_S, ReplicaMonitor


class Replicas:
    """What the replicas would answer."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}

    async def ask(self) -> list[ReplicaHealth]:
        return [ReplicaHealth(name, state) for name, state in self.states.items()]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
def monitor(replicas: Replicas, clock: ManualClock) -> ReplicaMonitor:
    return ReplicaMonitor(replicas.ask, clock.now)


async def test_before_the_first_replica_it_is_loading(monitor: ReplicaMonitor) -> None:
    await monitor.refresh()

    assert monitor.health().status == "loading"
    assert monitor.unavailable().code == "model_loading"


async def test_once_ready_and_gone_there_is_no_replica(
    monitor: ReplicaMonitor, replicas: Replicas, clock: ManualClock
) -> None:
    replicas.states = {"a": "ready"}
    await monitor.refresh()
    assert monitor.health().is_ready

    replicas.states = {}
    await monitor.refresh()
    assert monitor.has_live_replica(), "one missed answer is not the end"
    clock.advance(MISSED_S)
    assert not monitor.has_live_replica()
    assert monitor.health().status == "no_replica"
    assert monitor.unavailable().code == "no_replica"


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["ready", "stuck"], "ready"),
        (["loading", "dead"], "loading"),
        (["stuck"], "stuck"),
        (["dead"], "dead"),
        (["draining"], "draining"),
    ],
)
async def test_the_best_state_counts(
    monitor: ReplicaMonitor, replicas: Replicas, states: list[str], status: str
) -> None:
    replicas.states = {str(i): state for i, state in enumerate(states)}
    await monitor.refresh()

    assert monitor.health().status == status
    assert monitor.health().is_ready == (status == "ready")
    assert len(monitor.health().replicas) == len(states)


async def test_draining_is_told_whatever_the_replicas_are(
    monitor: ReplicaMonitor, replicas: Replicas
) -> None:
    replicas.states = {"a": "ready"}
    await monitor.refresh()
    monitor.is_draining = True

    assert (monitor.health().status, monitor.health().is_ready) == ("draining", False)
