"""One request inside the engine: its tokens, its blocks, and how far it has been computed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence as SequenceOf
from enum import StrEnum
from itertools import zip_longest

from serve_app.core.events import FinishReason, TokenLogprob
from serve_app.core.sampling import SamplingParams
from serve_app.engine.constraint import SequenceConstraint
from serve_app.engine.prompt_lookup import PromptLookup

PLACEHOLDER_TOKEN_ID = -1
"""Stands for a token that a step in flight is still sampling; its id is on the device only."""


class SequenceStatus(StrEnum):
    """Where a sequence is: waiting (new or preempted), running (holds blocks), or finished."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and what was generated for it.

    `token_ids` holds prompt and output; its tail may be a placeholder while a step is in flight.
    `num_computed_tokens` counts tokens whose K/V are in the cache, or will be once the queued steps
    have run. `slot` is the sequence's row in the sampler's tables while it runs. `rank` orders
    sequences: lower runs first, the highest is preempted first. `constraint` tells which tokens may
    come next; None for most. `lookup` makes its drafts; None without speculative decoding. While a
    step in flight verifies a draft, `num_drafted` is the draft's length.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "constraint",
        "finish_reason",
        "has_reported",
        "lookup",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_drafted",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_unresolved",
        "prompt_logprobs",
        "queue_time_s",
        "rank",
        "request_id",
        "sampling",
        "seed",
        "slot",
        "status",
        "stop_token_ids",
        "submitted_s",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        sampling: SamplingParams,
        arrival: int,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.sampling = sampling
        self.stop_token_ids = frozenset(sampling.stop_token_ids)
        self.rank = (sampling.priority, arrival)
        self.submitted_s = time.monotonic()
        self.queue_time_s: float | None = None
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.status = SequenceStatus.WAITING
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_registered_blocks = 0
        self.num_unresolved = 0
        self.num_drafted = 0
        self.num_preemptions = 0
        self.slot = -1
        self.constraint: SequenceConstraint | None = None
        self.lookup: PromptLookup | None = None
        self.finish_reason: FinishReason | None = None
        self.has_reported = False
        wants_prompt = sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprob | None] = [None] * (
            self.num_prompt_tokens if wants_prompt else 0
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, placeholders included."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, placeholders included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose ids the host knows."""
        return len(self.token_ids) - self.num_unresolved

    @property
    def output_token_ids(self) -> list[int]:
        """Known ids of the output, with those that another engine generated of it."""
        first = self.num_prompt_tokens - self.sampling.num_prior_tokens
        return self.token_ids[first : self.num_known_tokens]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that a step still has to compute."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the whole prompt has been computed, or is in a queued step."""
        return self.num_computed_tokens >= self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.status is SequenceStatus.FINISHED

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities were asked for and have not been told yet."""
        return self.sampling.prompt_logprobs is not None and not self.has_reported

    @property
    def is_saturated(self) -> bool:
        """Whether all the tokens that may be generated are there or in flight."""
        return self.num_output_tokens >= self.sampling.max_tokens and (
            self.num_output_tokens > 0 or self.num_uncomputed_tokens == 0
        )

    def note_start(self) -> None:
        """Note that it runs for the first time: it has waited until now."""
        self.queue_time_s = time.monotonic() - self.submitted_s

    def append_placeholder(self) -> None:
        """Reserve the place of the token that the step just queued will sample."""
        self.token_ids.append(PLACEHOLDER_TOKEN_ID)
        self.num_unresolved += 1

    def resolve(self, token_id: int) -> None:
        """Fill the oldest placeholder."""
        assert self.num_unresolved > 0, "no step is sampling for this sequence"
        self.token_ids[self.num_known_tokens] = token_id
        self.num_unresolved -= 1

    def take(
        self, token_ids: SequenceOf[int], draft: SequenceOf[int]
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        """Take what a decode and the rows of its draft yielded, as far as the draft holds.

        `token_ids`, 1 + len(draft), the first ≥ 0. The first fills the oldest placeholder; each
        further one follows a token of the draft which was the right one, so its K/V are computed.
        Returns the tokens taken, and why the sequence ends with the last of them, or None.
        """
        taken = 0
        reason = None
        for token_id, drafted in zip_longest(token_ids, draft):
            if token_id < 0:
                break  # told again without a draft, as a failure
            if taken == 0:
                self.resolve(token_id)
            else:
                self._append_computed(token_id)
            taken += 1
            reason = self.finish_reason_after(token_id)
            if reason is not None or token_id != drafted:
                break
        self.num_drafted = 0
        if self.lookup is not None:
            self.lookup.learn(draft, token_ids[:taken])
        return tuple(token_ids[:taken]), reason

    def _append_computed(self, token_id: int) -> None:
        assert self.num_unresolved == 0, "nothing is queued behind a draft"
        self.token_ids.append(token_id)
        # Preempted meanwhile, it has nothing computed.
        if self.status is SequenceStatus.RUNNING:
            self.num_computed_tokens += 1

    def drop_placeholders(self) -> None:
        """Take back the places of tokens whose step never ran."""
        del self.token_ids[self.num_known_tokens :]
        self.num_unresolved = self.num_drafted = 0

    def finish_reason_after(self, token_id: int) -> FinishReason | None:
        """Why the sequence ends with `token_id`, its newest known token, or None."""
        num_output = self.num_known_tokens - self.num_prompt_tokens
        if token_id in self.stop_token_ids and num_output > self.sampling.min_tokens:
            return FinishReason.STOP
        if num_output >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def reset_for_recompute(self) -> None:
        """Forget what was computed; the tokens stay."""
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.num_preemptions += 1
        self.slot = -1
