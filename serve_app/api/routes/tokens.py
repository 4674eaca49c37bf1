"""POST /tokenize, POST /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.context import check_model_allowed, context_of, info_of, resolve_model
from serve_app.api.errors import json_response
from serve_app.api.jobs import within_deadline
from serve_app.api.protocol.base import parse_request
from serve_app.api.protocol.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from serve_app.api.routes.chat import chat_prompt, chat_template_kwargs
from serve_app.core.errors import ClientError, error_from_info
from serve_app.core.requests import PrepareRequest


async def tokenize(request: Request) -> Response:
    """Turn text or a conversation into token ids."""
    context, info = context_of(request), info_of(request.scope)
    body = parse_request(TokenizeRequest, await request.body())
    if body.messages is not None:
        prepare = chat_prompt(
            info.request_id,
            body.messages,
            body.add_generation_prompt,
            body.continue_final_message,
            chat_template_kwargs(context, body.chat_template, body.chat_template_kwargs),
            bool(body.add_special_tokens),
        )
    else:
        prepare = PrepareRequest(
            request_id=info.request_id,
            text=body.prompt,
            add_special_tokens=body.add_special_tokens is not False,
            parse_special=body.parse_special,
        )
    async with within_deadline(context, info):
        card = await resolve_model(context.backend, body.model)
        check_model_allowed(info, card)
        prepared = await context.backend.prepare(card.id, prepare)
        if prepared.error is not None:
            raise error_from_info(prepared.error)
        strings = None
        if body.return_token_strs:
            strings = await context.backend.token_strings(card.id, prepared.token_ids)
    answer = TokenizeAnswer(
        count=len(prepared.token_ids),
        max_model_len=card.max_model_len,
        tokens=list(prepared.token_ids),
        token_strs=strings,
    )
    return json_response(answer.model_dump())


async def detokenize(request: Request) -> Response:
    """Turn token ids into text."""
    context, info = context_of(request), info_of(request.scope)
    body = parse_request(DetokenizeRequest, await request.body())
    async with within_deadline(context, info):
        card = await resolve_model(context.backend, body.model)
        check_model_allowed(info, card)
        if any(not 0 <= token_id < card.vocab_size for token_id in body.tokens):
            raise ClientError(
                f"tokens should be between 0 and {card.vocab_size - 1}", param="tokens"
            )
        text = await context.backend.detokenize(card.id, body.tokens)
    return json_response(DetokenizeAnswer(prompt=text).model_dump())


async def tokenizer_info(request: Request) -> Response:
    """Tell facts about the tokenizer; absent unless the server exposes it."""
    context = context_of(request)
    if not context.config.ingress.expose_tokenizer_info:
        raise HTTPException(404)
    card = await resolve_model(context.backend, request.query_params.get("model"))
    check_model_allowed(info_of(request.scope), card)
    info = TokenizerInfo(
        model=card.id,
        vocab_size=card.vocab_size,
        max_model_len=card.max_model_len,
        eos_token_ids=list(card.eos_token_ids),
        has_chat_template=card.has_chat_template,
        is_reasoning=card.is_reasoning,
    )
    return json_response(info.model_dump())
