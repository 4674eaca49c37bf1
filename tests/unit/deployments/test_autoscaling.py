"""The policy on a scripted load and clock, with Serve's own delays and bounds around it."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.config.schema import AppConfig
from serve_app.config.sections_autoscaling import AutoscalingSection
from serve_app.deployments.autoscaling import autoscaling_config, capped
from serve_app.deployments.autoscaling_policy import EngineLoadPolicy


def context(target: int, num_requests: float, **metrics: list[float]) -> SimpleNamespace:
    return SimpleNamespace(
        target_num_replicas=target,
        total_num_requests=num_requests,
        aggregated_metrics={
            name: dict(enumerate(values)) for name, values in metrics.items() if values
        },
        policy_state={},
    )


def wanted(target: int, num_requests: float, **metrics: list[float]) -> float:
    return EngineLoadPolicy(1000, 0.8, 1.0, 8.0)(context(target, num_requests, **metrics))[0]


@pytest.mark.parametrize(
    ("target", "metrics", "expected"),
    [
        (1, {"num_waiting_tokens": [3500.0]}, 4),  # 3.5 replicas' worth of waiting prompts
        (2, {"kv_usage": [0.95, 0.97]}, 3),
        (1, {"ttft_p95_s": [9.0], "num_waiting_tokens": [100.0]}, 2),  # one at a time
        (1, {"ttft_p95_s": [9.0]}, 1),  # nobody waits: another replica would not help
        (2, {"num_waiting_tokens": [1000.0, 1050.0]}, 2),  # within the tolerance
        (3, {"num_waiting_tokens": [100.0] * 3, "kv_usage": [0.2] * 3}, 2),
        (3, {"kv_usage": [0.7] * 3}, 3),  # fewer would be full at once
    ],
)
def test_the_measure_that_is_missed_most_decides(
    target: int, metrics: dict[str, list[float]], expected: int
) -> None:
    streams = {"num_streams": [4.0] * target}
    assert wanted(target, 4.0 * target, **streams, **metrics) == expected


def test_idle_asks_for_none_and_a_waiting_request_wakes() -> None:
    assert wanted(2, 0.0, num_streams=[0.0, 0.0]) == 0
    assert wanted(0, 0.0) == 0
    assert wanted(0, 1.0) == 1
    assert wanted(0, 20.0) == 3


def test_while_a_stream_runs_the_last_replica_stays() -> None:
    assert wanted(1, 0.0, num_streams=[1.0]) == 1


class ScriptedService:
    """Replicas that compute `speed` prompt tokens a second, Serve's delays before each change."""

    def __init__(self, section: AutoscalingSection, speed: float = 1000.0) -> None:
        self.section = section
        self.policy = EngineLoadPolicy(**autoscaling_config(section)["policy"]["policy_kwargs"])
        self.speed = speed
        self.num_replicas = 1
        self.backlog = 0.0
        self.changes: list[tuple[float, int]] = []
        self._window: list[tuple[float, float]] = []
        self._since: tuple[int, float] | None = None

    def run(self, arrivals_per_s: list[tuple[float, float]], step_s: float = 0.5) -> None:
        """Play (seconds, prompt tokens a second) after each other."""
        now = 0.0
        for seconds, rate in arrivals_per_s:
            end = now + seconds
            while now < end:
                now += step_s
                done = self.num_replicas * self.speed * step_s
                self.backlog = max(0.0, self.backlog + rate * step_s - done)
                busy = min(1.0, rate / (self.num_replicas * self.speed))
                self._decide(now, busy if rate else 0.0)

    def _decide(self, now: float, busy: float) -> None:
        section = self.section
        self._window.append((now, self.backlog))
        self._window = [item for item in self._window if now - item[0] < section.look_back_period_s]
        waiting = sum(value for _, value in self._window) / len(self._window)
        count = self.num_replicas
        asked, _ = self.policy(
            context(
                count,
                busy * count * 4,
                num_waiting_tokens=[waiting / count] * count,
                kv_usage=[busy * 0.75] * count,
                ttft_p95_s=[waiting / count / self.speed] * count,
                num_streams=[busy * 4] * count,
            )
        )
        goal = int(min(section.max_replicas, max(section.min_replicas, asked)))
        direction = (goal > count) - (goal < count)
        if self._since is None or self._since[0] != direction:
            self._since = (direction, now)
        delay_s = section.upscale_delay_s if direction > 0 else section.downscale_delay_s
        if direction and now - self._since[1] >= delay_s:
            self.num_replicas, self._since = goal, None
            self.changes.append((now, goal))


def section(**changes: Any) -> AutoscalingSection:
    values = {
        "policy": "engine_load",
        "max_replicas": 4,
        "look_back_period_s": 10.0,
        "upscale_delay_s": 3.0,
        "downscale_delay_s": 30.0,
        "targets": {"waiting_tokens": 1000, "ttft_p95_s": 1.0},
        **changes,
    }
    return AutoscalingSection.model_validate(values)


def test_a_rise_is_answered_within_one_look_back() -> None:
    service = ScriptedService(section())
    service.run([(20, 300), (30, 2500)])

    first_s, count = service.changes[0]
    assert 20 < first_s <= 30
    assert count > 1


def test_a_steady_load_changes_nothing_once_it_is_met() -> None:
    service = ScriptedService(section())
    service.run([(60, 2500), (600, 2500)])

    assert [change for change in service.changes if change[0] > 90] == []
    assert service.num_replicas >= 3
    assert service.backlog < 2000


def test_a_load_that_swings_faster_than_the_delays_does_not_swing_the_replicas() -> None:
    service = ScriptedService(section())
    service.run([(5, 2200), (5, 1400)] * 40)

    late = [count for at_s, count in service.changes if at_s > 60]
    assert len(late) <= 1, late


def test_replicas_go_when_the_load_goes() -> None:
    service = ScriptedService(section())
    service.run([(60, 3500), (200, 200)])

    assert service.num_replicas == 1
    counts = [count for _, count in service.changes]
    peak = counts.index(max(counts))
    assert counts[peak:] == sorted(counts[peak:], reverse=True), "down only, once it went down"


def test_the_policy_travels_without_our_package() -> None:
    from ray.serve.config import AutoscalingPolicy

    values = autoscaling_config(section())["policy"]
    policy = AutoscalingPolicy(**values)
    restored = pickle.loads(policy.get_serialized_policy_def())

    assert restored(**values["policy_kwargs"])(context(0, 5.0))[0] == 1
    assert b"serve_app.core" not in policy.get_serialized_policy_def()


def test_zero_replicas_start_with_one_and_the_default_policy_stays_serves() -> None:
    values = autoscaling_config(section(min_replicas=0, downscale_to_zero_delay_s=5.0))
    assert (values["initial_replicas"], values["downscale_to_zero_delay_s"]) == (1, 5.0)
    assert "policy" not in autoscaling_config(section(policy="ongoing_requests"))


def scaled(pool: str, most: int, num_cards: int = 1, least: int = 1) -> dict[str, Any]:
    bounds = {"min_replicas": least, "max_replicas": most}
    return {"pool": pool, "num_cards": num_cards, "autoscaling": bounds}


@pytest.mark.parametrize(
    ("model_replica", "declared", "expected"),
    [
        (scaled("arc", 8), {"arc_gpu": 3.0}, 3),
        (scaled("arc", 8, num_cards=2), {"arc_gpu": 5.0}, 2),
        (scaled("arc", 2), {"arc_gpu": 4.0}, 2),
        (scaled("cuda", 9), {"GPU": 1.0}, 1),
        (scaled("cpu", 9), {}, 9),
    ],
)
def test_max_replicas_is_no_more_than_the_cards(
    model_replica: dict[str, Any], declared: dict[str, float], expected: int
) -> None:
    config = capped(AppConfig.model_validate({"model_replica": model_replica}), declared)

    assert config.model_replica.autoscaling is not None
    assert config.model_replica.autoscaling.max_replicas == expected


def test_pools_share_the_cards_in_their_order() -> None:
    config = AppConfig.model_validate(
        {
            "pools": [
                {"name": "large", "model_replica": {"pool": "arc", "num_cards": 2}},
                {"name": "small", "model_replica": scaled("arc", 8)},
            ]
        }
    )
    _, small = capped(config, {"arc_gpu": 5.0}).pool_configs()

    assert small.model_replica.autoscaling is not None
    assert small.model_replica.autoscaling.max_replicas == 3
