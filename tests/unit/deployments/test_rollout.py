from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.core.errors import ConfigError
from serve_app.deployments.rollout import (
    Plan,
    Rollout,
    RolloutState,
    candidate_of,
    has_open_rollout,
    is_candidate,
    load_state,
    new_tag,
    with_canary,
    without_canary,
)
from serve_app.deployments.rollout_compare import Limits, VersionReport, compare
from serve_app.deployments.rollout_scenarios import (
    Expectation,
    Scenario,
    ScenarioResult,
    bundled_scenarios,
    check_answer,
    load_scenario,
    run_scenario,
)

OLD = {"name": "app", "import_path": "serve_app:build_app", "args": {"engine": {"block_size": 16}}}
NEW = {**OLD, "args": {"engine": {"block_size": 32}}}
GOOD = VersionReport(100, 0, 0.1, 1.0, 100)


class FakeCluster:
    """Remembers what was deployed; answers what it was given."""

    def __init__(self, *, canary: VersionReport = GOOD, failures: Sequence[str] = ()) -> None:
        self.deployed: list[list[dict[str, Any]]] = []
        self.shares: list[float] = []
        self.canary = canary
        self.failures = tuple(failures)
        self.start_error: ConfigError | None = None

    def deploy(self, applications: Sequence[dict[str, Any]]) -> None:
        self.deployed.append(list(applications))

    def await_ready(self, app_name: str, timeout_s: float) -> None:
        if self.start_error is not None:
            raise self.start_error

    def await_share(self, app_name: str, percent: float) -> None:
        self.shares.append(percent)

    def reports(self, app_name: str) -> dict[str, VersionReport]:
        return {"stable": GOOD, "canary": self.canary}

    def run_scenarios(self, app_name: str, scenarios: Sequence[Scenario]) -> list[ScenarioResult]:
        assert app_name == "app-next"
        return [ScenarioResult(s.name, 1, 0.1, self.failures) for s in scenarios]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(cluster: FakeCluster, plan: Plan | None = None) -> tuple[bool, RolloutState, list[str]]:
    said: list[str] = []
    clock = iter(range(10_000))
    rollout = Rollout(
        cluster,
        RolloutState("app", "new", OLD, NEW),
        plan or Plan(steps=(10.0, 50.0)),
        said.append,
        sleep=lambda _: None,
        now=lambda: float(next(clock)),
    )
    is_in = rollout.start([load_scenario("chat")])
    return is_in, load_state("app"), said


def names(applications: list[dict[str, Any]]) -> list[str]:
    return [application["name"] for application in applications]


def test_a_good_version_takes_all_requests_and_then_the_application() -> None:
    cluster = FakeCluster()
    is_in, state, _ = run(cluster)

    assert is_in
    assert state.phase == "done"
    assert cluster.shares == [10.0, 50.0, 100.0, 100.0, 0.0]
    assert cluster.deployed[-1] == [NEW]
    assert names(cluster.deployed[0]) == ["app", "app-next"]
    # Until it has all requests, the application itself stays as it was.
    main = [next(a for a in apps if a["name"] == "app") for apps in cluster.deployed]
    sizes = [application["args"]["engine"]["block_size"] for application in main]
    assert sizes == sorted(sizes)
    assert sizes[:4] == [16, 16, 16, 16]


@pytest.mark.parametrize(
    ("cluster", "phase", "shares", "reason"),
    [
        (FakeCluster(failures=["lacks Paris"]), "failed", [], "lacks Paris"),
        (FakeCluster(canary=VersionReport(50, 5, 0.1, 1.0, 45)), "rolled_back", [10.0], "5 of 50"),
        (FakeCluster(canary=VersionReport(50, 0, 0.9, 1.0, 50)), "rolled_back", [10.0], "ttft"),
        (FakeCluster(canary=VersionReport(2)), "rolled_back", [10.0], "too few"),
    ],
)
def test_a_bad_version_ends_where_it_shows(
    cluster: FakeCluster, phase: str, shares: list[float], reason: str
) -> None:
    is_in, state, _ = run(cluster)

    assert not is_in
    assert state.phase == phase
    assert reason in state.reason
    assert cluster.deployed[-1] == [OLD]
    assert cluster.shares == shares + [0.0] * bool(shares)
    assert not has_open_rollout("app")


def test_the_ingress_hears_of_the_new_version_when_it_is_there() -> None:
    """Until then it can make no handle to it, and Serve would replace an ingress that fails."""
    cluster = FakeCluster()
    run(cluster)

    first, second = (next(a for a in apps if a["name"] == "app") for apps in cluster.deployed[:2])
    assert first == OLD
    assert second["deployments"][0]["user_config"]["canary"]["percent"] == 10.0


def test_a_version_that_does_not_start_leaves_the_old_one_alone() -> None:
    cluster = FakeCluster()
    cluster.start_error = ConfigError("no such file")
    is_in, state, _ = run(cluster)

    assert (is_in, state.phase, state.reason) == (False, "failed", "no such file")
    assert cluster.deployed[-1] == [OLD]


def test_a_rollout_may_hold_for_a_person() -> None:
    cluster = FakeCluster()
    is_in, state, _ = run(cluster, Plan(steps=(25.0,), hold=True))

    assert is_in
    assert (state.phase, state.percent) == ("holding", 25.0)
    assert has_open_rollout("app")
    Rollout(cluster, state, Plan(), print, sleep=lambda _: None).rollback("asked for")
    assert load_state("app").phase == "rolled_back"


def test_a_share_that_may_have_been_taken_is_given_back_before_the_new_version_ends() -> None:
    class Deaf(FakeCluster):
        def await_share(self, app_name: str, percent: float) -> None:
            super().await_share(app_name, percent)
            if percent:
                raise ConfigError("the ingress did not answer")

    cluster = Deaf()
    is_in, state, _ = run(cluster)
    assert (is_in, state.phase, state.percent) == (False, "rolled_back", 0.0)
    assert cluster.shares == [10.0, 0.0]
    assert names(cluster.deployed[-2]) == ["app", "app-next"]
    assert cluster.deployed[-1] == [OLD]


def test_a_promotion_that_broke_off_goes_back_when_the_old_replicas_are_there_again() -> None:
    class Slow(FakeCluster):
        def await_ready(self, app_name: str, timeout_s: float) -> None:
            steps.append(f"{app_name} ready")
            if steps == ["app-next ready", "100 %", "app ready"]:
                raise ConfigError("not ready in time")

        def await_share(self, app_name: str, percent: float) -> None:
            steps.append(f"{percent:g} %")

    steps: list[str] = []
    cluster = Slow()
    plan = Plan(steps=())
    with pytest.raises(ConfigError):
        run(cluster, plan)
    state = load_state("app")
    assert (state.phase, state.percent) == ("promoting", 100.0)

    steps.clear()
    Rollout(cluster, state, plan, print, sleep=lambda _: None).rollback("asked for")
    assert steps == ["app ready", "0 %"]
    assert names(cluster.deployed[-2]) == ["app", "app-next"]
    assert cluster.deployed[-1] == [OLD]


def test_an_interrupt_takes_the_new_version_back() -> None:
    class Interrupted(FakeCluster):
        def reports(self, app_name: str) -> dict[str, VersionReport]:
            raise KeyboardInterrupt

    cluster = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(cluster)
    assert cluster.deployed[-1] == [OLD]
    assert load_state("app").phase == "rolled_back"


def test_a_second_application_has_a_name_of_its_own() -> None:
    state = RolloutState("app", "new", OLD, NEW, tag=new_tag())
    assert state.candidate_name != RolloutState("app", "new", OLD, NEW, tag="1").candidate_name
    assert is_candidate(state.candidate_name)
    assert is_candidate("app-next")
    assert is_candidate(state.candidate_name, of="app")
    assert not is_candidate(state.candidate_name, of="other")
    assert not is_candidate("app")
    assert not is_candidate("my-next-model")


def test_the_second_application_has_no_route_and_one_ingress() -> None:
    application = {
        **NEW,
        "args": {"ingress": {"autoscaling": {"max_replicas": 3}, "max_n": 4}},
        "deployments": [{"name": "Ingress", "num_replicas": 2}, {"name": "Preprocessor"}],
    }
    candidate = candidate_of(application, "app-next")

    assert (candidate["name"], candidate["route_prefix"]) == ("app-next", None)
    assert candidate["args"]["ingress"] == {"max_n": 4, "num_replicas": 1}
    assert candidate["deployments"] == [{"name": "Preprocessor"}]


@pytest.mark.parametrize("deployments", [None, [{"name": "Ingress", "num_replicas": 2}]])
def test_a_canary_can_be_taken_out_again(deployments: Any) -> None:
    application = {**OLD} if deployments is None else {**OLD, "deployments": deployments}
    canary = {"application": "app-next", "percent": 5.0}

    changed = with_canary(application, canary)
    ingress = next(d for d in changed["deployments"] if d["name"] == "Ingress")
    assert ingress["user_config"] == {"canary": canary}
    assert without_canary(changed) == application


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (VersionReport(100, 0, 0.1, 1.0, 100), "better_or_equal"),
        (VersionReport(100, 1, 0.1, 1.0, 99), "better_or_equal"),
        (VersionReport(100, 2, 0.1, 1.0, 98), "worse"),
        (VersionReport(4, 3, 0.1, 1.0, 1), "worse"),  # no need to lose more requests
        (VersionReport(4, 1, 0.1, 1.0, 3), "too_few"),
        (VersionReport(40, 0, 0.1, 0.0, 0), "too_few"),  # all have begun, none has ended
        (VersionReport(40, 0, 0.1, 1.6, 20), "worse"),
        (VersionReport(100, 0, 0.14, 1.4, 100), "better_or_equal"),
        (VersionReport(100, 0, 0.1, 1.6, 100), "worse"),
        (VersionReport(100, 0, 0.16, 1.0, 100), "worse"),
    ],
)
def test_versions_are_compared(new: VersionReport, verdict: str) -> None:
    assert compare(GOOD, new, Limits()).verdict == verdict


def test_times_are_compared_once_both_versions_have_some() -> None:
    slow = VersionReport(50, 0, 0.5, 5.0, 50)
    behind = compare(VersionReport(30, 0, 0.1, 1.0, 19), slow, Limits())
    assert (behind.verdict, behind.reason) == (
        "too_few",
        "19 of 20 requests of the old version ended",
    )
    assert compare(VersionReport(30, 0, 0.1, 1.0, 20), slow, Limits()).verdict == "worse"
    assert compare(VersionReport(), slow, Limits()).verdict == "better_or_equal", "at 100 %"


def test_small_differences_in_time_never_count() -> None:
    old, new = VersionReport(50, 0, 0.001, 0.01, 50), VersionReport(50, 0, 0.04, 0.05, 50)
    assert compare(old, new, Limits()).verdict == "better_or_equal"


@pytest.mark.parametrize(
    ("expect", "text", "problem"),
    [
        ({"contains": ["paris"]}, "It is Paris.", None),
        ({"contains": ["Rome"]}, "It is Paris.", "lacks 'Rome'"),
        ({"regex": r"^\d+$"}, "12", None),
        ({"regex": r"^\d+$"}, "twelve", "does not match"),
        ({"json_fields": {"a": 1, "b": None}}, '{"a": 1, "b": "x"}', None),
        ({"json_fields": {"a": 1}}, 'Here:\n```json\n{"a": 1}\n```', None),
        ({"json_fields": {"a": 1}}, '{"a": 2}', "field 'a' is 2, expected 1"),
        ({"json_fields": {"a": 1}}, "{}", "has no field 'a'"),
        ({"json_fields": {"a": 1}}, "[1]", "is no JSON object"),
        ({"json_fields": {"a": 1}}, "none", "is not JSON"),
        ({"finish_reason": "length"}, "x", "finish_reason is stop"),
        ({"min_tokens": 9}, "x", "5 tokens"),
    ],
)
def test_answers_are_checked(expect: dict[str, Any], text: str, problem: str | None) -> None:
    found = check_answer(Expectation.model_validate(expect), text, "stop", 5)
    assert found is None if problem is None else problem in (found or "")


def test_five_scenarios_ship_and_are_well_formed() -> None:
    assert bundled_scenarios() == [
        "chat",
        "code",
        "json-extraction",
        "long-document",
        "quality-inspection",
    ]
    for name in bundled_scenarios():
        scenario = load_scenario(name)
        assert scenario.name == name
        assert scenario.max_latency_p95_s
        assert all(request.body["max_tokens"] for request in scenario.requests)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: x", "requests"),
        ("name: x\nrequests: [{name: a, body: {}, expect: {regexp: x}}]", "unknown key"),
        ("name: x\nrequests: [{name: a, body: {}, expect: {regex: '('}}]", "regular expression"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_scenario_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as raised:
        load_scenario(str(path))
    assert "\n" not in raised.value.message


async def test_a_scenario_is_asked_and_timed() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if b"bad" in request.content:
            return httpx.Response(503, text="busy")
        choice = {"message": {"content": "Paris"}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 1}})

    scenario = Scenario.model_validate(
        {
            "name": "s",
            "requests": [
                {"name": "good", "body": {}, "repeat": 2, "expect": {"contains": ["Paris"]}},
                {"name": "bad", "body": {"x": "bad"}},
                {"name": "slow", "body": {}, "expect": {"max_latency_s": 1e-9}},
            ],
        }
    )
    transport = httpx.MockTransport(handle)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        result = await run_scenario(scenario, client, "m")

    assert result.num_requests == 4
    assert [failure.split(":")[0] for failure in result.failures] == ["s/bad", "s/slow"]
    assert "HTTP 503" in result.failures[0]
