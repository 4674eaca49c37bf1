"""`xeray bench isa`: which instruction sets oneDNN's products really use, by its own log.

Two runs of the same steps in processes of their own: as this machine is, and held to AVX-512 with
bfloat16 (`ONEDNN_MAX_CPU_ISA`). The ratio is what AMX brings here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from serve_app.bench.isa_worker_lines import PHASE, RESULT
from serve_app.core.errors import EngineError
from serve_app.hardware.cpu import read_cpu_info

HELD_TO = "AVX512_CORE_BF16"
PRODUCTS = ("matmul", "inner_product")
_TIMEOUT_S = 300


@dataclass(slots=True)
class IsaRun:
    """One run: calls of oneDNN's products by implementation, apart for each phase, and its rates.

    `implementations`: phase → implementation (such as `brg_matmul:avx10_1_512_amx`) → calls.
    """

    limit: str
    implementations: dict[str, Counter[str]] = field(default_factory=dict)
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    threads: int = 0

    def num_amx(self, phase: str) -> int:
        """Calls in a phase whose implementation names AMX."""
        counts = self.implementations.get(phase, Counter())
        return sum(count for name, count in counts.items() if "amx" in name)


def add_isa(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `xeray bench isa`."""
    parser.add_argument("--shape", help="whose sizes four layers have (qwen2-1.5b)")
    parser.add_argument("--rows", type=int, help="sequences at once (8)")
    parser.add_argument("--prompt", type=int, help="tokens of each prompt (128)")
    parser.add_argument("--steps", type=int, help="decode steps (16)")
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def run_isa(options: argparse.Namespace) -> int:
    """Print both runs and their ratio; 1 where the processor has AMX and a phase did not use it."""
    has_amx = read_cpu_info().has_amx
    sizes = [
        getattr(options, "shape", None) or "qwen2-1.5b",
        *(
            str(getattr(options, name, None) or default)
            for name, default in (("rows", 8), ("prompt", 128), ("steps", 16))
        ),
    ]
    runs = []
    for limit in ("", HELD_TO):
        print(f"running, oneDNN {limit or 'as it is'} …", file=sys.stderr, flush=True)
        runs.append(measure(sizes, limit))
    free, held = runs
    misses = [phase for phase in ("prefill", "decode") if has_amx and not free.num_amx(phase)]
    if getattr(options, "json", False):
        print(json.dumps(as_json(free, held, has_amx=has_amx), indent=2))
    else:
        print("\n".join(report(free, held, has_amx=has_amx)))
    for phase in misses:
        print(f"xeray: AMX is there, but no product of {phase} used it", file=sys.stderr)
    return int(bool(misses))


def measure(sizes: list[str], limit: str) -> IsaRun:
    """Run the worker with oneDNN's log on; `limit` is its ONEDNN_MAX_CPU_ISA, empty for none.

    Raises EngineError where the worker fails.
    """
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    environment.pop("ONEDNN_MAX_CPU_ISA", None)
    if limit:
        environment["ONEDNN_MAX_CPU_ISA"] = limit
    command = [sys.executable, "-m", "serve_app.bench.isa_worker", *sizes]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"the run with oneDNN {limit or 'as it is'} failed: {last}")
    return parse_log(done.stdout.splitlines(), limit)


def parse_log(lines: Iterable[str], limit: str) -> IsaRun:
    """Read oneDNN's log: ``onednn_verbose,v1,primitive,exec,cpu,matmul,IMPLEMENTATION,…,ms``.

    Older versions leave out ``v1,primitive``. Lines before the first phase are the warm-up's.
    """
    run, phase = IsaRun(limit), ""
    for line in lines:
        if line.startswith(PHASE):
            phase = line.removeprefix(PHASE).strip()
        elif line.startswith(RESULT):
            for name, value in json.loads(line.removeprefix(RESULT)).items():
                setattr(run, name, value)
        elif line.startswith("onednn_verbose,") and ",exec," in line and phase:
            _, _, after = line.partition(",exec,")
            _engine, kind, implementation, *_ = after.split(",")
            if kind in PRODUCTS:
                run.implementations.setdefault(phase, Counter())[implementation] += 1
    return run


def report(free: IsaRun, held: IsaRun, *, has_amx: bool) -> list[str]:
    """Both runs as lines."""
    lines = [f"AMX in this processor: {'yes' if has_amx else 'no'}; {free.threads} threads, bf16"]
    for run in (free, held):
        lines.append(f"oneDNN {run.limit or 'as it is'}:")
        for phase in ("prefill", "decode"):
            rate = getattr(run, f"{phase}_tokens_per_s")
            counts = run.implementations.get(phase, Counter())
            used = ", ".join(f"{name} × {count}" for name, count in counts.most_common(4))
            lines.append(f"  {phase:8}{rate:9.1f} tokens/s  {used or 'no product of oneDNN'}")
    prefill, decode = ratios(free, held)
    return [*lines, f"as it is over {HELD_TO}: prefill {prefill:.2f}, decode {decode:.2f}"]


def ratios(free: IsaRun, held: IsaRun) -> tuple[float, float]:
    """Speed as it is over speed when held, in prefill and in decode."""
    return (
        free.prefill_tokens_per_s / held.prefill_tokens_per_s,
        free.decode_tokens_per_s / held.decode_tokens_per_s,
    )


def as_json(free: IsaRun, held: IsaRun, *, has_amx: bool) -> dict[str, Any]:
    """Both runs as JSON values."""
    prefill, decode = ratios(free, held)
    return {
        "has_amx": has_amx,
        "runs": [asdict(run) for run in (free, held)],
        "prefill_ratio": prefill,
        "decode_ratio": decode,
    }
