"""Sampling parameters of one sequence, as they travel from the API to the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled and when it stops. Validated by the API; token ids only.

    Length:
        max_tokens: most new tokens (≥ 1; 0 only together with `prompt_logprobs`).
        min_tokens: no stop token is sampled before this many new tokens.
        stop_token_ids: ids that end the sequence (the model's EOS ids included unless
            `ignore_eos` was asked for). The stopping id is reported in `new_token_ids`.
        ignore_eos: informational; the ids above are already free of EOS.
    Distribution:
        temperature: 0 is greedy.
        top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
        repetition_penalty: multiplicative over prompt and output (1 is off; Keskar et al. 2019).
        frequency_penalty, presence_penalty: OpenAI's, over output tokens only (0 is off).
        logit_bias: ((token_id, bias), …).
        seed: None draws a seed; random numbers are keyed by (seed, position).
    Reports:
        logprobs: None is off; N returns the sampled token's log-probability and the N best (0–20).
        prompt_logprobs: likewise for each prompt token but the first.
    Cache:
        cache_salt: prefix-cache hits only among equal salts.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str | None = None
    priority: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether past tokens change the distribution."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )
