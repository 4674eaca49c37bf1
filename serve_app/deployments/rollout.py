"""A new version of a model beside the old one: scenarios, a growing share, then all or nothing.

Steps, each written to the state file before it begins::

    deploying   the new version starts as a second application, without a route of its own
    scenarios   what it must answer, and how fast, through the whole API but without clients
    shifting    a growing share of the requests; both versions are compared after each step
    holding     a person decides: `promote` or `rollback`
    promoting   all requests to the new version; the application itself is updated behind it, takes
                them back, and the second one ends
    done | rolled_back | failed

Whatever goes wrong before `promoting` ends in a rollback: share 0, and the second application ends
when its streams have. This module knows no Ray: `Cluster` does what it decides.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from serve_app.config.cache_folder import cache_folder
from serve_app.core.errors import ConfigError, XeRayError
from serve_app.deployments.rollout_compare import Limits, VersionReport, compare
from serve_app.deployments.rollout_scenarios import Scenario, ScenarioResult, failures_of

_CANDIDATE_SUFFIX = "-next"
_CANDIDATE = re.compile(rf"{_CANDIDATE_SUFFIX}(-[0-9a-f]+)?$")
_POLL_S = 0.5
_SETTLE_S = 1.0
"""For requests whose prompt is on its way to a version that gets no more: then it may end."""

Application = dict[str, Any]


class Cluster(Protocol):
    """What a rollout does to the running Serve. Every method may raise XeRayError."""

    def deploy(self, applications: Sequence[Application]) -> None:
        """Make these applications, and none other of ours, what Serve runs; returns at once."""
        ...

    def await_ready(self, app_name: str, timeout_s: float) -> None:
        """Wait until an application's new version runs in full. Raises where it cannot start."""
        ...

    def reports(self, app_name: str) -> dict[str, VersionReport]:
        """Return both versions' reports: stable and canary."""
        ...

    def await_share(self, app_name: str, percent: float) -> None:
        """Wait until every ingress replica sends `percent` to the candidate."""
        ...

    def run_scenarios(self, app_name: str, scenarios: Sequence[Scenario]) -> list[ScenarioResult]:
        """Run scenarios against an application."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """How a rollout goes on: shares in percent, seconds at each at most, and what is worse."""

    steps: tuple[float, ...] = (5.0, 25.0, 50.0)
    step_s: float = 120.0
    limits: Limits = field(default_factory=Limits)
    start_timeout_s: float = 900.0
    hold: bool = False


@dataclass(slots=True)
class RolloutState:
    """What is known of a rollout, as its file says. `old`, `new`: the applications' configs.

    tag: makes the second application's name one that Serve has not seen. Whoever meets a name that
    was deleted a moment ago may be told that it is gone, though it was deployed again.
    """

    app_name: str
    phase: str
    old: Application
    new: Application
    percent: float = 0.0
    reason: str = ""
    history: list[str] = field(default_factory=list)
    tag: str = ""

    @property
    def candidate_name(self) -> str:
        """The second application's name."""
        return self.app_name + _CANDIDATE_SUFFIX + (f"-{self.tag}" if self.tag else "")

    @property
    def is_open(self) -> bool:
        """Whether the second application may still be there."""
        return self.phase not in ("done", "rolled_back", "failed")


class Rollout:
    """Carries one rollout out. `say` is told what happens, line by line."""

    def __init__(
        self,
        cluster: Cluster,
        state: RolloutState,
        plan: Plan,
        say: Callable[[str], None],
        *,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._state = state
        self._plan = plan
        self._say = say
        self._sleep = sleep
        self._now = now

    def start(self, scenarios: Sequence[Scenario]) -> bool:
        """Bring the new version in; returns whether it was promoted, or holds as asked."""
        try:
            self._deploy_candidate()
            self._run_scenarios(scenarios)
            for percent in self._plan.steps:
                self._shift(percent)
        except XeRayError as error:
            self.rollback(error.message)
            return False
        except BaseException:
            self.rollback("interrupted")
            raise
        if self._plan.hold:
            self._enter("holding", f"at {self._state.percent:g} %: promote or rollback")
            return True
        self.promote()
        return True

    def promote(self) -> None:
        """Give all requests to the new version, and make it the application's own."""
        state = self._state
        self._enter("promoting", "all requests to the new version")
        self._set_share(100.0)
        self._deploy(state.new, percent=100.0)
        self._cluster.await_ready(state.app_name, self._plan.start_timeout_s)
        self._cluster.await_share(state.app_name, 100.0)
        self._deploy(state.new, percent=0.0)
        self._cluster.await_share(state.app_name, 0.0)
        self._sleep(_SETTLE_S)
        self._cluster.deploy([state.new])
        self._enter("done", "the new version is the application's own")

    def rollback(self, reason: str) -> None:
        """Give all requests back to the old version and end the new one."""
        state = self._state
        had_share = state.percent > 0
        if state.phase == "promoting":  # its own replicas may be the new version's already
            self._deploy(state.old, percent=100.0)
            self._cluster.await_ready(state.app_name, self._plan.start_timeout_s)
        if had_share:
            self._set_share(0.0)
            self._sleep(_SETTLE_S)
        self._cluster.deploy([state.old])
        self._enter("rolled_back" if had_share else "failed", reason)

    def _deploy_candidate(self) -> None:
        state = self._state
        self._enter("deploying", f"the new version starts as {state.candidate_name}")
        # The ingress hears of it when it is there: until then it could make no handle to it.
        self._cluster.deploy([state.old, candidate_of(state.new, state.candidate_name)])
        self._cluster.await_ready(state.candidate_name, self._plan.start_timeout_s)

    def _run_scenarios(self, scenarios: Sequence[Scenario]) -> None:
        if not scenarios:
            return
        self._enter("scenarios", ", ".join(scenario.name for scenario in scenarios))
        results = self._cluster.run_scenarios(self._state.candidate_name, scenarios)
        for result in results:
            word = "failed" if result.failures else "passed"
            self._say(
                f"  {result.name}: {word}, {result.num_requests} requests,"
                f" p95 {result.latency_p95_s:.2f} s"
            )
        failures = failures_of(results)
        for failure in failures:
            self._say(f"  {failure}")
        if failures:
            count = len(failures)
            plural = "s" * (count > 1)
            raise ConfigError(f"{count} scenario check{plural} failed, first: {failures[0]}")

    def _shift(self, percent: float) -> None:
        self._enter("shifting", f"{percent:g} % to the new version")
        self._set_share(percent)
        deadline_s = self._now() + self._plan.step_s
        while True:
            reports = self._cluster.reports(self._state.app_name)
            found = compare(
                reports.get("stable", VersionReport()),
                reports.get("canary", VersionReport()),
                self._plan.limits,
            )
            if found.verdict == "worse":
                raise ConfigError(f"at {percent:g} %: {found.reason}")
            if found.verdict == "better_or_equal":
                self._say(f"  {percent:g} %: {found.reason}")
                return
            if self._now() >= deadline_s:
                raise ConfigError(
                    f"at {percent:g} %: {found.reason} in {self._plan.step_s:g} s; too few to"
                    " tell: give more time, or ask for less with --min-requests"
                )
            self._sleep(_POLL_S)

    def _set_share(self, percent: float) -> None:
        state = self._state
        # Noted before: what fails from here on must not end a version that requests go to.
        state.percent = max(state.percent, percent)
        save_state(state)
        self._deploy(state.old, percent=percent)
        self._cluster.await_share(state.app_name, percent)
        state.percent = percent
        save_state(state)

    def _deploy(self, application: Application, *, percent: float) -> None:
        """Deploy the application with a share for the candidate, and the candidate."""
        state = self._state
        candidate = candidate_of(state.new, state.candidate_name)
        canary = {
            "application": state.candidate_name,
            "percent": percent,
            "deployments": model_names(state.new.get("args") or {}),
        }
        self._cluster.deploy([with_canary(application, canary), candidate])

    def _enter(self, phase: str, reason: str) -> None:
        self._state.phase, self._state.reason = phase, reason
        self._state.history.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {phase}: {reason}")
        save_state(self._state)
        self._say(f"{phase}: {reason}")


def new_tag() -> str:
    """Return a tag for a rollout that begins now."""
    return f"{int(time.time()):x}"


def is_candidate(app_name: str, of: str | None = None) -> bool:
    """Whether an application's name is that of a rollout's second one (beside the app `of`)."""
    found = _CANDIDATE.search(app_name)
    return found is not None and of in (None, app_name[: found.start()])


def candidate_of(application: Application, name: str) -> Application:
    """Return the second application: the new version, one ingress replica, no route."""
    args = dict(application.get("args") or {})
    ingress = {
        key: value for key, value in (args.get("ingress") or {}).items() if key != "autoscaling"
    }
    args["ingress"] = {**ingress, "num_replicas": 1}
    others = [d for d in application.get("deployments") or [] if d.get("name") != "Ingress"]
    result = {**application, "name": name, "route_prefix": None, "args": args}
    if others:
        result["deployments"] = others
    else:
        result.pop("deployments", None)
    return result


def with_canary(application: Application, canary: Mapping[str, Any]) -> Application:
    """Return the application with the canary in its Ingress' user_config."""
    rows = [dict(row) for row in application.get("deployments") or []]
    for row in rows:
        if row.get("name") == "Ingress":
            row["user_config"] = {**(row.get("user_config") or {}), "canary": dict(canary)}
            return {**application, "deployments": rows}
    rows.append({"name": "Ingress", "user_config": {"canary": dict(canary)}})
    return {**application, "deployments": rows}


def without_canary(application: Application) -> Application:
    """Return the application as it was before a rollout."""
    rows = []
    for row in application.get("deployments") or []:
        user_config = row.get("user_config")
        if row.get("name") == "Ingress" and user_config:
            row = {**row, "user_config": {k: v for k, v in user_config.items() if k != "canary"}}
            if not row["user_config"]:
                row.pop("user_config")
        if set(row) != {"name"}:
            rows.append(row)
    result = {key: value for key, value in application.items() if key != "deployments"}
    return {**result, "deployments": rows} if rows else result


def model_names(args: Mapping[str, Any]) -> list[str]:
    """Return the names of the model's deployments, best pool first."""
    from serve_app.config.load import validate_args
    from serve_app.deployments.options import model_deployments

    return list(model_deployments(validate_args(args)))


def state_path(app_name: str) -> Path:
    """Return where an application's last rollout is written down."""
    return cache_folder("rollout") / f"{app_name}.json"


def save_state(state: RolloutState) -> None:
    """Write the state down, whole or not at all."""
    path = state_path(state.app_name)
    draft = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"the rollout's state cannot be written to {path}: {error}") from error


def has_open_rollout(app_name: str) -> bool:
    """Whether the last rollout of an application has not ended."""
    return state_path(app_name).exists() and load_state(app_name).is_open


def load_state(app_name: str) -> RolloutState:
    """Return an application's last rollout. Raises ConfigError where there is none."""
    path = state_path(app_name)
    try:
        return RolloutState(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"there was no rollout of {app_name} from this machine") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
