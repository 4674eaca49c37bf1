"""Prompts per second through chat template and tokenizer, by threads, micro-batching on and off.

Each number of threads runs in a process of its own, set up as a Preprocessor replica with so many
cores: pinned to them, the tokenizer's thread pool of that size. Off: each prompt is a call of its
own, as many at once as there are threads. On: full micro-batches one after the other, each spread
over the tokenizer's threads. Replicas: so many processes of one thread and one core each, at once:
what `preprocessor.num_replicas` gives, with no interpreter's lock between them. Serve's own cost is
not in it (`xeray bench overhead` has that).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from serve_app.bench import options as common
from serve_app.bench.report import format_table
from serve_app.bench.workloads import WorkloadOptions, make_workload
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.core.requests import PrepareRequest
from serve_app.deployments.prompt_preparation import PromptPreparer
from serve_app.hardware.affinity import physical_cores, pin_process

KINDS = ("chat", "text")
MODES = ("off", "on")
COLUMNS = (*MODES, "replicas")
TARGET_CORES = 16
TARGET_SPEEDUP = 6.0
"""On 16 cores the best of the columns is to reach this many times one thread's speed."""


@dataclass(frozen=True, slots=True)
class PreprocessOptions:
    """What is prepared: `num_prompts` prompts of about `prompt_tokens` per kind and round."""

    threads: tuple[int, ...] = (1, 2, 4, 16)
    num_prompts: int = 512
    prompt_tokens: int = 512
    batch_size: int = 16
    num_rounds: int = 3
    seed: int = 0


def add_preprocess(parser: argparse.ArgumentParser) -> None:
    """Add the options of `xeray bench preprocess`."""
    common.add_config(parser)
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (1 2 4 16)")
    parser.add_argument("--num-prompts", type=int, help="prompts per round (512)")
    parser.add_argument("--prompt-tokens", type=int, help="words of each prompt (512)")
    parser.add_argument("--batch-size", type=int, help="prompts of a micro-batch (the config's)")
    parser.add_argument("--rounds", type=int, help="rounds; the median counts (3)")
    parser.add_argument("--seed", type=int, help="decides everything random (0)")


def run_preprocess(options: argparse.Namespace) -> int:
    """Measure each number of threads in a process of its own and print the table."""
    app = common.app_config(options)
    chosen = _options(options, app.preprocessor.micro_batching.max_batch_size)
    report = measure_preprocess(app.model, chosen, lambda line: print(line, flush=True))
    print(preprocess_table(report))
    for line in speedup_lines(report):
        print(line)
    common.write_json(options, {"preprocess": report})
    return 0


def _options(options: argparse.Namespace, batch_size: int) -> PreprocessOptions:
    names = {"rounds": "num_rounds"}
    given: dict[str, Any] = {"batch_size": batch_size}
    for name, value in vars(options).items():
        field = names.get(name, name)
        if value is None or field not in PreprocessOptions.__slots__:
            continue
        if field != "seed" and min(value if isinstance(value, list) else [value]) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: less than 1", param=name)
        given[field] = tuple(value) if isinstance(value, list) else value
    return PreprocessOptions(**given)


def measure_preprocess(
    model: ModelSection,
    options: PreprocessOptions,
    on_line: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Return a dict for each number of threads: `threads`, `num_cores`, and prompts per second.

    The rates are under `chat_off`, `chat_on`, `chat_replicas` and the same of `text`, the mean
    number of tokens under `chat_tokens` and `text_tokens`. Raises ConfigError where one fails.
    """
    report = []
    for num_threads in options.threads:
        figures = _in_a_process(model, options, num_threads)
        figures |= _in_replicas(model, options, num_threads)
        report.append(figures)
        rates = ", ".join(f"{k} {m} {figures[f'{k}_{m}']:,.0f}" for k in KINDS for m in COLUMNS)
        on_line(f"  {num_threads} threads: {rates} prompts/s")
    return report


def _in_a_process(
    model: ModelSection, options: PreprocessOptions, num_threads: int
) -> dict[str, Any]:
    (figures,) = _run_processes(model, options, [(num_threads, 0)])
    return figures


def _in_replicas(
    model: ModelSection, options: PreprocessOptions, num_replicas: int
) -> dict[str, float]:
    """Return the rates of so many processes of one thread at once, each on a core of its own."""
    single = replace(options, num_rounds=1)
    everyone = _run_processes(model, single, [(1, core) for core in range(num_replicas)])
    return {f"{kind}_replicas": sum(each[f"{kind}_off"] for each in everyone) for kind in KINDS}


def _run_processes(
    model: ModelSection, options: PreprocessOptions, places: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Run a process for each (threads, first core); they begin together once all have loaded."""
    job = json.dumps({"model": model.model_dump(mode="json"), "options": asdict(options)})
    with ExitStack() as stack:
        running = [stack.enter_context(_process(*place)) for place in places]
        try:
            for process in running:
                _say(process, job)
            for process in running:
                _hear(process)
            for process in running:
                _say(process, "go")
            return [json.loads(_hear(process)) for process in running]
        except BaseException:
            for process in running:
                process.kill()
            raise


def _process(num_threads: int, first_core: int) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "RAYON_NUM_THREADS": str(num_threads),
        "OMP_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "true" if num_threads > 1 else "false",
    }
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(num_threads), str(first_core)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its end shows where it is heard
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ConfigError("prompts could not be prepared; see the lines above")
    return line


def measure_here(
    preparer: PromptPreparer, options: PreprocessOptions, num_threads: int
) -> dict[str, Any]:
    """Measure in this process, whose tokenizer has been given `num_threads` by the environment."""
    figures: dict[str, Any] = {"threads": num_threads}
    with ThreadPoolExecutor(num_threads) as pool:
        for kind in KINDS:
            requests = make_requests(kind, options)
            prepared = preparer.prepare_batch(requests)  # warms the template and the pools
            failed = next((p.error.message for p in prepared if p.error is not None), None)
            if failed is not None:
                raise ConfigError(f"{kind} prompts cannot be prepared: {failed}")
            figures[f"{kind}_tokens"] = statistics.fmean(len(p.token_ids) for p in prepared)
            for mode in MODES:
                run = _run_single if mode == "off" else _run_batches
                rates = [run(preparer, pool, requests, options) for _ in range(options.num_rounds)]
                figures[f"{kind}_{mode}"] = statistics.median(rates)
    return figures


def make_requests(kind: str, options: PreprocessOptions) -> list[PrepareRequest]:
    """Return the prompts of a kind: conversations of the chat workload, or their texts alone."""
    workload = WorkloadOptions(options.num_prompts, options.prompt_tokens, seed=options.seed)
    requests = []
    for index, spec in enumerate(make_workload("chat", workload)):
        messages = tuple(spec.body["messages"])
        if kind == "chat":
            requests.append(PrepareRequest(str(index), messages=messages))
        else:
            text = "\n".join(message["content"] for message in messages)
            requests.append(PrepareRequest(str(index), text=text))
    return requests


def _run_single(
    preparer: PromptPreparer,
    pool: ThreadPoolExecutor,
    requests: Sequence[PrepareRequest],
    options: PreprocessOptions,
) -> float:
    del options
    started_s = time.perf_counter()
    for _ in pool.map(preparer.prepare_batch, ([request] for request in requests)):
        pass
    return len(requests) / (time.perf_counter() - started_s)


def _run_batches(
    preparer: PromptPreparer,
    pool: ThreadPoolExecutor,
    requests: Sequence[PrepareRequest],
    options: PreprocessOptions,
) -> float:
    size = options.batch_size
    started_s = time.perf_counter()
    for begin in range(0, len(requests), size):
        pool.submit(preparer.prepare_batch, requests[begin : begin + size]).result()
    return len(requests) / (time.perf_counter() - started_s)


def preprocess_table(report: Sequence[dict[str, Any]]) -> str:
    """Return the rates as a table: prompts per second, micro-batching off and on."""
    headers = ("threads", "cores", *(f"{kind}, {mode}" for kind in KINDS for mode in COLUMNS))
    rows = [
        [
            figures["threads"],
            figures["num_cores"],
            *(figures[f"{kind}_{mode}"] for kind in KINDS for mode in COLUMNS),
        ]
        for figures in report
    ]
    return format_table(headers, rows)


def speedup_lines(report: Sequence[dict[str, Any]]) -> list[str]:
    """Return, for each kind, how much faster the largest number of threads is than one."""
    one = next((figures for figures in report if figures["threads"] == 1), None)
    most = max(report, key=lambda figures: figures["threads"], default=None)
    if one is None or most is None or most["threads"] == 1:
        return []
    lines = []
    for kind in KINDS:
        in_one, mode = max((most[f"{kind}_{m}"] / one[f"{kind}_{m}"], m) for m in MODES)
        apart = most[f"{kind}_replicas"] / one[f"{kind}_off"]
        speedup = max(in_one, apart)
        line = (
            f"{kind}: {most['threads']} threads are {in_one:.1f} × one (micro-batching {mode}),"
            f" {most['threads']} replicas {apart:.1f} ×"
        )
        if most["threads"] == TARGET_CORES:
            is_met = speedup >= TARGET_SPEEDUP
            cores = most["num_cores"]
            verdict = "holds" if is_met else "DOES NOT HOLD"
            if cores < TARGET_CORES:
                verdict = f"not to be judged on {cores} cores"
            line += f"; target ≥ {TARGET_SPEEDUP:g} × on {TARGET_CORES} cores: {verdict}"
        lines.append(line)
    return lines


def _pin(num_threads: int, first_core: int) -> int:
    """Pin this process as a replica with so many cores is; returns how many it has."""
    cores = physical_cores()
    first = first_core % len(cores)
    cores = cores[first : first + num_threads]
    pin_process(cpu_id for core in cores for cpu_id in core.cpu_ids)
    return len(cores)


def main() -> None:
    """Measure with the threads and from the core that the arguments say.

    Standard input brings the job; after its answer "ready" a second line starts the measurement,
    whose figures are one line of JSON.
    """
    num_threads, first_core = map(int, sys.argv[1:])
    job = json.loads(sys.stdin.readline())
    num_cores = _pin(num_threads, first_core)
    options = PreprocessOptions(**job["options"])
    preparer = PromptPreparer(ModelSection.model_validate(job["model"]))
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps({"num_cores": num_cores, **measure_here(preparer, options, num_threads)}))


if __name__ == "__main__":
    main()
