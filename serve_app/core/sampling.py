"""Sampling parameters of one sequence, as they travel from the API to the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a sequence's tokens must follow: a grammar, a limit on thinking, or both.

    grammar: in llguidance's Lark dialect; "" leaves the answer free. It holds from the answer's
        first token on; where the sequence thinks first, from behind the end of its thinking.
    is_thinking: the prompt ends inside an open <think>.
    may_think: the answer may begin with <think>.
    thinking_budget: most tokens of thinking (≥ 0) before its end is forced; None is no limit.
    """

    grammar: str = ""
    is_thinking: bool = False
    may_think: bool = False
    thinking_budget: int | None = None


@dataclass(frozen=True, slots=True)
class TokenVocabulary:
    """What an engine must know of a tokenizer to follow constraints: bytes by id, no text.

    tokens: each id's bytes. special_ids: control tokens, which no grammar's text can match.
    eos_ids: what ends an answer. think_open_id: `<think>`, where that is one token.
    think_close, think_close_ids: the closing tag's bytes, and the tokens that close thinking.
    """

    tokens: tuple[bytes, ...]
    special_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    think_open: bytes = b"<think>"
    think_open_id: int | None = None
    think_close: bytes = b"</think>"
    think_close_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled and when it stops. Validated by the API; token ids only.

    Length:
        max_tokens: most new tokens (≥ 1; 0 only with `prompt_logprobs` or `embeds`).
        min_tokens: no stop token is sampled before this many new tokens.
        num_prior_tokens: so many of the prompt's last ids are output already, of a sequence that
            goes on here: frequency and presence penalties count them.
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
    Form:
        constraint: a grammar or a limit on thinking that the tokens follow.
    Cache:
        cache_salt: prefix-cache hits only among equal salts.
    Task:
        embeds: the prompt's vector is wanted, and no tokens (max_tokens is 0).
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
    num_prior_tokens: int = 0
    constraint: Constraint | None = None
    embeds: bool = False

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
