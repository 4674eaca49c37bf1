"""POST /v1/chat/completions."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.chat_output import NO_REASONING, ChatOutput
from serve_app.api.context import ApiContext, context_of, info_of
from serve_app.api.generation import GenerationResponse
from serve_app.api.jobs import Job, prepare, within_deadline
from serve_app.api.protocol.base import parse_request
from serve_app.api.protocol.chat import ChatCompletionRequest, ChatMessage
from serve_app.api.routes.inference import build_job, check_num_choices, open_call
from serve_app.api.sampling import LogprobsWish, TokenLimit
from serve_app.api.tools import (
    effort_variables,
    output_form,
    thinking_budget,
    tool_plan,
    with_form,
)
from serve_app.core.errors import ClientError, UnsupportedParameterError
from serve_app.core.requests import ModelCard, PreparedPrompt, PrepareRequest

_logger = logging.getLogger(__name__)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    context, info = context_of(request), info_of(request.scope)
    body = parse_request(ChatCompletionRequest, await request.body())
    job, output = await open_chat(request, body, "chatcmpl")
    return GenerationResponse(context, info, job, output)


async def open_chat(
    request: Request, body: ChatCompletionRequest, id_prefix: str
) -> tuple[Job, ChatOutput]:
    """Return the job that answers the conversation, and what reads its chunks.

    Raises ClientError, naming chat's parameters, and whatever the preparation found.
    """
    context, info = context_of(request), info_of(request.scope)
    wish = _logprobs_wish(body)
    n = body.n or 1
    check_num_choices(context, n)
    template_kwargs = chat_template_kwargs(
        context, body.chat_template, body.chat_template_kwargs, body.reasoning_effort
    )
    unprepared = chat_prompt(
        info.request_id,
        body.messages,
        body.add_generation_prompt,
        body.continue_final_message,
        template_kwargs,
    )
    async with within_deadline(context, info):
        call = await open_call(request, body, wish)
        form = output_form(body, call.card, call.capabilities)
        budget = thinking_budget(body, context.config.reasoning, call.capabilities)
        prompt = await prepare(context, call.card, replace(unprepared, form=form), "messages")
    if context.config.logging.log_prompts:
        _logger.info("messages: %s", [message.model_dump() for message in body.messages])
    job = build_job(call, id_prefix, body, (prompt,), _token_limit(body), wish, n)
    kind = _reasoning_kind(context, call.card, prompt)
    plan = tool_plan(form, call.card)
    job = with_form(job, prompt, kind, budget, plan)
    return job, ChatOutput(job, kind, context.config.ingress.reasoning_field, plan)


def chat_prompt(
    request_id: str,
    messages: tuple[ChatMessage, ...],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: dict[str, Any],
    add_special_tokens: bool = False,
) -> PrepareRequest:
    """Return what the Preprocessor needs; a template writes the special tokens itself."""
    continues = bool(continue_final_message)
    if continues and add_generation_prompt:
        raise ClientError(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    return PrepareRequest(
        request_id=request_id,
        messages=tuple(
            message.to_template(f"messages.{index}") for index, message in enumerate(messages)
        ),
        add_generation_prompt=not continues
        if add_generation_prompt is None
        else add_generation_prompt,
        continue_final_message=continues,
        add_special_tokens=add_special_tokens,
        template_kwargs=template_kwargs,
    )


def chat_template_kwargs(
    context: ApiContext,
    chat_template: str | None,
    kwargs: dict[str, Any] | None,
    reasoning_effort: str | None = None,
) -> dict[str, Any]:
    """Return the template's variables. Raises UnsupportedParameterError on a client's template."""
    merged = dict(kwargs or {})
    if chat_template is not None or "chat_template" in merged:
        if not context.config.ingress.allow_request_chat_template:
            raise UnsupportedParameterError(
                "chat_template is not accepted in a request by this server", param="chat_template"
            )
        if chat_template is not None:
            merged["chat_template"] = chat_template
    return {**effort_variables(reasoning_effort), **merged}


def _logprobs_wish(body: ChatCompletionRequest) -> LogprobsWish:
    if not body.logprobs:
        if body.top_logprobs:
            raise ClientError("top_logprobs only goes with logprobs: true", param="top_logprobs")
        return LogprobsWish()
    return LogprobsWish(logprobs=body.top_logprobs or 0)


def _token_limit(body: ChatCompletionRequest) -> TokenLimit:
    if body.max_completion_tokens is not None:
        return TokenLimit(
            body.max_completion_tokens, "max_completion_tokens", prompt_param="messages"
        )
    if body.max_tokens == 0:
        raise ClientError("max_tokens should be at least 1", param="max_tokens")
    return TokenLimit(body.max_tokens, prompt_param="messages")


def _reasoning_kind(context: ApiContext, card: ModelCard, prompt: PreparedPrompt) -> str:
    setting = context.config.model.reasoning
    if setting != "auto":
        return setting
    return "deepseek_r1" if card.is_reasoning or prompt.starts_in_reasoning else NO_REASONING
