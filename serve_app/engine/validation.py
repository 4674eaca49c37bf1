"""Checks of a request against an engine's facts; shared by the engine and its client. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.core.errors import ClientError, ContextLengthError, UnsupportedParameterError
from serve_app.core.events import EngineInfo
from serve_app.core.sampling import Constraint, SamplingParams


def check_request(
    info: EngineInfo, prompt_token_ids: Sequence[int], sampling: SamplingParams
) -> None:
    """Refuse what the engine would answer wrongly or die of.

    Raises ClientError on an empty prompt or an id outside the vocabulary, ContextLengthError on a
    prompt that leaves no room for an answer, UnsupportedParameterError on what the engine lacks.
    """
    _check_prompt(info, prompt_token_ids, sampling)
    _check_ids(info, sampling)
    _check_capabilities(info, sampling)


def _check_prompt(info: EngineInfo, ids: Sequence[int], sampling: SamplingParams) -> None:
    if not ids:
        raise ClientError("prompt: must have at least one token", param="prompt")
    smallest, largest = min(ids), max(ids)
    if smallest < 0 or largest >= info.vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise ClientError(
            f"prompt: token id {wrong} is outside the vocabulary (0 to {info.vocab_size - 1})",
            param="prompt",
        )
    num_new = 0 if sampling.max_tokens == 0 else 1
    if len(ids) + num_new > info.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {info.max_model_len} tokens, but the prompt"
            f" has {len(ids)}; shorten the prompt",
            param="prompt",
        )
    if sampling.max_tokens == 0 and sampling.prompt_logprobs is None and not sampling.embeds:
        raise ClientError("max_tokens: must be at least 1", param="max_tokens")


def _check_ids(info: EngineInfo, sampling: SamplingParams) -> None:
    for name, ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", tuple(token_id for token_id, _ in sampling.logit_bias)),
    ):
        for token_id in ids:
            if not 0 <= token_id < info.vocab_size:
                raise ClientError(
                    f"{name}: token id {token_id} is outside the vocabulary"
                    f" (0 to {info.vocab_size - 1})",
                    param=name,
                )


def _check_capabilities(info: EngineInfo, sampling: SamplingParams) -> None:
    able = info.capabilities
    is_random = not sampling.is_greedy
    constraint = sampling.constraint or Constraint()
    asked = {
        "logprobs": (sampling.logprobs is not None, able.logprobs),
        "top_logprobs": (bool(sampling.logprobs), able.top_logprobs),
        "prompt_logprobs": (sampling.prompt_logprobs is not None, able.prompt_logprobs),
        "logit_bias": (bool(sampling.logit_bias), able.logit_bias),
        "repetition_penalty": (sampling.has_penalties, able.penalties),
        "min_p": (is_random and sampling.min_p > 0.0, able.min_p),
        "seed": (is_random and sampling.seed is not None, able.seed),
        "min_tokens": (sampling.min_tokens > 0, able.min_tokens),
        "cache_salt": (sampling.cache_salt is not None, able.cache_salt),
        "response_format": (bool(constraint.grammar), able.structured_output),
        "thinking_budget": (constraint.thinking_budget is not None, able.thinking_budget),
        "embeddings": (sampling.embeds, able.embeddings),
        "generation": (not sampling.embeds, able.generation),
    }
    for name, (is_asked, is_able) in asked.items():
        if is_asked and not is_able:
            raise UnsupportedParameterError(
                f"{name}: the {info.engine} engine does not support it", param=name
            )
