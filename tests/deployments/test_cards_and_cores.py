"""Cards and cores belong to one replica at a time, however the last owner died."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import httpx

TWO_CARDS = {"model_replica": {"pool": "arc", "num_replicas": 2}}
NUM_KILLS = 10


def cards_of(states: list[Any]) -> list[int]:
    return sorted(index for state in states for index in state["card_indices"])


def test_two_replicas_never_share_a_card(deployed: Callable[..., Any]) -> None:
    app = deployed(TWO_CARDS)
    states = app.wait_states("ModelReplica", lambda s: len(s) == 2)
    assert cards_of(states) == [0, 1]

    for round_number in range(NUM_KILLS):
        victim = sorted(states, key=lambda s: s["card_indices"])[round_number % 2]
        survivor = next(s for s in states if s["pid"] != victim["pid"])

        app.kill(victim["pid"])

        states = app.wait_states(
            "ModelReplica",
            lambda s, gone=victim["pid"]: len(s) == 2 and gone not in {x["pid"] for x in s},
        )
        assert cards_of(states) == [0, 1]
        kept = next(s for s in states if s["pid"] == survivor["pid"])
        assert kept["card_indices"] == survivor["card_indices"]
    assert app.chat().status_code == 200
    health = httpx.get(f"{app.url}/health", timeout=10).json()
    assert health["status"] == "ready"


def test_preprocessors_have_cores_of_their_own(deployed: Callable[..., Any]) -> None:
    app = deployed({"preprocessor": {"num_replicas": 2, "xeon_cores": 1}})

    states = app.wait_states("Preprocessor", lambda s: len(s) == 2)

    first, second = (set(state["cpu_ids"]) for state in states)
    assert first
    assert second
    assert not first & second
    for state in states:
        assert state["affinity"] == state["cpu_ids"], "the process runs there and nowhere else"
    assert app.chat().status_code == 200


def test_an_engine_has_the_priority_of_what_started_ray(deployed: Callable[..., Any]) -> None:
    """Ray's own default, niceness 15, leaves it a thirtieth of a core that others want too."""
    engine_pid = deployed({}).one("ModelReplica")["engine_pid"]

    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, engine_pid) == own


def test_a_service_for_which_no_core_is_left_does_not_start(deployed: Callable[..., Any]) -> None:
    """Another service's preprocessors hold every core: one line, not a 503 for every client."""
    from ray import serve

    from serve_app.hardware.affinity import claim_cores, physical_cores

    num_cores = len(physical_cores())
    others = claim_cores(num_cores, role="preprocessor", timeout_s=30)
    try:
        app = deployed(wait=False)
        deadline_s = time.monotonic() + 60
        while (status := serve.status().applications[app.name]).status != "DEPLOY_FAILED":
            assert time.monotonic() < deadline_s, status
            time.sleep(0.2)
    finally:
        others.release()

    assert (
        f"preprocessor.xeon_cores: 1 of this host's {num_cores} cores needed, but 0 free; the"
        f" others are held by pid {os.getpid()}" in status.message
    )
    assert "end that service, or lower preprocessor.num_replicas" in status.message
    assert not status.deployments, "nothing of it runs, so nothing answers"
