"""`xeray rollout`: bring a new version of a model in without a gap, or take it back."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from serve_app.config.load import IMPORT_PATH, load_serve_file
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
    save_state,
    without_canary,
)
from serve_app.deployments.rollout_compare import Limits, VersionReport
from serve_app.deployments.rollout_scenarios import bundled_scenarios, failures_of, load_scenario
from serve_app.deployments.running import find_service, service_at

CONNECT_ATTEMPTS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `xeray rollout start | status | promote | rollback`."""
    actions = parser.add_subparsers(dest="rollout_command", metavar="COMMAND", required=True)
    start = actions.add_parser("start", help="start a new version, test it, shift, then promote")
    start.add_argument("config", help="Serve config file of the new version")
    start.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one of its args; may be repeated",
    )
    start.add_argument(
        "--scenario",
        action="append",
        metavar="NAME_OR_FILE",
        help=f"what it must answer; repeatable; none: all of {', '.join(bundled_scenarios())}",
    )
    start.add_argument("--no-scenarios", action="store_true", help="go straight to the requests")
    start.add_argument(
        "--strategy",
        choices=("beside", "in_place"),
        default="beside",
        help="in_place: replace replicas one by one, where there is no room for both",
    )
    start.add_argument("--steps", default="5,25,50", help="shares in percent (default: 5,25,50)")
    start.add_argument("--step-s", type=float, default=120.0, help="longest time at each share")
    start.add_argument("--min-requests", type=int, default=20, help="requests that tell enough")
    start.add_argument("--max-error-rate", type=float, default=0.01, help="above the old one's")
    start.add_argument("--max-latency-ratio", type=float, default=1.5, help="p95 to the old one's")
    start.add_argument("--hold", action="store_true", help="wait at the last share for a person")
    start.set_defaults(run=run_start)
    for name, run, text in (
        ("status", run_status, "tell how the last rollout stands"),
        ("promote", run_promote, "finish a rollout that holds"),
        ("rollback", run_rollback, "go back to the old version, also after a promotion"),
    ):
        action = actions.add_parser(name, help=text)
        action.set_defaults(run=run)
    for action in actions.choices.values():
        action.add_argument("--app", help="the application (default: the only one)")
        action.add_argument(
            "--address",
            default="auto",
            help="the running Ray, host:port (default: RAY_ADDRESS, or this machine's xeray serve)",
        )
        action.add_argument(
            "--json", action="store_true", help="print how it stands in the end as JSON"
        )


def run_start(options: argparse.Namespace) -> int:
    """Carry a rollout out; 0 when the new version serves, or holds."""
    file = load_serve_file(options.config, options.set)
    scenarios = []
    if not options.no_scenarios:
        scenarios = [load_scenario(name) for name in options.scenario or bundled_scenarios()]
    plan = _plan(options)
    with _cluster(options) as cluster:
        from serve_app.deployments.rollout_cluster import check_room, find_application

        old = without_canary(find_application(options.app or file.app_name))
        ours = (a for a in file.document["applications"] if a.get("import_path") == IMPORT_PATH)
        new = {**next(ours), "name": old["name"], "route_prefix": old.get("route_prefix", "/")}
        state = RolloutState(old["name"], "new", old, new, tag=new_tag())
        if has_open_rollout(state.app_name):
            raise ConfigError(
                f"a rollout of {state.app_name} is open; promote it or roll it back first"
            )
        cluster.own(state.app_name, state.candidate_name)
        rollout = Rollout(cluster, state, plan, _teller(options))
        if options.strategy == "in_place":
            is_done = _in_place(cluster, state, plan, scenarios, _teller(options))
        else:
            check_room(candidate_of(new, state.candidate_name))
            is_done = rollout.start(scenarios)
        _print_json(options, state)
        return 0 if is_done else 1


def _teller(options: argparse.Namespace) -> Callable[[str], None]:
    """Return what tells of each stage: on stdout, on stderr where that is for the JSON."""
    out = sys.stderr if options.json else sys.stdout
    return lambda line: print(line, file=out, flush=True)


def _print_json(
    options: argparse.Namespace, state: RolloutState, versions: Mapping[str, Any] | None = None
) -> None:
    if options.json:
        facts = {
            "application": state.app_name,
            "phase": state.phase,
            "reason": state.reason,
            "percent": state.percent,
            "history": list(state.history),
        }
        print(json.dumps(facts if versions is None else facts | {"versions": versions}, indent=2))


def _in_place(
    cluster: Any,
    state: RolloutState,
    plan: Plan,
    scenarios: list[Any],
    tell: Callable[[str], None],
) -> bool:
    """Replace the replicas one by one, then run the scenarios; a failure brings the old back."""
    state.phase = "promoting"
    save_state(state)
    reason = ""
    try:
        cluster.deploy([state.new])
        cluster.await_ready(state.app_name, plan.start_timeout_s)
        failures = failures_of(cluster.run_scenarios(state.app_name, scenarios))
        reason = failures[0] if failures else ""
    except ConfigError as error:
        reason = error.message
    if reason:
        cluster.deploy([state.old])
        cluster.await_ready(state.app_name, plan.start_timeout_s)
    state.phase, state.reason = ("rolled_back", reason) if reason else ("done", "in place")
    save_state(state)
    tell(f"{state.phase}: {state.reason}")
    return not reason


def run_status(options: argparse.Namespace) -> int:
    """Print the last rollout's phase and history, and what both versions do now."""
    with _cluster(options) as cluster:
        state = _state(options)
        reports = cluster.reports(state.app_name) if state.is_open else {}
        if options.json:
            versions = {version: _figures(report) for version, report in reports.items()}
            _print_json(options, state, versions)
            return 0
        print(f"{state.app_name}: {state.phase} ({state.reason}), share {state.percent:g} %")
        for line in state.history:
            print(f"  {line}")
        for version, report in reports.items():
            print(
                f"  {version}: {report.num_requests} requests, {report.num_failed} failed,"
                f" p95 TTFT {report.ttft_p95_s:.3f} s, p95 latency {report.latency_p95_s:.3f} s"
            )
    return 0


def _figures(report: VersionReport) -> dict[str, float]:
    return {
        "num_requests": report.num_requests,
        "num_failed": report.num_failed,
        "ttft_p95_s": report.ttft_p95_s,
        "latency_p95_s": report.latency_p95_s,
    }


def run_promote(options: argparse.Namespace) -> int:
    """Finish a rollout that holds."""
    with _cluster(options) as cluster:
        state = _state(options)
        if state.phase not in ("holding", "promoting"):
            raise ConfigError(f"the rollout of {state.app_name} is {state.phase}, nothing holds")
        cluster.own(state.app_name, state.candidate_name)
        Rollout(cluster, state, Plan(), _teller(options)).promote()
        _print_json(options, state)
    return 0


def run_rollback(options: argparse.Namespace) -> int:
    """Go back to the old version: at once while both run, else by the same way in reverse."""
    with _cluster(options) as cluster:
        state = _state(options)
        cluster.own(state.app_name, state.candidate_name)
        if state.is_open:
            Rollout(cluster, state, Plan(), _teller(options)).rollback("asked for")
            _print_json(options, state)
            return 0
        if state.phase != "done":
            raise ConfigError(f"the rollout of {state.app_name} is {state.phase}: nothing to undo")
        from serve_app.deployments.rollout_cluster import check_room

        back = RolloutState(state.app_name, "new", state.new, state.old, tag=new_tag())
        check_room(candidate_of(back.new, back.candidate_name))
        is_back = Rollout(cluster, back, Plan(steps=()), _teller(options)).start([])
        _print_json(options, back)
        return 0 if is_back else 1


def _plan(options: argparse.Namespace) -> Plan:
    try:
        steps = tuple(float(text) for text in options.steps.split(",") if text.strip())
    except ValueError:
        raise ConfigError(f"--steps: expected numbers with commas, got {options.steps!r}") from None
    if any(not 0 < step <= 100 for step in steps) or list(steps) != sorted(steps):
        raise ConfigError(f"--steps: expected rising shares up to 100, got {options.steps!r}")
    limits = Limits(
        error_rate=options.max_error_rate,
        latency_ratio=options.max_latency_ratio,
        min_requests=options.min_requests,
    )
    return Plan(steps=steps, step_s=options.step_s, limits=limits, hold=options.hold)


def _state(options: argparse.Namespace) -> RolloutState:
    from serve_app.deployments.rollout_cluster import find_application

    if options.app is not None:
        return load_state(options.app)
    from serve_app.deployments.ray_private import deployed_applications

    names = [a["name"] for a in deployed_applications()]
    own = [name for name in names if not is_candidate(name)]
    return load_state(own[0] if len(own) == 1 else find_application(None)["name"])


def _address(options: argparse.Namespace) -> str:
    """Return the Ray to connect to, with the environment set that its `xeray serve` has.

    `auto` is RAY_ADDRESS, else the `xeray serve` of this machine, else what Ray itself finds.
    """
    address = str(options.address)
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    service = find_service(options.app) if address == "auto" else service_at(address)
    # Ray asks a host that does not answer for minutes, by itself.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(CONNECT_ATTEMPTS))
    if service is None:
        return address
    for name, value in service.environment.items():
        os.environ.setdefault(name, value)
    return service.address


@contextlib.contextmanager
def _cluster(options: argparse.Namespace) -> Iterator[Any]:
    """Connect to the running Ray for the block."""
    address = _address(options)
    import ray

    try:
        ray.init(
            address=address, namespace="serve", log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"no Ray at {address}: {reason}") from None
    try:
        from serve_app.deployments.rollout_cluster import ServeCluster

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        with contextlib.closing(ServeCluster()) as cluster:
            yield cluster
    finally:
        ray.shutdown()
