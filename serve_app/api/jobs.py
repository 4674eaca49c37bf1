"""A generation job: what is decided about a request before the first token; its token counts."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from serve_app import __version__
from serve_app.api.context import ApiContext, RequestInfo
from serve_app.api.protocol.usage import CompletionTokensDetails, PromptTokensDetails, Usage
from serve_app.api.sampling import seed_of_choice
from serve_app.core.errors import ClientError, DeadlineError, error_from_info
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import (
    GenerateChunk,
    GenerateRequest,
    ModelCard,
    PreparedPrompt,
    PrepareRequest,
)
from serve_app.core.sampling import SamplingParams
from serve_app.observability.tracing import REQUEST_ID, current_span


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request. Choice `i` answers prompt `i // n`; `requests[i]` is its sequence."""

    id: str
    created: int
    card: ModelCard
    fingerprint: str
    prompts: tuple[PreparedPrompt, ...]
    requests: tuple[GenerateRequest, ...]
    n: int = 1
    stream: bool = False
    include_usage: bool = False

    def prompt_of(self, choice: int) -> PreparedPrompt:
        """Return the prompt that a choice answers."""
        return self.prompts[choice // self.n]


@dataclass(frozen=True, slots=True)
class SequenceOptions:
    """What the sequences of a job share besides the sampling."""

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False


def new_id(prefix: str) -> str:
    """Return an id that no other request has, whatever X-Request-Id says."""
    return f"{prefix}-{uuid.uuid4().hex}"


def fingerprint(card: ModelCard, capabilities: EngineCapabilities) -> str:
    """Return `system_fingerprint`: version and model; `-bi`: seeds repeat in any batch."""
    digest = hashlib.sha256(f"{__version__}|{card.id}|{card.created}".encode()).hexdigest()[:10]
    return f"fp_{digest}-bi" if capabilities.batch_invariant else f"fp_{digest}"


def build_requests(
    job_id: str,
    prompts: tuple[PreparedPrompt, ...],
    samplings: tuple[SamplingParams, ...],
    n: int,
    options: SequenceOptions,
    info: RequestInfo,
    deadline_s: float | None,
) -> tuple[GenerateRequest, ...]:
    """Return n sequences for each prompt, with seeds derived from the request's."""
    return tuple(
        GenerateRequest(
            request_id=f"{job_id}-{place * n + choice}",
            prompt_token_ids=prompt.token_ids,
            sampling=replace(sampling, seed=seed_of_choice(sampling.seed, choice)),
            stop=options.stop,
            include_stop_str_in_output=options.include_stop_str_in_output,
            skip_special_tokens=options.skip_special_tokens,
            stream=options.stream,
            deadline_s=deadline_s,
            trace_context={REQUEST_ID: info.request_id, **current_span().context()},
        )
        for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        for choice in range(n)
    )


def remaining_s(context: ApiContext, info: RequestInfo) -> float | None:
    """Return how many seconds the request has left, or None without a deadline."""
    timeout_s = context.config.ingress.request_timeout_s
    if timeout_s is None:
        return None
    return max(0.0, info.arrival_s + timeout_s - time.monotonic())


@asynccontextmanager
async def within_deadline(context: ApiContext, info: RequestInfo) -> AsyncIterator[None]:
    """Run the block within the request's deadline. Raises DeadlineError past it."""
    try:
        async with asyncio.timeout(remaining_s(context, info)) as scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise DeadlineError("The request took longer than the server allows.") from None
        raise


async def prepare(
    context: ApiContext, card: ModelCard, request: PrepareRequest, param: str
) -> PreparedPrompt:
    """Return the ids of a prompt. Raises what the preparation found, or on an empty prompt."""
    with context.tracing.span("preprocess", current_span().context()) as span:
        if below := span.context():
            request = replace(request, trace_context=below)
        prepared = await context.backend.prepare(card.id, request)
        span.set({"gen_ai.usage.input_tokens": len(prepared.token_ids)})
    if prepared.error is not None:
        raise error_from_info(prepared.error)
    check_prompt_ids(prepared.token_ids, card, param)
    return prepared


def check_prompt_ids(token_ids: tuple[int, ...], card: ModelCard, param: str) -> None:
    """Raise ClientError on an empty prompt or ids that the model does not have."""
    if not token_ids:
        raise ClientError(f"{param} is empty: there is nothing to continue.", param=param)
    if min(token_ids) < 0 or max(token_ids) >= card.vocab_size:
        raise ClientError(
            f"{param}: token ids should be between 0 and {card.vocab_size - 1}", param=param
        )


async def no_generation(num_prompt: int) -> AsyncGenerator[GenerateChunk, None]:
    """Stand in for a sequence of no tokens (echo with max_tokens 0)."""
    yield GenerateChunk(finish_reason="length", num_prompt=num_prompt)


@dataclass(slots=True)
class Tally:
    """Token counts of a job as its chunks come in."""

    job: Job
    num_prompt: dict[int, int] = field(default_factory=dict)
    num_cached: dict[int, int] = field(default_factory=dict)
    num_generated: dict[int, int] = field(default_factory=dict)
    num_reasoning: dict[int, int] = field(default_factory=dict)

    def add(self, choice: int, chunk: GenerateChunk) -> int:
        """Count a chunk; returns how many tokens it brought."""
        place = choice // self.job.n
        if place not in self.num_prompt:
            self.num_prompt[place] = len(self.job.prompts[place].token_ids)
        if chunk.num_cached:
            self.num_cached[place] = max(self.num_cached.get(place, 0), chunk.num_cached)
        before = self.num_generated.get(choice, 0)
        if chunk.num_generated > before:
            self.num_generated[choice] = chunk.num_generated
            return chunk.num_generated - before
        return 0

    def add_reasoning(self, choice: int, num_tokens: int) -> None:
        """Count generated tokens that were spent on reasoning."""
        self.num_reasoning[choice] = self.num_reasoning.get(choice, 0) + num_tokens

    def usage(self) -> Usage:
        """Return the counts so far."""
        prompt = sum(self.num_prompt.values())
        completion = sum(self.num_generated.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self.num_cached.values())),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=sum(self.num_reasoning.values())
            ),
        )
