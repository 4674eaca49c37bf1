"""A new version comes in under load, or is taken back, and no request fails."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.deployments.rollout import Plan, Rollout, RolloutState, load_state
from serve_app.deployments.rollout_compare import Limits
from serve_app.deployments.rollout_scenarios import Scenario

ANSWERS = Scenario.model_validate(
    {
        "name": "answers",
        "max_latency_p95_s": 20,
        "requests": [
            {
                "name": "any",
                "body": {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 4},
                "expect": {"min_tokens": 4, "finish_reason": "length"},
            }
        ],
    }
)
IMPOSSIBLE = Scenario.model_validate(
    {
        "name": "impossible",
        "requests": [
            {
                "name": "word",
                "body": {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 2},
                "expect": {"contains": ["a sentence that nothing answers"]},
            }
        ],
    }
)


class Load:
    """Asks without a pause from several threads until told to stop."""

    def __init__(self, url: str, num_clients: int = 3) -> None:
        self.failures: list[str] = []
        self.num_answers = 0
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        body = {"model": "any", "prompt": "Go", "max_tokens": 5}
        with httpx.Client(timeout=60) as client:
            while not self._is_over.is_set():
                try:
                    response = client.post(f"{self._url}/v1/completions", json=body)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if response.status_code == 200:
                    self.num_answers += 1
                else:
                    self.failures.append(response.text)
                time.sleep(0.02)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def make_rollout(cluster: Any, app: Any, args: dict[str, Any], said: list[str]) -> Rollout:
    from serve_app.deployments.rollout_cluster import find_application

    old = find_application(app.name)
    new = {**old, "args": {**old["args"], **args}}
    state = RolloutState(app.name, "new", old, new)
    cluster.own(state.app_name, state.candidate_name)
    limits = Limits(min_requests=5, latency_ratio=5.0)
    plan = Plan(steps=(30.0,), step_s=30, limits=limits, start_timeout_s=60)
    return Rollout(cluster, state, plan, said.append)


def make_cluster() -> Any:
    """Return a ServeCluster that lets a new version run on when it is taken back.

    The next rollout finds it started, which is the slow part; the promoted one's end shows as much.
    """
    from serve_app.deployments.rollout_cluster import ServeCluster

    class KeepingCluster(ServeCluster):
        kept: tuple[Any, ...] = ()

        def deploy(self, applications: Any) -> None:
            if len(applications) == 1 and self.kept:
                super().deploy([*applications, *self.kept])
                self.kept = ()
            else:
                super().deploy(applications)

        def run_scenarios(self, app_name: str, scenarios: Any) -> Any:
            results = super().run_scenarios(app_name, scenarios)
            if any(result.failures for result in results):
                self.kept = (find_application(app_name),)
            return results

    from serve_app.deployments.rollout_cluster import find_application

    return KeepingCluster()


def test_updates_under_load_fail_no_request(
    deployed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    app = deployed({"ingress": {"num_replicas": 1}})
    load = Load(app.url)
    said: list[str] = []
    args = {"engine": {"fixed_rate_tokens_per_s": 80, "watchdog_min_s": 1.0}}
    try:
        with contextlib.closing(make_cluster()) as cluster:
            assert not make_rollout(cluster, app, args, said).start([IMPOSSIBLE])
            assert load_state(app.name).phase == "failed"

            assert make_rollout(cluster, app, args, said).start([ANSWERS])
            assert load_state(app.name).phase == "done"
    finally:
        load.stop()

    assert load.failures == []
    assert load.num_answers > 50
    from serve_app.deployments.rollout_cluster import find_application

    assert find_application(app.name)["args"]["engine"]["fixed_rate_tokens_per_s"] == 80
    assert any("answers: passed" in line for line in said)
