"""`xeray bench soak`: a mixed load for as long as it is told to, and what is left of it at the end.

Chat, completions, plain and long prompts, streamed and not; clients that leave at any moment, and
requests that are wrong. Every request must end with an answer, a typed error or by its client's
leaving; afterwards no block is held, nothing runs, and nothing has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.bench import options as common
from serve_app.bench.footprint import FootprintWatch, GrowthLimits
from serve_app.bench.load import Target, read_response
from serve_app.bench.service import Service
from serve_app.bench.verdict import Line, growth_lines, print_lines
from serve_app.bench.wire import ProtocolError
from serve_app.core.errors import ConfigError

_SETTLE_S = 15.0
_ZEROS = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_IN_FLIGHT = "http_requests_in_flight"
_WORDS = ("time", "river", "stone", "garden", "winter", "number", "engine", "letter", "window")
_REFUSED = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """`num_clients` clients ask one request after the other for `duration_s` seconds."""

    duration_s: float = 600.0
    num_clients: int = 12
    output_tokens: int = 48
    long_words: int = 400
    cancel_share: float = 0.25
    bad_share: float = 0.1
    timeout_s: float = 120.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SoakRequest:
    """One request. `leave_after`: the share of its bytes or time after which the client goes.

    is_bad: it must be refused with a 4xx.
    """

    kind: str
    path: str
    body: bytes
    leave_after_s: float | None = None
    is_bad: bool = False


@dataclass(slots=True)
class SoakTally:
    """How the requests ended."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    @property
    def num_requests(self) -> int:
        """All that were sent."""
        return sum(self.ends.values())


def make_request(rng: random.Random, options: SoakOptions, model: str) -> SoakRequest:
    """Return the next request of a client."""
    words = rng.choices(_WORDS, k=rng.randint(3, 60))
    body: dict[str, Any] = {"model": model, "max_tokens": rng.randint(1, options.output_tokens)}
    body["stream"] = rng.random() < 0.6
    kind = rng.choice(("chat", "completions", "responses", "generate", "long"))
    path = {"chat": "/v1/chat/completions", "responses": "/v1/responses"}.get(
        kind, "/generate" if kind == "generate" else "/v1/completions"
    )
    if kind == "long":
        words = rng.choices(_WORDS, k=options.long_words)
    text = " ".join(words)
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": text}]
    elif kind == "responses":
        body["input"] = text
        body["max_output_tokens"] = body.pop("max_tokens")
    else:
        body["prompt"] = text
    if rng.random() < options.bad_share:
        return SoakRequest(f"bad {kind}", path, _spoiled(rng, body), is_bad=True)
    leaves = rng.random() < options.cancel_share
    leave_after_s = rng.choice((0.0, 0.01, rng.uniform(0.0, 2.0))) if leaves else None
    return SoakRequest(kind, path, json.dumps(body).encode(), leave_after_s)


def _spoiled(rng: random.Random, body: dict[str, Any]) -> bytes:
    """Return a body that no service may accept."""
    kind = rng.randrange(4)
    if kind == 0:
        return json.dumps(body).encode()[:-2]
    wrong: tuple[dict[str, Any], ...] = (
        {"temperature": 99},
        {"stop": [""] * 40},
        {"top_p": "much"},
    )
    return json.dumps({**body, **wrong[kind - 1]}).encode()


async def soak(target: Target, options: SoakOptions) -> SoakTally:
    """Run the clients to the end of the time; returns how their requests ended."""
    tally = SoakTally()
    end_s = time.monotonic() + options.duration_s

    async def client(number: int) -> None:
        rng = random.Random(f"{options.seed}/{number}")
        while time.monotonic() < end_s:
            request = make_request(rng, options, target.model)
            end, wrong = await _ask(target, request, options.timeout_s)
            tally.ends[end] += 1
            if wrong:
                tally.wrong[f"{request.kind}: {wrong}"] += 1
            if end == "refused":
                await asyncio.sleep(0.2)

    await asyncio.gather(*(client(number) for number in range(options.num_clients)))
    return tally


async def _ask(target: Target, request: SoakRequest, timeout_s: float) -> tuple[str, str]:
    """Send a request; return how it ended, and what was wrong about that ("" for nothing)."""
    try:
        async with asyncio.timeout(timeout_s):
            if request.leave_after_s is None:
                return _judged(request, *await _exchange(target, request))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(request.leave_after_s):
                    return _judged(request, *await _exchange(target, request))
            return "left", ""
    except TimeoutError:
        return "timeout", f"no answer within {timeout_s:g} s"
    except (OSError, ProtocolError, ValueError) as error:
        return "broken", f"{type(error).__name__}: {error}"


async def _exchange(target: Target, request: SoakRequest) -> tuple[int, bytes]:
    """Return status and body; leaving it early closes the connection."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        lines = [
            f"POST {request.path} HTTP/1.1",
            f"Host: {target.host}:{target.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(request.body)}",
            "Connection: close",
        ]
        if target.api_key:
            lines.append(f"Authorization: Bearer {target.api_key}")
        writer.write("\r\n".join([*lines, "", ""]).encode() + request.body)
        head, body = await read_response(reader)
        return head.status, body
    finally:
        writer.close()


def _judged(request: SoakRequest, status: int, body: bytes) -> tuple[str, str]:
    """Return how an answer counts, and what is wrong about it."""
    if request.is_bad:
        is_right = 400 <= status < 500 and b'"error"' in body
        return "bad", "" if is_right else f"a bad request got {status}"
    if status in _REFUSED:
        return "refused", "" if b'"code"' in body else f"{status} without a code"
    if status != 200:
        return "error", f"status {status}: {body[:120].decode(errors='replace')}"
    if body.startswith(b"{"):
        return "answered", ""
    is_whole = body.endswith(b"data: [DONE]\n\n") or b"event: response." in body[-20_000:]
    if not is_whole or b'"error": {' in body or b"response.failed" in body:
        return "error", f"a stream ended with {body[-80:].decode(errors='replace')}"
    return "answered", ""


async def leftovers(url: str, settle_s: float = _SETTLE_S) -> dict[str, float]:
    """Return what the metrics still show of ended requests, after at most `settle_s`; {} is right.

    Gauges over all replicas: sequences that run or wait, blocks that are held, requests in flight.
    """
    deadline_s = time.monotonic() + settle_s
    while True:
        left = {name: value for name, value in (await _gauges(url)).items() if value > 0}
        if not left or time.monotonic() > deadline_s:
            return left
        await asyncio.sleep(0.25)


async def _gauges(url: str) -> dict[str, float]:
    text = await asyncio.to_thread(_read, f"{url}/metrics")
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name, _, rest = line.removeprefix("xeray_").partition("{")
        if name in (*_ZEROS, _IN_FLIGHT):
            value = float(rest.rpartition("}")[2].split()[0])
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        text: str = answer.read().decode()
        return text


def lines_of(tally: SoakTally, left: dict[str, float], growths: Sequence[Line]) -> list[Line]:
    """Return each limit with what was seen."""
    return [
        Line("requests", tally.num_requests, "≥ 1", tally.num_requests >= 1),
        Line("answered", tally.ends["answered"], "≥ 1", tally.ends["answered"] >= 1),
        Line("wrong ends", sum(tally.wrong.values()), "0", not tally.wrong),
        Line(
            "left behind (running, waiting, blocks, in flight)", sum(left.values()), "0", not left
        ),
        *growths,
    ]


def add_soak(parser: argparse.ArgumentParser) -> None:
    """Add the options of `xeray bench soak`."""
    common.add_config(parser)
    parser.add_argument("--minutes", type=float, help="how long (10)")
    parser.add_argument("--clients", type=int, help="clients that ask at once (12)")
    parser.add_argument("--output-tokens", type=int, help="longest answer (48)")
    parser.add_argument("--seed", type=int, help="decides what is asked, and who leaves (0)")


def run_soak(options: argparse.Namespace) -> int:
    """Soak a service; print what it did and what is left; 1 where a limit breaks."""
    chosen = _options(options)
    changes = ('model.aliases=["*"]', *common.overrides(options))
    print("starting the service …", flush=True)
    with Service(common.config_path(options), changes, host=common.host(options)) as service:
        watch = FootprintWatch(service.processes)
        target = common.target(options, service.url)
        tally, left = asyncio.run(_watched(target, service.url, chosen, watch))
    lines = lines_of(tally, left, growth_lines(watch.growths(GrowthLimits())))
    print_lines(f"soak: {chosen.num_clients} clients for {chosen.duration_s:g} s", lines)
    print(f"  ends: {dict(tally.ends.most_common())}")
    for wrong, count in tally.wrong.most_common(5):
        print(f"  {count} × {wrong}")
    report = {
        "ends": dict(tally.ends),
        "wrong": dict(tally.wrong),
        "left": left,
        "limits": [line.to_dict() for line in lines],
    }
    common.write_json(options, {"soak": report})
    return 0 if all(line.is_held for line in lines) else 1


def _options(options: argparse.Namespace) -> SoakOptions:
    """Return what the command line asks for. Raises ConfigError on a figure that is not above 0."""
    names = {
        "minutes": "duration_s",
        "clients": "num_clients",
        "output_tokens": "output_tokens",
        "seed": "seed",
    }
    given = {
        to: value
        for name, to in names.items()
        if (value := getattr(options, name, None)) is not None
    }
    for name, to in names.items():
        if name != "seed" and given.get(to, 1) <= 0:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} should be more than 0, got {given[to]:g}", param=name)
    if "duration_s" in given:
        given["duration_s"] *= 60.0
    return SoakOptions(**given)


async def _watched(
    target: Target, url: str, options: SoakOptions, watch: FootprintWatch
) -> tuple[SoakTally, dict[str, float]]:
    async with watch.watching():
        tally = await soak(target, options)
    return tally, await leftovers(url)
