"""POST /v1/embeddings: vectors of texts, where the configured model is one for them."""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.context import check_model_allowed, context_of, info_of, resolve_model
from serve_app.api.embedding_output import EmbeddingJob, EmbeddingsResponse
from serve_app.api.jobs import SequenceOptions, build_requests, new_id, remaining_s, within_deadline
from serve_app.api.protocol.base import parse_request
from serve_app.api.protocol.embeddings import MAX_INPUTS, EmbeddingRequest
from serve_app.api.routes.inference import prepare_prompts, prompt_list
from serve_app.core.errors import ClientError, ContextLengthError, UnsupportedParameterError
from serve_app.core.requests import ModelCard, PreparedPrompt
from serve_app.core.sampling import SamplingParams
from serve_app.observability.tracing import PROVIDER_NAME, current_span

_logger = logging.getLogger(__name__)
_SAMPLING = SamplingParams(max_tokens=0, embeds=True)


async def embeddings(request: Request) -> Response:
    """Turn each input into a vector."""
    context, info = context_of(request), info_of(request.scope)
    body = parse_request(EmbeddingRequest, await request.body())
    prompts = prompt_list(body.input)
    if len(prompts) > MAX_INPUTS:
        raise ClientError(
            f"input should have at most {MAX_INPUTS} items; got {len(prompts)}", param="input"
        )
    async with within_deadline(context, info):
        card = await resolve_model(context.backend, body.model)
        check_model_allowed(info, card)
        size = _vector_size(card, body.dimensions)
        _name_span(card, body)
        prepared = await prepare_prompts(context, info, card, prompts, True, "input")
    _check_lengths(prepared, card, context.config.ingress.max_embedding_tokens)
    if context.config.logging.log_prompts:
        _logger.info("inputs: %s", prompts)
    job_id = new_id("embd")
    requests = build_requests(
        job_id,
        prepared,
        (_SAMPLING,) * len(prepared),
        1,
        SequenceOptions(),
        info,
        remaining_s(context, info),
    )
    job = EmbeddingJob(card, requests, size, body.encoding_format == "base64")
    return EmbeddingsResponse(context, info, job)


def _vector_size(card: ModelCard, dimensions: int | None) -> int:
    """Return how many values the client gets. Raises UnsupportedParameterError, ClientError."""
    size = card.embedding_size
    if size is None:
        raise UnsupportedParameterError(
            f"The model {card.id} generates text; it computes no embeddings.", param="model"
        )
    if dimensions is None or dimensions == size:
        return size
    if not card.can_shorten_embeddings:
        raise UnsupportedParameterError(
            f"dimensions: vectors of {card.id} cannot be shortened; they have {size} values",
            param="dimensions",
        )
    if dimensions > size:
        raise ClientError(f"dimensions should be at most {size}", param="dimensions")
    return dimensions


def _check_lengths(prompts: tuple[PreparedPrompt, ...], card: ModelCard, most: int) -> None:
    """Raise ContextLengthError for an input that is too long, ClientError for too many tokens."""
    total = 0
    for place, prompt in enumerate(prompts):
        num_tokens = len(prompt.token_ids)
        total += num_tokens
        if num_tokens > card.max_model_len:
            param = "input" if len(prompts) == 1 else f"input.{place}"
            raise ContextLengthError(
                f"The model's context holds {card.max_model_len} tokens; {param} has {num_tokens}.",
                param=param,
            )
    if total > most:
        raise ClientError(
            f"input should have at most {most} tokens in all; got {total}", param="input"
        )


def _name_span(card: ModelCard, body: EmbeddingRequest) -> None:
    """Tell the span what is asked, by the conventions for generative AI."""
    span = current_span()
    span.rename(f"embeddings {card.id}")
    span.set(
        {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.provider.name": PROVIDER_NAME,
            "gen_ai.request.model": card.id,
            "gen_ai.response.model": card.id,
            "gen_ai.request.encoding_formats": (body.encoding_format or "float",),
        }
    )
