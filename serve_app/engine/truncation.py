"""Top-k, top-p and min-p as one threshold per row: a token stays when its logit reaches it.

No full-vocabulary sort. The best `NUM_CANDIDATES` logits answer nearly every request; a row whose
nucleus or top_k is larger gets its exact threshold by bisection over the ordered bit patterns of
float32 (32 masked sums), which gives the same set that sorting would.
"""

from __future__ import annotations

import torch

NUM_CANDIDATES = 256
_NEG_INF = float("-inf")


def _ordered_keys(x: torch.Tensor) -> torch.Tensor:
    """int32 keys in the order of the float32 values (its own inverse on the bit level)."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered_keys(keys: torch.Tensor) -> torch.Tensor:
    keys = keys.to(torch.int32)
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _bisect(keys: torch.Tensor, measure: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Smallest key t (int64 [S]) with sum(measure where key > t) < target."""
    low = keys.amin(-1).to(torch.int64) - 1
    high = keys.amax(-1).to(torch.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        above = torch.where(keys > middle.to(torch.int32).unsqueeze(-1), measure, 0.0).sum(-1)
        is_enough = above < target
        high = torch.where(is_enough, middle, high)
        low = torch.where(is_enough, low, middle)
    return high


def exact_thresholds(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, *, has_top_k: bool = True
) -> torch.Tensor:
    """Thresholds of top-k, then top-p over what is left; float32 [S].

    logits: float32 [S, V], already divided by the temperature. top_k: int64 [S], 0 is off.
    top_p: float32 [S]. Ties with the last token that stays also stay. `has_top_k` False skips the
    search for rows that all have top-k off, and changes nothing else.
    """
    keys = _ordered_keys(logits.contiguous())
    probs = torch.softmax(logits, -1)
    if not has_top_k:
        target = torch.where(top_p >= 1.0, torch.inf, top_p * probs.sum(-1))
        return _from_ordered_keys(_bisect(keys, probs, target))
    vocab_size = logits.shape[-1]
    limit = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).to(torch.float32)
    # A count below k means that the k-th best is not yet among those above t.
    key_k = _bisect(keys, torch.ones_like(logits), limit)
    probs = torch.where(keys >= key_k.to(torch.int32).unsqueeze(-1), probs, 0.0)
    target = torch.where(top_p >= 1.0, torch.inf, top_p * probs.sum(-1))
    key_p = _bisect(keys, probs, target)
    return _from_ordered_keys(torch.maximum(key_k, key_p))


def candidate_thresholds(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds from the best candidates (float32 [S]), and where they are exact (bool [S])."""
    num_candidates = min(NUM_CANDIDATES, logits.shape[-1])
    best = torch.topk(logits, num_candidates, dim=-1).values
    is_k_off = top_k <= 0
    limit = torch.where(is_k_off, num_candidates, top_k).clamp(max=num_candidates)
    place = torch.arange(num_candidates, device=logits.device)
    in_top_k = place < limit.unsqueeze(-1)
    total = torch.where(
        is_k_off,
        torch.logsumexp(logits, -1),
        torch.logsumexp(torch.where(in_top_k, best, _NEG_INF), -1),
    )
    probs = torch.where(in_top_k, torch.exp(best - total.unsqueeze(-1)), 0.0)
    mass = probs.cumsum(-1)
    keep = in_top_k & ((mass - probs < top_p.unsqueeze(-1)) | (top_p >= 1.0).unsqueeze(-1))
    last = keep.sum(-1, keepdim=True) - 1
    threshold = best.gather(-1, last.clamp(min=0)).squeeze(-1)
    everything = is_k_off & (top_p >= 1.0)
    threshold = torch.where(everything, _NEG_INF, threshold)
    has_all = logits.shape[-1] <= num_candidates
    is_exact = everything | torch.where(
        is_k_off, (mass[:, -1] >= top_p) & (top_p < 1.0), top_k <= num_candidates
    )
    return threshold, is_exact | has_all


def thresholds(
    logits: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    *,
    may_exceed: bool,
    has_large_top_k: bool,
) -> torch.Tensor:
    """Exact thresholds of top-k and top-p; float32 [S], -inf where both are off.

    `may_exceed`: a row's top_k or nucleus may be larger than the candidates; `has_large_top_k`: a
    row's top_k is. On the CPU only the rows where it is so are bisected. On an accelerator asking
    which rows those are would stall the queue: there every row whose parameters allow it takes the
    bisection. Either way a row's answer depends on that row alone.
    """
    threshold, is_exact = candidate_thresholds(logits, top_k, top_p)
    if not may_exceed:
        return threshold
    if logits.device.type == "cpu":
        rows = (~is_exact).nonzero().squeeze(-1)
        if rows.numel():
            threshold[rows] = exact_thresholds(
                logits[rows], top_k[rows], top_p[rows], has_top_k=has_large_top_k
            )
        return threshold
    can_exceed = (top_k > NUM_CANDIDATES) | ((top_k <= 0) & (top_p < 1.0))
    exact = exact_thresholds(logits, top_k, top_p, has_top_k=has_large_top_k)
    return torch.where(can_exceed, exact, threshold)
