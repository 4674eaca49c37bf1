"""From a request's parameters to `SamplingParams`: defaults, limits, and what the engine can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.api.protocol.sampling import SamplingFields
from serve_app.core.errors import ClientError, ContextLengthError, UnsupportedParameterError
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import ModelCard
from serve_app.core.sampling import SamplingParams

_INT64_SPAN = 2**64
_INT64_HALF = 2**63
_MIN_TOP_P = 1e-6
"""top_p 0 means the best token alone; the sampler wants a share above 0."""

_NEUTRAL: Mapping[str, tuple[str, Any]] = {
    "frequency_penalty": ("penalties", 0.0),
    "presence_penalty": ("penalties", 0.0),
    "repetition_penalty": ("penalties", 1.0),
    "min_p": ("min_p", 0.0),
    "min_tokens": ("min_tokens", 0),
    "seed": ("seed", None),
    "cache_salt": ("cache_salt", None),
}
"""Parameter → the capability it needs unless it has its neutral value."""


@dataclass(frozen=True, slots=True)
class LogprobsWish:
    """What the request asks to be reported; None is off, N means the N best."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """How long an answer may be: `requested` by the client, else the first default that is set."""

    requested: int | None
    param: str = "max_tokens"
    endpoint_default: int | None = None
    prompt_param: str = "prompt"


def check_capabilities(
    fields: SamplingFields, wish: LogprobsWish, capabilities: EngineCapabilities
) -> None:
    """Raise UnsupportedParameterError where the request needs what the engine lacks."""
    for name, (capability, neutral) in _NEUTRAL.items():
        value = getattr(fields, name)
        if value is not None and value != neutral and not getattr(capabilities, capability):
            raise _unsupported(name)
    if fields.logit_bias and not capabilities.logit_bias:
        raise _unsupported("logit_bias")
    if wish.logprobs is not None and not capabilities.logprobs:
        raise _unsupported("logprobs")
    if wish.logprobs and not capabilities.top_logprobs:
        raise _unsupported("top_logprobs")
    if wish.prompt_logprobs is not None and not capabilities.prompt_logprobs:
        raise _unsupported("logprobs")


def build_sampling(
    fields: SamplingFields,
    card: ModelCard,
    capabilities: EngineCapabilities,
    max_tokens: int,
    wish: LogprobsWish,
) -> SamplingParams:
    """Return the parameters of the first sequence; the others' seeds are `seed_of_choice`.

    Unset parameters take the model's own defaults where the engine can, then OpenAI's; what was
    asked for has passed `check_capabilities`. Raises ClientError on values that do not fit the
    model.
    """
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        raise ClientError(f"min_tokens is more than the {max_tokens} allowed", param="min_tokens")
    pick = _Defaults(fields, card.default_sampling, capabilities)
    ignore_eos = bool(fields.ignore_eos)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=_stop_ids(fields, card, ignore_eos),
        ignore_eos=ignore_eos,
        temperature=float(pick("temperature", 1.0)),
        top_k=max(0, int(pick("top_k", 0))),
        top_p=max(_MIN_TOP_P, float(pick("top_p", 1.0))),
        min_p=float(pick("min_p", 0.0)),
        repetition_penalty=float(pick("repetition_penalty", 1.0)),
        frequency_penalty=float(pick("frequency_penalty", 0.0)),
        presence_penalty=float(pick("presence_penalty", 0.0)),
        logit_bias=_logit_bias(fields, card),
        seed=fields.seed,
        logprobs=wish.logprobs,
        prompt_logprobs=wish.prompt_logprobs,
        cache_salt=fields.cache_salt,
        priority=fields.priority or 0,
    )


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """Return the seed of the `choice`-th of n sequences: seed + choice, wrapped to 64 bits."""
    if seed is None or choice == 0:
        return seed
    return (seed + choice + _INT64_HALF) % _INT64_SPAN - _INT64_HALF


def resolve_max_tokens(
    limit: TokenLimit, card: ModelCard, num_prompt_tokens: int, config_default: int | None
) -> int:
    """Return the answer's longest length in tokens.

    Raises ContextLengthError where the prompt, or the prompt and what is asked for, does not fit.
    """
    room = card.max_model_len - num_prompt_tokens
    if room < 1 and limit.requested != 0:
        raise ContextLengthError(
            f"The model's context holds {card.max_model_len} tokens; the prompt has"
            f" {num_prompt_tokens} and leaves no room for an answer.",
            param=limit.prompt_param,
        )
    if limit.requested is not None:
        if limit.requested > room:
            raise ContextLengthError(
                f"The model's context holds {card.max_model_len} tokens; the prompt has"
                f" {num_prompt_tokens} and {limit.param} asks for {limit.requested} more.",
                param=limit.param,
            )
        return limit.requested
    model_default = card.default_sampling.get("max_tokens")
    for default in (model_default, config_default, limit.endpoint_default):
        if default is not None:
            return max(1, min(int(default), room))
    return room


class _Defaults:
    """Picks a value: the request's, the model's default where the engine can, else OpenAI's."""

    def __init__(
        self, fields: SamplingFields, defaults: Mapping[str, Any], capabilities: EngineCapabilities
    ) -> None:
        self._fields = fields
        self._defaults = defaults
        self._capabilities = capabilities

    def __call__(self, name: str, fallback: float) -> Any:
        value = getattr(self._fields, name)
        if value is not None:
            return value
        value = self._defaults.get(name)
        needed = _NEUTRAL.get(name)
        if value is None or (needed and not getattr(self._capabilities, needed[0])):
            return fallback
        return value


def _stop_ids(fields: SamplingFields, card: ModelCard, ignore_eos: bool) -> tuple[int, ...]:
    asked = fields.stop_token_ids or ()
    if any(not 0 <= token_id < card.vocab_size for token_id in asked):
        raise ClientError(
            f"stop_token_ids should be between 0 and {card.vocab_size - 1}", param="stop_token_ids"
        )
    eos = () if ignore_eos else card.eos_token_ids
    return tuple(dict.fromkeys((*asked, *eos)))


def _logit_bias(fields: SamplingFields, card: ModelCard) -> tuple[tuple[int, float], ...]:
    pairs = tuple((int(key), float(bias)) for key, bias in (fields.logit_bias or {}).items())
    if any(token_id >= card.vocab_size for token_id, _ in pairs):
        raise ClientError(
            f"logit_bias: token ids should be below {card.vocab_size}", param="logit_bias"
        )
    return pairs


def _unsupported(param: str) -> UnsupportedParameterError:
    return UnsupportedParameterError(
        f"{param} is not supported by this model's engine", param=param
    )
