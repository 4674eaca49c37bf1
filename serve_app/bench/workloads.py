"""What is asked: request bodies, the same for the same seed on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.core.errors import ConfigError

# Ids in every usual vocabulary, past the control tokens at its beginning.
FIRST_TOKEN_ID = 1_000
LAST_TOKEN_ID = 20_000
_WORDS = ("time", "river", "stone", "garden", "winter", "number", "engine", "letter", "window")


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request: `body` lacks only the model and the stream options. `kind` groups the report."""

    kind: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Sizes in tokens; `seed` decides everything random."""

    num_requests: int = 32
    prompt_tokens: int = 128
    output_tokens: int = 64
    seed: int = 0


def make_workload(name: str, options: WorkloadOptions) -> list[RequestSpec]:
    """Return the requests of the workload `name`. ConfigError where there is none."""
    maker = WORKLOADS.get(name)
    if maker is None:
        raise ConfigError(
            f"--workload: {name} is not known; choose from {', '.join(WORKLOADS)}", param="workload"
        )
    return maker(random.Random(f"{name}/{options.seed}"), options)


def _fixed(rng: random.Random, options: WorkloadOptions) -> list[RequestSpec]:
    return [
        _completion("fixed", _ids(rng, options.prompt_tokens), options.output_tokens)
        for _ in range(options.num_requests)
    ]


def _chat(rng: random.Random, options: WorkloadOptions) -> list[RequestSpec]:
    return [_chat_request(rng, options) for _ in range(options.num_requests)]


def _long_prompt(rng: random.Random, options: WorkloadOptions) -> list[RequestSpec]:
    """Eight times the prompt, a quarter of the answer: prefill decides."""
    num_output = max(1, options.output_tokens // 4)
    return [
        _completion("long_prompt", _ids(rng, 8 * options.prompt_tokens), num_output)
        for _ in range(options.num_requests)
    ]


def _shared_prefix(rng: random.Random, options: WorkloadOptions) -> list[RequestSpec]:
    """Four groups; within a group three quarters of each prompt are the same."""
    num_shared = options.prompt_tokens * 3 // 4
    prefixes = [_ids(rng, num_shared) for _ in range(4)]
    return [
        _completion(
            "shared_prefix",
            [*prefixes[index % 4], *_ids(rng, options.prompt_tokens - num_shared)],
            options.output_tokens,
        )
        for index in range(options.num_requests)
    ]


def _mixed(rng: random.Random, options: WorkloadOptions) -> list[RequestSpec]:
    """Half chat, the rest long prompts and shared prefixes in turn, in random order."""
    chat, long_prompt, shared = (
        maker(rng, options) for maker in (_chat, _long_prompt, _shared_prefix)
    )
    specs = [
        (chat, long_prompt, chat, shared)[index % 4][index] for index in range(options.num_requests)
    ]
    rng.shuffle(specs)
    return specs


WORKLOADS: dict[str, Callable[[random.Random, WorkloadOptions], list[RequestSpec]]] = {
    "fixed": _fixed,
    "chat": _chat,
    "long_prompt": _long_prompt,
    "shared_prefix": _shared_prefix,
    "mixed": _mixed,
}


def _ids(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num_tokens)]


def _completion(kind: str, prompt: list[int], num_output: int) -> RequestSpec:
    return RequestSpec(
        kind,
        "/v1/completions",
        {"prompt": prompt, "max_tokens": num_output, "ignore_eos": True, "temperature": 0},
    )


def _chat_request(rng: random.Random, options: WorkloadOptions) -> RequestSpec:
    """A conversation of one or three turns whose lengths vary by a factor of two either way."""
    num_turns = rng.choice((1, 1, 3))
    num_words = max(1, int(options.prompt_tokens * rng.uniform(0.5, 2.0)) // num_turns)
    roles = ["user", "assistant", "user"][:num_turns]
    messages = [
        {"role": role, "content": " ".join(rng.choices(_WORDS, k=num_words))} for role in roles
    ]
    num_output = max(1, int(options.output_tokens * rng.uniform(0.5, 2.0)))
    body = {"messages": messages, "max_tokens": num_output, "temperature": 0.7}
    return RequestSpec("chat", "/v1/chat/completions", {**body, "seed": rng.randrange(2**31)})
