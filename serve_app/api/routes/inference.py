"""What chat completions, completions and /generate have in common."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, cast

from starlette.requests import Request

from serve_app.api.context import (
    ApiContext,
    RequestInfo,
    check_model_allowed,
    context_of,
    info_of,
    resolve_model,
)
from serve_app.api.jobs import (
    Job,
    SequenceOptions,
    build_requests,
    check_prompt_ids,
    fingerprint,
    new_id,
    prepare,
    remaining_s,
)
from serve_app.api.protocol.sampling import SamplingFields
from serve_app.api.sampling import (
    LogprobsWish,
    TokenLimit,
    build_sampling,
    check_capabilities,
    resolve_max_tokens,
)
from serve_app.core.errors import ClientError, UnsupportedParameterError
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import ModelCard, PreparedPrompt, PrepareRequest
from serve_app.observability.tracing import PROVIDER_NAME, Attribute, current_span

PromptInput = str | tuple[int, ...]

_MAX_PREPARED_AT_ONCE = 256
_CHAT_ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/responses"})


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way to a job: the application, the model, what its engine can do."""

    context: ApiContext
    info: RequestInfo
    card: ModelCard
    capabilities: EngineCapabilities


async def open_call(request: Request, fields: SamplingFields, wish: LogprobsWish) -> Call:
    """Resolve the model and check what needs no prompt. Raises ClientError, OverloadedError."""
    if fields.stream_options is not None and not fields.stream:
        raise ClientError("stream_options only goes with stream: true", param="stream_options")
    context = context_of(request)
    card = await resolve_model(context.backend, fields.model)
    info = info_of(request.scope)
    check_model_allowed(info, card)
    if card.embedding_size is not None:
        raise UnsupportedParameterError(
            f"The model {card.id} computes embeddings; ask for them at /v1/embeddings.",
            param="model",
        )
    capabilities = await context.backend.capabilities(card.id)
    check_capabilities(fields, wish, capabilities)
    _name_span(info, fields, card)
    return Call(context, info, card, capabilities)


def _name_span(info: RequestInfo, fields: SamplingFields, card: ModelCard) -> None:
    """Tell the span what is asked, by the conventions for generative AI."""
    operation = "chat" if info.endpoint in _CHAT_ENDPOINTS else "text_completion"
    asked: dict[str, float | None] = {
        "gen_ai.request.temperature": fields.temperature,
        "gen_ai.request.top_p": fields.top_p,
        "gen_ai.request.max_tokens": fields.max_tokens,
        "gen_ai.request.seed": fields.seed,
    }
    span = current_span()
    span.rename(f"{operation} {card.id}")
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER_NAME,
        "gen_ai.request.model": card.id,
        "gen_ai.response.model": card.id,
        "gen_ai.request.stream": bool(fields.stream),
    }
    attributes |= {name: value for name, value in asked.items() if value is not None}
    span.set(attributes)


def check_num_choices(context: ApiContext, n: int, num_prompts: int = 1) -> None:
    """Raise ClientError where `n`, or prompts × n, is more than the server allows."""
    max_n = context.config.ingress.max_n
    if n > max_n:
        raise ClientError(f"n should be at most {max_n}", param="n")
    if n * num_prompts > 16 * max_n:
        raise ClientError(
            f"prompts times n should be at most {16 * max_n}; got {n * num_prompts}", param="prompt"
        )


def prompt_list(prompt: PromptInput | tuple[PromptInput, ...]) -> tuple[PromptInput, ...]:
    """Return the prompts of a parameter that takes a text, texts, token ids or lists of them."""
    if isinstance(prompt, str):
        return (prompt,)
    return (cast(PromptInput, prompt),) if isinstance(prompt[0], int) else cast(Any, prompt)


async def prepare_prompts(
    context: ApiContext,
    info: RequestInfo,
    card: ModelCard,
    prompts: tuple[PromptInput, ...],
    add_special_tokens: bool,
    param: str,
) -> tuple[PreparedPrompt, ...]:
    """Return the prompts' ids. Raises ClientError, naming `param`, or its item among several."""

    async def one(prompt: PromptInput, name: str) -> PreparedPrompt:
        if not isinstance(prompt, str):
            check_prompt_ids(prompt, card, name)
            return PreparedPrompt(token_ids=prompt)
        request = PrepareRequest(
            request_id=info.request_id, text=prompt, add_special_tokens=add_special_tokens
        )
        return await prepare(context, card, request, name)

    if len(prompts) == 1:
        return (await one(prompts[0], param),)
    prepared: list[PreparedPrompt] = []
    for start in range(0, len(prompts), _MAX_PREPARED_AT_ONCE):
        # At once, so that the Preprocessor can batch them.
        some = enumerate(prompts[start : start + _MAX_PREPARED_AT_ONCE], start)
        prepared += await asyncio.gather(*(one(each, f"{param}.{i}") for i, each in some))
    return tuple(prepared)


def build_job(
    call: Call,
    id_prefix: str,
    fields: SamplingFields,
    prompts: tuple[PreparedPrompt, ...],
    limit: TokenLimit,
    wish: LogprobsWish,
    n: int = 1,
) -> Job:
    """Return the job for prepared prompts. Raises ClientError on what does not fit the model."""
    default_max_tokens = call.context.config.ingress.default_max_tokens
    samplings = tuple(
        build_sampling(
            fields,
            call.card,
            call.capabilities,
            resolve_max_tokens(limit, call.card, len(prompt.token_ids), default_max_tokens),
            wish,
        )
        for prompt in prompts
    )
    options = SequenceOptions(
        stop=fields.stop_strings,
        include_stop_str_in_output=bool(fields.include_stop_str_in_output),
        skip_special_tokens=fields.skip_special_tokens is not False,
        stream=bool(fields.stream),
    )
    job_id = new_id(id_prefix)
    deadline_s = remaining_s(call.context, call.info)
    return Job(
        id=job_id,
        created=int(time.time()),
        card=call.card,
        fingerprint=fingerprint(call.card, call.capabilities),
        prompts=prompts,
        requests=build_requests(job_id, prompts, samplings, n, options, call.info, deadline_s),
        n=n,
        stream=options.stream,
        include_usage=fields.includes_usage,
    )
