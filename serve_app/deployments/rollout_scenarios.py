"""Scenario files: what a new version must answer, and how fast, before any client meets it.

A file is a YAML mapping::

    name: json-extraction
    max_latency_p95_s: 20          # over all requests of the file, optional
    requests:
      - name: order
        body: {messages: [...], max_tokens: 64}     # POST path, default /v1/chat/completions
        repeat: 2
        expect:
          contains: [words]        # all of them
          regex: '^\\{.*'          # searched in the answer
          json_fields: {city: Berlin, total: null}  # the answer is JSON with these; null: any value
          finish_reason: stop
          min_tokens: 1
          max_latency_s: 10
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import yaml
from pydantic import Field, field_validator

from serve_app.config.load import validate_section
from serve_app.config.section import PositiveInt, Seconds, Section
from serve_app.core.errors import ConfigError
from serve_app.deployments.rollout_compare import p95

_FOLDER = "scenarios"
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


class Expectation(Section):
    """What an answer must be like; what is not given is not checked."""

    contains: tuple[str, ...] = ()
    regex: str | None = None
    json_fields: dict[str, Any] | None = None
    finish_reason: str | None = None
    min_tokens: PositiveInt = 1
    max_latency_s: Seconds | None = None

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class ScenarioRequest(Section):
    """One request and what is expected of its answer."""

    name: str
    body: dict[str, Any]
    path: str = "/v1/chat/completions"
    repeat: PositiveInt = 1
    expect: Expectation = Expectation()


class Scenario(Section):
    """A file of requests."""

    name: str
    description: str = ""
    max_latency_p95_s: Seconds | None = None
    requests: tuple[ScenarioRequest, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """How a scenario went: its failures, one line each, and its p95 latency in seconds."""

    name: str
    num_requests: int
    latency_p95_s: float
    failures: tuple[str, ...]


def bundled_scenarios() -> list[str]:
    """Return the names of the scenarios that ship with XeRay."""
    folder = resources.files("serve_app.deployments") / _FOLDER
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_scenario(name: str) -> Scenario:
    """Return a bundled scenario by name, or a file's. Raises ConfigError, one line."""
    path = Path(name)
    try:
        if name in bundled_scenarios():
            bundled = resources.files("serve_app.deployments") / _FOLDER / f"{name}.yaml"
            content = bundled.read_bytes()
        else:
            content = path.read_bytes()
    except OSError as error:
        known = ", ".join(bundled_scenarios())
        raise ConfigError(
            f"scenario {name}: cannot be read ({error.strerror}); a YAML file, or one of {known}"
        ) from None
    try:
        values = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"scenario {name}: not YAML ({str(error).splitlines()[0]})") from None
    return validate_section(Scenario, values, where=f"scenario {name}")


async def run_scenario(scenario: Scenario, client: httpx.AsyncClient, model: str) -> ScenarioResult:
    """Send the requests one after the other and check each answer."""
    failures: list[str] = []
    latencies: list[float] = []
    for request in scenario.requests:
        for _ in range(request.repeat):
            started_s = time.monotonic()
            problem = await _ask(client, request, model)
            latency_s = time.monotonic() - started_s
            latencies.append(latency_s)
            limit_s = request.expect.max_latency_s
            if problem is None and limit_s is not None and latency_s > limit_s:
                problem = f"took {latency_s:.2f} s, at most {limit_s:g} s allowed"
            if problem is not None:
                failures.append(f"{scenario.name}/{request.name}: {problem}")
    latency_p95_s = p95(latencies)
    limit_s = scenario.max_latency_p95_s
    if limit_s is not None and latency_p95_s > limit_s:
        failures.append(f"{scenario.name}: p95 latency {latency_p95_s:.2f} s, limit {limit_s:g} s")
    return ScenarioResult(scenario.name, len(latencies), latency_p95_s, tuple(failures))


async def _ask(client: httpx.AsyncClient, request: ScenarioRequest, model: str) -> str | None:
    """Return what is wrong with the answer, None where nothing is."""
    try:
        response = await client.post(request.path, json={"model": model, **request.body})
    except httpx.HTTPError as error:
        return f"no answer ({type(error).__name__})"
    if response.status_code != 200:
        return f"HTTP {response.status_code}: {response.text[:200]}"
    try:
        answer = response.json()
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
        num_tokens = int(answer["usage"]["completion_tokens"])
    except (ValueError, LookupError, TypeError):
        return f"not an answer of this API: {response.text[:200]}"
    return check_answer(request.expect, text, choice.get("finish_reason"), num_tokens)


def check_answer(
    expect: Expectation, text: str, finish_reason: str | None, num_tokens: int
) -> str | None:
    """Return what an answer lacks of what is expected, None where nothing is missing."""
    missing = [word for word in expect.contains if word.lower() not in text.lower()]
    if missing:
        return f"lacks {', '.join(map(repr, missing))}: {_short(text)}"
    if expect.regex is not None and re.search(expect.regex, text) is None:
        return f"does not match {expect.regex!r}: {_short(text)}"
    if expect.finish_reason is not None and finish_reason != expect.finish_reason:
        return f"finish_reason is {finish_reason}, expected {expect.finish_reason}"
    if num_tokens < expect.min_tokens:
        return f"{num_tokens} tokens, expected at least {expect.min_tokens}"
    return None if expect.json_fields is None else _check_json(expect.json_fields, text)


def _check_json(wanted: dict[str, Any], text: str) -> str | None:
    fenced = _FENCE.search(text)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except ValueError:
        return f"is not JSON: {_short(text)}"
    if not isinstance(value, dict):
        return f"is no JSON object: {_short(text)}"
    for name, expected in wanted.items():
        if name not in value:
            return f"has no field {name!r}: {_short(text)}"
        if expected is not None and value[name] != expected:
            return f"field {name!r} is {value[name]!r}, expected {expected!r}"
    return None


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 80 else f"{flat[:77]}…")


def failures_of(results: Sequence[ScenarioResult]) -> list[str]:
    """Return the failures of all scenarios."""
    return [failure for result in results for failure in result.failures]
