"""Bad versions, brought in as a user does: `python -m tests.cluster.rollback [CASE…]`, by hand.

`xeray serve` with a clock for an engine, streams without a pause, and one `xeray rollout start` for
each way in which a new version may be bad. Each has to come back by itself: exit code 1, a line
that says why, the same replicas as before. Prints a row for each; exits with 1 where one does not.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.hardware.affinity import claim_cores, core_holders, physical_cores

from .load import Load
from .updates import (
    MAX_TOKENS,
    NUM_STREAMS,
    RATE,
    SCENARIO,
    STEPS,
    document,
    free_port,
    replica_ids,
    rollout,
    serving,
    wait_ready,
)

WRONG_WORD = "a sentence that nothing answers"


@dataclass(frozen=True)
class Case:
    """A bad version: what is changed of the good one, and how its rollout has to end.

    line: how the last line begins. reason: what it has to hold. may_fail: whether requests that it
    got may fail, before that is seen.
    """

    name: str
    change: Callable[[dict[str, Any]], None]
    line: str
    reason: str
    scenario: dict[str, Any]
    may_fail: bool = False


def _impossible() -> dict[str, Any]:
    request = {**SCENARIO["requests"][0], "expect": {"contains": [WRONG_WORD]}}  # type: ignore[index]
    return {"name": "impossible", "requests": [{**request, "repeat": 1}]}


def _is_slow(args: dict[str, Any]) -> None:
    args["engine"]["fixed_rate_tokens_per_s"] = RATE / 4


def _refuses(args: dict[str, Any]) -> None:
    args["engine"]["max_num_seqs"] = 1
    args["model_replica"]["max_queued_requests"] = 0


def _cannot_start(args: dict[str, Any]) -> None:
    args["model"]["path"] = "/nowhere/model.gguf"


CASES = (
    Case("fails its scenario", lambda _: None, "failed: ", WRONG_WORD, _impossible()),
    Case("is four times slower", _is_slow, "rolled_back: at 50 %: ", "p95", SCENARIO),
    Case("refuses requests", _refuses, "rolled_back: at 50 %: ", "requests failed", SCENARIO, True),
    Case("cannot start", _cannot_start, "failed: ", "/nowhere/model.gguf", SCENARIO),
)


async def try_case(case: Case, folder: Path, url: str, port: int, load: Load) -> list[str]:
    """Bring a bad version in beside the load, print its row; returns what went wrong."""
    file = document(1, port)
    case.change(file["applications"][0]["args"])
    config, scenario = folder / "bad.yaml", folder / "scenario.yaml"
    config.write_text(yaml.safe_dump(file))
    scenario.write_text(yaml.safe_dump(case.scenario))
    before, num_ended, began_s = replica_ids(url), len(load.ends), time.monotonic()
    words = ("start", str(config), "--scenario", str(scenario), *STEPS)
    code, printed = await rollout(folder, *words)
    took_s = time.monotonic() - began_s
    _, told = await rollout(folder, "status", "--json")
    state = json.loads(told)
    last = printed.strip().splitlines()[-1] if printed.strip() else ""
    ends = load.ends[num_ended:]
    failed = [end for end in ends if end.kind != "answered"]
    print(f"| {case.name} | {took_s:.1f} | {code} | {len(ends)} | {len(failed)} | {last} |")
    wrong = {
        "exit code": code != 1,
        "last line": not last.startswith(case.line) or case.reason not in last,
        "traceback": "Traceback" in printed,
        "phase": state["phase"] != case.line.partition(":")[0] or state["percent"] != 0,
        "replicas": replica_ids(url) != before,
        "requests": bool(failed) and not case.may_fail,
        "hung": any(end.kind == "hung" for end in ends),
    }
    if problems := [what for what, is_wrong in wrong.items() if is_wrong]:
        print(printed, told, failed[:3], file=sys.stderr)
    return [f"{case.name}: {what}" for what in problems]


async def try_without_cores(folder: Path, port: int) -> list[str]:
    """Start a good version while others hold the cores that its Preprocessor needs."""
    cores = physical_cores()
    locks = {"cores": cores, "folder": folder / "locks"}
    num_free = len(cores) - len(core_holders("preprocessor", **locks))
    config = folder / "good.yaml"
    config.write_text(yaml.safe_dump(document(1, port)))
    claim = claim_cores(num_free, role="preprocessor", **locks)
    began_s = time.monotonic()
    code, printed = await rollout(folder, "start", str(config), "--no-scenarios", *STEPS)
    claim.release()
    took_s = time.monotonic() - began_s
    last = printed.strip().splitlines()[-1] if printed.strip() else ""
    print(f"| finds no core free | {took_s:.1f} | {code} | | | {last} |")
    is_told = "no room for the new version" in last and "preprocessor.xeon_cores" in last
    return [] if code != 0 and is_told else [f"finds no core free: {code}, {printed}"]


async def try_all(cases: list[Case], folder: Path, url: str, port: int) -> tuple[Load, list[str]]:
    """Try the cases one after the other under one load."""
    load = Load([url], NUM_STREAMS, MAX_TOKENS, stagger_s=0.05)
    running = asyncio.create_task(load.run())
    problems: list[str] = []
    try:
        for case in cases:
            problems += await try_case(case, folder, url, port, load)
        problems += await try_without_cores(folder, port)
    finally:
        load.stop.set()
        await asyncio.wait_for(running, 90)
    return load, problems


def main() -> None:
    """Try the cases whose names hold one of the words given, or all."""
    cases = [c for c in CASES if not sys.argv[1:] or any(word in c.name for word in sys.argv[1:])]
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="xrb", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = folder / "good.yaml"
        config.write_text(yaml.safe_dump(document(0, port)))
        with serving(folder, config) as url:
            wait_ready(url)
            print("| the new version | s | exit code | requests ended | failed | last line |")
            print("|---|---|---|---|---|---|", flush=True)
            load, problems = asyncio.run(try_all(cases, folder, url, port))
    print(f"sent {load.num_sent}, {load.counts()}, wrong {load.num_wrong()}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
