"""Chooses the next token of each row on the device: no host synchronisation, no full sort.

Order: penalties, logit bias, min_tokens, the allowed mask, temperature, top-k, top-p, min-p. Greedy
rows take the largest logit. Others draw by inverse CDF in two levels (a block of the vocabulary,
then a token in it) with uniforms keyed by (seed, position), so that batch mates, preemption and the
order of the batch never change a row's token.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from serve_app.engine.random_numbers import to_signed, uniforms
from serve_app.engine.sequence import Sequence
from serve_app.engine.truncation import NUM_CANDIDATES, thresholds
from serve_app.models.kernels._triton import has_kernel
from serve_app.models.kernels.sampling import SamplingTables, draw_tokens

MAX_LOGPROBS = 20
FAILED_TOKEN_ID = -1
"""What a row with non-finite logits yields instead of a token."""

_CDF_BLOCK = 256
_MIN_TEMPERATURE = 1e-5
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
_INTS = ("top_k", "seed", "min_length")


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What the rows of a step need, known on the host: which parts of the sampler run.

    Parts that no row needs are skipped; a row that does not need a part is not changed by it.
    """

    is_random: bool = False
    truncates: bool = False
    may_exceed_candidates: bool = False
    has_large_top_k: bool = False
    has_top_k: bool = False
    has_top_p: bool = False
    has_penalties: bool = False
    has_bias: bool = False
    has_min_tokens: bool = False
    num_logprobs: int | None = None

    @classmethod
    def of(cls, sequences: list[Sequence]) -> SamplingPlan:
        """The plan that serves all of `sequences`."""
        params = [sequence.sampling for sequence in sequences]
        random = [p for p in params if not p.is_greedy]
        logprobs = [p.logprobs for p in params if p.logprobs is not None]
        return cls(
            is_random=bool(random),
            truncates=any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in random),
            has_large_top_k=any(p.top_k > NUM_CANDIDATES for p in random),
            has_top_k=any(p.top_k > 0 for p in random),
            has_top_p=any(p.top_p < 1.0 for p in random),
            may_exceed_candidates=any(
                p.top_k > NUM_CANDIDATES or (p.top_k == 0 and p.top_p < 1.0) for p in random
            ),
            has_penalties=any(p.has_penalties for p in params),
            has_bias=any(p.logit_bias for p in params),
            has_min_tokens=any(p.min_tokens > 0 and p.stop_token_ids for p in params),
            num_logprobs=max(logprobs) if logprobs else None,
        )


@dataclass(frozen=True, slots=True)
class DraftHistory:
    """What drafts add to the past of their rows, where penalties count it.

    rows, token_ids: int64 [n]; row rows[i] comes after a draft that has token_ids[i] in it.
    count_slots: int64 [S], the slots where the rows' own tokens are counted at once: of a sequence
    with a draft the scratch slot, as only `Sampler.count` knows which of them hold.
    """

    rows: torch.Tensor
    token_ids: torch.Tensor
    count_slots: torch.Tensor


@dataclass(slots=True)
class SamplerOutput:
    """Sampled ids, int64 [S]: FAILED_TOKEN_ID where the logits were not finite.

    logprobs: float32 [S] of those ids; top_ids int64 and top_logprobs float32 [S, N], best first.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def compute_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-softmax of raw logits [S, V] at `token_ids` [S], then ids and values of the best N."""
    total = torch.logsumexp(logits, -1, keepdim=True)
    chosen = logits.gather(-1, token_ids.clamp(min=0).unsqueeze(-1)) - total
    top = torch.topk(logits, min(num_top, logits.shape[-1]), dim=-1)
    return chosen.squeeze(-1), top.indices, top.values - total


def unpack_mask(packed: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Bool [S, vocab_size] of packed bits, uint8 [S, ≥ vocab_size / 8], least significant first."""
    bits = torch.bitwise_left_shift(
        torch.ones(8, dtype=torch.uint8, device=packed.device),
        torch.arange(8, dtype=torch.uint8, device=packed.device),
    )
    return (packed.unsqueeze(-1) & bits).flatten(1)[:, :vocab_size] != 0


class Sampler:
    """Sampling tables indexed by slot, and the sampling itself.

    `num_slots` rows for sequences and one scratch row (`scratch_slot`) for padding and for rows
    whose result nobody wants. `last_token_ids`, int64 [num_slots + 1], holds each slot's newest id
    on the device: the input of its next decode row (but after a draft, whose host knows it).
    """

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.scratch_slot = num_slots
        self.device = device
        self._num_rows = num_slots + 1
        self.last_token_ids = torch.zeros(self._num_rows, dtype=torch.int64, device=device)
        self._floats = torch.zeros(self._num_rows, len(_FLOATS), device=device)
        self._ints = torch.zeros(self._num_rows, len(_INTS), dtype=torch.int64, device=device)
        self._stop_ids = torch.zeros(self._num_rows, 1, dtype=torch.int64, device=device)
        self._bias: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self._in_prompt: torch.Tensor | None = None
        self._floats[:, _FLOATS.index("repetition")] = 1.0
        self._floats[:, _FLOATS.index("top_p")] = 1.0

    def load(self, sequence: Sequence) -> None:
        """Write a sequence's parameters, and its past tokens where they count, to its slot."""
        params, slot = sequence.sampling, sequence.slot
        floats = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        has_min_tokens = params.min_tokens > 0 and bool(params.stop_token_ids)
        # Without stop ids of its own the slot still has those of its last holder.
        min_length = sequence.num_prompt_tokens + params.min_tokens if has_min_tokens else 0
        ints = (params.top_k, to_signed(sequence.seed), min_length)
        self._floats[slot].copy_(torch.tensor(floats), non_blocking=True)
        self._ints[slot].copy_(torch.tensor(ints, dtype=torch.int64), non_blocking=True)
        if has_min_tokens:
            self._load_stop_ids(slot, params.stop_token_ids)
        self._load_bias(slot, params.logit_bias)
        if params.has_penalties:
            self._load_past_tokens(sequence)

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        plan: SamplingPlan,
        allowed_mask: torch.Tensor | None = None,
        history: DraftHistory | None = None,
    ) -> SamplerOutput:
        """Choose a token for each row and remember it under its slot.

        Args:
            logits: float32 [S, V], raw; never changed.
            slots: int64 [S]; `scratch_slot` where the row's result is not wanted.
            positions: int64 [S], index in its sequence of the token that is being chosen.
            plan: which parts run; must cover every row.
            allowed_mask: bool [S, V], False where a grammar forbids a token.
            history: tokens of drafts that the penalties of some rows count; None: of none.
        """
        is_fused = (plan.is_random or plan.has_penalties) and has_kernel("sampling", logits)
        choose = self._choose_fused if is_fused else self._choose
        token_ids, best = choose(logits, slots, positions, plan, allowed_mask, history)
        self.last_token_ids.index_copy_(0, slots, token_ids)
        token_ids = torch.where(torch.isfinite(best), token_ids, FAILED_TOKEN_ID)
        if plan.num_logprobs is None:
            return SamplerOutput(token_ids)
        return SamplerOutput(token_ids, *compute_logprobs(logits, token_ids, plan.num_logprobs))

    def count(self, slot: int, token_ids: SequenceOf[int]) -> None:
        """Count tokens that a draft's rows yielded and that held, for the slot's penalties."""
        if self._counts is not None:
            ids = torch.tensor(token_ids, dtype=torch.int64)
            counts = torch.bincount(ids, minlength=self.vocab_size).to(torch.int32)
            self._counts[slot].add_(counts.to(self.device, non_blocking=True))

    def _choose(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        plan: SamplingPlan,
        allowed_mask: torch.Tensor | None,
        history: DraftHistory | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [S], and each row's largest logit, which is not finite where the row has failed."""
        adjusted = self._adjust(logits, slots, positions, plan, allowed_mask, history)
        best = adjusted.max(dim=-1)
        token_ids = best.indices
        if plan.is_random:
            drawn = self._draw(adjusted, slots, positions, plan)
            token_ids = torch.where(self._float("temperature", slots) > 0.0, drawn, token_ids)
        self._count(slots, token_ids, plan, history)
        return token_ids, best.values

    def _count(
        self,
        slots: torch.Tensor,
        token_ids: torch.Tensor,
        plan: SamplingPlan,
        history: DraftHistory | None,
    ) -> None:
        if plan.has_penalties and self._counts is not None:
            slots = slots if history is None else history.count_slots
            # Slots are unique but for the scratch slot and those without penalties, whose counts
            # mean nothing.
            self._counts[slots, token_ids] = self._counts[slots, token_ids] + 1

    def _choose_fused(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        plan: SamplingPlan,
        allowed_mask: torch.Tensor | None,
        history: DraftHistory | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_choose`, by the card's kernels."""
        counts, in_prompt = self._counts, self._in_prompt
        is_adjusted = plan.has_bias or plan.has_min_tokens or allowed_mask is not None
        if is_adjusted or history is not None:
            # These come after the penalties, and before what the kernels do.
            logits = self._adjust(logits, slots, positions, plan, allowed_mask, history)
            counts = in_prompt = None
        elif not plan.has_penalties:
            counts = in_prompt = None
        token_ids, best = draw_tokens(
            logits,
            slots,
            positions,
            SamplingTables(self._floats, self._ints, counts, in_prompt),
            has_top_k=plan.has_top_k,
            has_top_p=plan.has_top_p,
        )
        if counts is None:
            self._count(slots, token_ids, plan, history)
        return token_ids, best

    def _float(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        return self._floats[slots, _FLOATS.index(name)]

    def _int(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        return self._ints[slots, _INTS.index(name)]

    def _adjust(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        plan: SamplingPlan,
        allowed_mask: torch.Tensor | None,
        history: DraftHistory | None = None,
    ) -> torch.Tensor:
        if plan.has_penalties and self._counts is not None:
            logits = self._penalize(logits, slots, history)
        if plan.has_bias and self._bias is not None:
            logits = logits + self._bias[slots]
        if plan.has_min_tokens:
            stop_ids = self._stop_ids[slots]
            is_early = (positions < self._int("min_length", slots)).unsqueeze(-1)
            kept = torch.where(is_early, float("-inf"), logits.gather(-1, stop_ids))
            logits = logits.scatter(-1, stop_ids, kept)
        if allowed_mask is not None:
            logits = logits.masked_fill(~allowed_mask, float("-inf"))
        return logits

    def _penalize(
        self, logits: torch.Tensor, slots: torch.Tensor, history: DraftHistory | None
    ) -> torch.Tensor:
        """Repetition (Keskar et al. 2019) over prompt and output; OpenAI's over the output."""
        assert self._counts is not None
        assert self._in_prompt is not None
        counts = self._counts[slots]
        if history is not None:
            ones = torch.ones_like(history.rows, dtype=counts.dtype)
            counts.index_put_((history.rows, history.token_ids), ones, accumulate=True)
        repetition = self._float("repetition", slots).unsqueeze(-1)
        is_past = self._in_prompt[slots] | (counts > 0)
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(is_past, scaled, logits)
        logits = logits - self._float("frequency", slots).unsqueeze(-1) * counts
        return logits - self._float("presence", slots).unsqueeze(-1) * (counts > 0)

    def _draw(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, plan: SamplingPlan
    ) -> torch.Tensor:
        temperature = self._float("temperature", slots).clamp(min=_MIN_TEMPERATURE)
        logits = logits / temperature.unsqueeze(-1)
        # The largest becomes 0: small temperatures cannot overflow, and min-p is a plain threshold.
        logits = logits - logits.amax(-1, keepdim=True)
        weights = torch.exp(logits)
        if plan.truncates:
            threshold = thresholds(
                logits,
                self._int("top_k", slots),
                self._float("top_p", slots),
                may_exceed=plan.may_exceed_candidates,
                has_large_top_k=plan.has_large_top_k,
            )
            threshold = torch.maximum(threshold, torch.log(self._float("min_p", slots)))
            weights = torch.where(logits >= threshold.unsqueeze(-1), weights, 0.0)
        return _inverse_cdf(weights, *uniforms(self._int("seed", slots), positions))

    def _load_stop_ids(self, slot: int, stop_token_ids: tuple[int, ...]) -> None:
        width = self._stop_ids.shape[1]
        if len(stop_token_ids) > width:
            grown = 1 << (len(stop_token_ids) - 1).bit_length()
            padding = self._stop_ids[:, :1].expand(-1, grown - width)
            self._stop_ids = torch.cat([self._stop_ids, padding], dim=1)
            width = grown
        padded = stop_token_ids + stop_token_ids[:1] * (width - len(stop_token_ids))
        self._stop_ids[slot].copy_(torch.tensor(padded, dtype=torch.int64), non_blocking=True)

    def _load_bias(self, slot: int, logit_bias: tuple[tuple[int, float], ...]) -> None:
        if self._bias is None:
            if not logit_bias:
                return
            self._bias = torch.zeros(self._num_rows, self.vocab_size, device=self.device)
        self._bias[slot].zero_()
        if logit_bias:
            ids = torch.tensor([i for i, _ in logit_bias], device=self.device)
            self._bias[slot, ids] = torch.tensor([b for _, b in logit_bias], device=self.device)

    def _load_past_tokens(self, sequence: Sequence) -> None:
        shape = (self._num_rows, self.vocab_size)
        if self._counts is None or self._in_prompt is None:
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        known = torch.tensor(sequence.token_ids[: sequence.num_known_tokens], dtype=torch.int64)
        first_output = sequence.num_prompt_tokens - sequence.sampling.num_prior_tokens
        prompt, output = known.tensor_split([first_output])
        # Counted on the host: bincount on a device waits for the queue.
        counts = torch.bincount(output, minlength=self.vocab_size).to(torch.int32)
        in_prompt = torch.bincount(prompt, minlength=self.vocab_size) > 0
        self._counts[sequence.slot].copy_(counts)
        self._in_prompt[sequence.slot].copy_(in_prompt)


def _inverse_cdf(weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Draw an index per row of `weights` [S, V] ≥ 0 by uniforms [S]: a block, then an entry."""
    num_rows, size = weights.shape
    padding = -size % _CDF_BLOCK
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(num_rows, -1, _CDF_BLOCK)
    block = _pick(blocks.sum(-1), first)
    entries = blocks[torch.arange(num_rows, device=weights.device), block]
    return block * _CDF_BLOCK + _pick(entries, second)


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index, int64 [S], where the running sum passes uniform × total; its weight is > 0."""
    mass = weights.cumsum(-1)
    target = (uniform * mass[:, -1]).unsqueeze(-1)
    index = (mass <= target).sum(-1)
    # Rounding can push the target to the total: then the last entry with weight is meant.
    places = torch.arange(weights.shape[-1], device=weights.device)
    last = torch.where(weights > 0, places, 0).amax(-1)
    return torch.minimum(index, last)
