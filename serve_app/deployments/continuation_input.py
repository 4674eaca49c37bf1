"""What a replica gives its engine of a request, one that goes on from another replica included.

A continued request keeps its prompt, sampling and stop strings and brings the ids that it already
has; the engine sees them as the prompt's end. Random numbers are keyed by (seed, position) and
positions count from the prompt's beginning, so a greedy or seeded sequence goes on as it would
have where it was.
"""

from __future__ import annotations

from dataclasses import replace

from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.requests import GenerateRequest
from serve_app.core.sampling import SamplingParams


def engine_input(request: GenerateRequest) -> tuple[tuple[int, ...], SamplingParams]:
    """Return the prompt's ids and the sampling for the engine."""
    prior = request.generated_token_ids
    sampling = request.sampling
    if not prior:
        return request.prompt_token_ids, sampling
    rest = replace(
        sampling,
        max_tokens=sampling.max_tokens - len(prior),
        min_tokens=max(0, sampling.min_tokens - len(prior)),
        prompt_logprobs=None,  # they came with the first chunk
        num_prior_tokens=len(prior),
    )
    return request.prompt_token_ids + prior, rest


def end_of(request: GenerateRequest, max_model_len: int) -> TokenEvent | None:
    """Return the last event of a continued request that has all its tokens; None if it goes on.

    Its replica was lost between the last token and the event that tells why it was the last.
    """
    prior, sampling = request.generated_token_ids, request.sampling
    if not prior:
        return None
    if prior[-1] in sampling.stop_token_ids and len(prior) > sampling.min_tokens:
        stop_token_id = prior[-1]
        return TokenEvent(
            request.request_id, finish_reason=FinishReason.STOP, stop_token_id=stop_token_id
        )
    num_tokens = len(request.prompt_token_ids) + len(prior)
    if len(prior) >= sampling.max_tokens or num_tokens >= max_model_len:
        return TokenEvent(request.request_id, finish_reason=FinishReason.LENGTH)
    return None
