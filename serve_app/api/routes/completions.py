"""POST /v1/completions and POST /generate."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.completion_output import CompletionOutput, Echo
from serve_app.api.context import context_of, info_of
from serve_app.api.generate_output import GenerateOutput
from serve_app.api.generation import GenerationResponse
from serve_app.api.jobs import within_deadline
from serve_app.api.protocol.base import parse_query, parse_request
from serve_app.api.protocol.completions import CompletionRequest, GenerateBody
from serve_app.api.routes.inference import (
    Call,
    PromptInput,
    build_job,
    check_num_choices,
    open_call,
    prepare_prompts,
    prompt_list,
)
from serve_app.api.sampling import LogprobsWish, TokenLimit
from serve_app.core.errors import ClientError, UnsupportedParameterError
from serve_app.core.requests import PreparedPrompt

_logger = logging.getLogger(__name__)

OPENAI_COMPLETION_TOKENS = 16
"""The specification's default of max_tokens for completions."""


async def completions(request: Request) -> Response:
    """Continue one or more prompts."""
    context, info = context_of(request), info_of(request.scope)
    body = parse_request(CompletionRequest, await request.body())
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise UnsupportedParameterError(
            "best_of is not supported unless it equals n", param="best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise ClientError("max_tokens 0 only goes with echo: true", param="max_tokens")
    prompts = prompt_list(body.prompt)
    check_num_choices(context, n, len(prompts))
    wish = LogprobsWish(body.logprobs, body.logprobs if body.echo else None)
    async with within_deadline(context, info):
        call = await open_call(request, body, wish)
        add_special_tokens = body.add_special_tokens is not False
        prepared = await prepare_prompts(
            context, info, call.card, prompts, add_special_tokens, "prompt"
        )
        echoes = await _echoes(call, prompts, prepared, body)
    if context.config.logging.log_prompts:
        _logger.info("prompts: %s", prompts)
    limit = TokenLimit(body.max_tokens, endpoint_default=OPENAI_COMPLETION_TOKENS)
    job = build_job(call, "cmpl", body, prepared, limit, wish, n)
    return GenerationResponse(context, info, job, CompletionOutput(job, echoes, body.logprobs))


async def generate(request: Request) -> Response:
    """Continue one prompt, in the plain form; the query stands in for an absent body."""
    context, info = context_of(request), info_of(request.scope)
    raw = await request.body()
    if not raw and request.query_params:
        body = parse_query(GenerateBody, dict(request.query_params))
    else:
        body = parse_request(GenerateBody, raw)
    if body.max_tokens == 0:
        raise ClientError("max_tokens should be at least 1", param="max_tokens")
    async with within_deadline(context, info):
        call = await open_call(request, body, LogprobsWish())
        prepared = await prepare_prompts(context, info, call.card, (body.prompt,), True, "prompt")
    if context.config.logging.log_prompts:
        _logger.info("prompt: %s", body.prompt)
    job = build_job(call, "gen", body, prepared, TokenLimit(body.max_tokens), LogprobsWish())
    return GenerationResponse(context, info, job, GenerateOutput(job))


async def _echoes(
    call: Call,
    prompts: tuple[PromptInput, ...],
    prepared: tuple[PreparedPrompt, ...],
    body: CompletionRequest,
) -> tuple[Echo, ...] | None:
    if not body.echo:
        return None
    backend, model_id = call.context.backend, call.card.id
    echoes = []
    for prompt, ready in zip(prompts, prepared, strict=True):
        text = prompt
        if not isinstance(text, str):
            text = await backend.detokenize(model_id, ready.token_ids)
        tokens: list[str] = []
        if body.logprobs is not None:
            tokens = await backend.token_strings(model_id, ready.token_ids)
        echoes.append(Echo(text, tuple(tokens)))
    return tuple(echoes)
