"""Our router against Serve's default one, live, by hand.

`python -m tests.cluster.routers [SEED…] [LOAD…]`, as `python -m tests.cluster.routers 0 1 mixed`.

Two applications in one Ray, each with four replicas (simulated cards, one thread each, the embedded
model) and two ingress replicas; one leaves the choice of the replica to Serve (power_of_two). The
same requests at the same times go to one and then to the other: questions about documents that no
single cache can hold, and a mixed load. Prints, for each seed and load, prefix hits and p95 TTFT.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from serve_app.bench.load import LoadGenerator, Target
from serve_app.bench.workloads import FIRST_TOKEN_ID, LAST_TOKEN_ID, RequestSpec
from serve_app.deployments.environment import serve_environment
from serve_app.deployments.ray_private import deploy_document

from .updates import free_port

POLICIES = ("power_of_two", "expected_start")
NUM_REPLICAS, NUM_SEQS = 4, 8
NUM_DOCUMENTS, DOCUMENT_TOKENS, QUESTION_TOKENS = 24, 384, 24
KV_TOKENS = NUM_DOCUMENTS // 2 * DOCUMENT_TOKENS  # a replica's cache: half of the documents
RUN_S = 30.0
RATES = {"shared prefixes": 3.5, "mixed": 3.5}
HITS, QUERIES = "xeray_prefix_cache_hits", "xeray_prefix_cache_queries"


@dataclass(frozen=True)
class Figures:
    """What one run came to."""

    num_requests: int
    num_failed: int
    hit_rate: float
    ttft_p50_s: float
    ttft_p95_s: float


def shared_prefixes(rng: random.Random, count: int) -> list[RequestSpec]:
    """Return questions about documents drawn evenly."""
    documents = [_ids(rng, DOCUMENT_TOKENS) for _ in range(NUM_DOCUMENTS)]
    return [
        _request([*rng.choice(documents), *_ids(rng, QUESTION_TOKENS)], rng, 8)
        for _ in range(count)
    ]


def mixed(rng: random.Random, count: int) -> list[RequestSpec]:
    """Return prompts of their own, 16 to 512 tokens; a third begins with one of four others."""
    systems = [_ids(rng, 128) for _ in range(4)]
    requests = []
    for _ in range(count):
        own = _ids(rng, int(2 ** rng.uniform(4, 9)))
        prompt = [*rng.choice(systems), *own] if rng.random() < 1 / 3 else own
        requests.append(_request(prompt, rng, 16))
    return requests


LOADS = {"shared prefixes": shared_prefixes, "mixed": mixed}


def _request(prompt: list[int], rng: random.Random, mean_output: int) -> RequestSpec:
    num_output = max(1, min(4 * mean_output, round(rng.expovariate(1 / mean_output))))
    body = {"prompt": prompt, "max_tokens": num_output, "ignore_eos": True, "temperature": 0}
    return RequestSpec("routed", "/v1/completions", body)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(count)]


def application(policy: str) -> dict[str, Any]:
    """Return the application with that policy, below /POLICY."""
    args = {
        "model": {"aliases": ["*"], "max_model_len": 1024},
        "engine": {"num_threads": 1, "max_num_seqs": NUM_SEQS, "kv_cache_tokens": KV_TOKENS},
        "ingress": {"num_replicas": 2, "num_cpus": 0.1},
        "preprocessor": {"xeon_cores": 1, "reserve_xeon_cores": False},
        "model_replica": {"pool": "arc", "num_replicas": NUM_REPLICAS, "num_cpus": 0.1},
        "routing": {"policy": policy},
    }
    place = {"name": policy, "route_prefix": f"/{policy}", "import_path": "serve_app:build_app"}
    return {**place, "args": args}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run both applications in a Ray of this process; yields the URL before their prefixes."""
    ours = {
        **serve_environment("python", loopback=True),
        "RAY_TMPDIR": str(folder),
        "XERAY_LOCK_DIR": str(folder / "locks"),
        "XERAY_SIMULATED_ARC_CARDS": str(2 * NUM_REPLICAS),
    }
    for name in [n for n in os.environ if n.startswith(("RAY_", "XERAY_"))]:
        del os.environ[name]
    os.environ.update(ours)
    port = free_port()
    ray.init(
        address="local",
        namespace="serve",
        num_cpus=8,
        resources={"arc_gpu": 2 * NUM_REPLICAS},
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": port},
            logging_config={"log_level": "ERROR"},
        )
        deploy_document({"applications": [application(policy) for policy in POLICIES]})
        url = f"http://127.0.0.1:{port}"
        for policy in POLICIES:
            wait_ready(f"{url}/{policy}")
        yield url
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_ready(url: str, timeout_s: float = 180.0) -> None:
    """Wait until every replica is ready."""
    deadline_s = time.monotonic() + timeout_s
    states: list[str] = []
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            rows = httpx.get(f"{url}/health", timeout=5).json()["replicas"]
            states = [row["state"] for row in rows]
            if states == ["ready"] * NUM_REPLICAS:
                return
        time.sleep(0.5)
    raise AssertionError(f"{url} was not ready within {timeout_s:g} s: {states}")


def prefix_tokens(url: str) -> tuple[float, float]:
    """Return the prompt tokens found in the replicas' caches so far, and those looked up."""
    time.sleep(1.2)  # the last second's answer is kept
    text = httpx.get(f"{url}/metrics", timeout=10).text
    sums = {HITS: 0.0, QUERIES: 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            if name in sums:
                sums[name] += sample.value
    return sums[HITS], sums[QUERIES]


async def ask(url: str, specs: list[RequestSpec], rate: float, seed: int) -> list[Any]:
    """Send the requests at the seed's times; returns their records."""
    prefix = "/" + url.rpartition("/")[2]
    placed = [RequestSpec(spec.kind, prefix + spec.path, spec.body) for spec in specs]
    load = LoadGenerator(Target.from_url(url, "any", timeout_s=90))
    return list((await load.run_open(placed, rate, seed)).records)


def run(url: str, specs: list[RequestSpec], rate: float, seed: int) -> Figures:
    """Send the requests to one application and return what came of them."""
    hits, queries = prefix_tokens(url)
    records = asyncio.run(ask(url, specs, rate, seed))
    more_hits, more_queries = prefix_tokens(url)
    for error in {r.error for r in records if r.error is not None}:
        print(f"{url}: {error}", file=sys.stderr)
    ttfts = sorted(r.ttft_s for r in records if r.error is None and r.ttft_s is not None)
    return Figures(
        len(records),
        len(records) - len(ttfts),
        (more_hits - hits) / max(1.0, more_queries - queries),
        ttfts[len(ttfts) // 2],
        ttfts[int(0.95 * len(ttfts))],
    )


def compare(url: str, seed: int, name: str) -> tuple[float, float]:
    """Run a load on both, print its row; returns the ratios of hit rate and of p95 TTFT."""
    rate = RATES[name]
    specs = LOADS[name](random.Random(f"{name}/{seed}"), round(rate * RUN_S))
    order = POLICIES if seed % 2 else POLICIES[::-1]
    runs = {policy: run(f"{url}/{policy}", specs, rate, seed) for policy in order}
    serves, ours = (runs[policy] for policy in POLICIES)
    ratios = (
        ours.hit_rate / serves.hit_rate if serves.hit_rate else float("inf"),
        ours.ttft_p95_s / serves.ttft_p95_s,
    )
    print(
        f"| {name} | {seed} | {ours.num_requests} | {serves.num_failed}, {ours.num_failed}"
        f" | {serves.hit_rate:.3f} | {ours.hit_rate:.3f} | {ratios[0]:.2f}"
        f" | {serves.ttft_p50_s:.2f}, {serves.ttft_p95_s:.2f}"
        f" | {ours.ttft_p50_s:.2f}, {ours.ttft_p95_s:.2f} | {ratios[1]:.2f} |",
        flush=True,
    )
    return ratios


def main() -> None:
    """Compare the routers for the seeds and loads given, or for 0 and 1 and both."""
    words = sys.argv[1:]
    seeds = [int(word) for word in words if word.isdecimal()] or [0, 1]
    loads = [load for load in LOADS if any(word in load for word in words)] or list(LOADS)
    with (
        tempfile.TemporaryDirectory(prefix="xrt", dir="/tmp", ignore_cleanup_errors=True) as name,
        serving(Path(name)) as url,
    ):
        print(
            "| load | seed | requests | failed | hits, Serve | hits, ours | ratio"
            " | TTFT p50, p95, s, Serve | ours | ratio of p95 |\n" + "|---" * 10 + "|"
        )
        ratios = {load: [compare(url, seed, load) for seed in seeds] for load in loads}
    for load, rows in ratios.items():
        hits, ttfts = zip(*rows, strict=True)
        print(json.dumps({"load": load, "hits": mean(hits), "ttft_p95": mean(ttfts)}))


if __name__ == "__main__":
    main()
