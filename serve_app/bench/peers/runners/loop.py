"""What every runner shares: one JSON line in per batch, one JSON line out. Standard library only.

A runner is a script that some environment's Python runs by its path, so it imports nothing of XeRay
but what its own environment has. argv[1] holds `RunnerOptions` as JSON. It answers

    {"ready": {"version": …, "startup_s": …, …}}        once the model is loaded
    {"times_s": [[…], …], "peak_bytes": …}              per batch {"prompts": …, "output_tokens": …}
    {"error": "…"}                                      where it cannot go on; then it exits 1

`times_s` has a row per prompt: when each of its tokens was there, in seconds from the batch's
start. `peak_bytes` is the process's VmHWM (proc(5)): the most memory that it ever held.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Times = list[list[float]]
Run = Callable[[list[list[int]], int], Times]
"""Generates `n` tokens greedily after each prompt, end of sequence ignored."""


@dataclass(frozen=True)
class RunnerOptions:
    """What to load and how large: a batch never has more than `max_num_seqs` × `max_model_len`."""

    model: str
    num_threads: int
    max_num_seqs: int
    max_model_len: int
    settings: dict[str, Any]


def serve(start: Callable[[RunnerOptions], tuple[dict[str, Any], Run]]) -> None:
    """Load the engine with `start`, then run the batches of stdin until it ends."""
    # Libraries print where they like: the answers keep the real stdout for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        begin_s = time.perf_counter()
        facts, run = start(RunnerOptions(**json.loads(sys.argv[1])))
        facts["startup_s"] = time.perf_counter() - begin_s
        print(json.dumps({"ready": facts}), file=answers)
        for line in sys.stdin:
            job = json.loads(line)
            times_s = run(job["prompts"], job["output_tokens"])
            print(json.dumps({"times_s": times_s, "peak_bytes": peak_bytes()}), file=answers)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps({"error": reason[:500]}), file=answers)
        answers.flush()
        os._exit(1)
    answers.flush()
    os._exit(0)  # a library's threads may keep the interpreter from leaving


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return VmHWM, or 0 where the system does not tell."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    values = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(values[0]) * 1024 if values else 0
