"""Mixture of experts: which experts a row goes to, and their products.

Scores are float32 whatever the model's dtype. On a CPU the host sees the choice, and each active
expert multiplies its own rows; on a card nothing waits for the host, and one grouped kernel serves
all experts, so that a decode step can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from serve_app.models.kernels.grouped import GroupedWeight, align_pairs, grouped_linear
from serve_app.models.layers import row_invariant_silu_and_mul, silu_and_mul
from serve_app.models.linear import Linear
from serve_app.models.sparse_config import MixtureConfig

_INVARIANT_ROWS = 64
_LOOP_ELEMENTS = 64  # more than ATen's loops take at once on any processor
_TINY = 1e-20


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(silu(gate) · up), as the dense layers and the shared experts have it."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor, row_invariant: bool = False) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        x = self.gate_up(x, row_invariant)
        x = row_invariant_silu_and_mul(x) if row_invariant else silu_and_mul(x)
        return self.down(x, row_invariant)


class Router:
    """Chooses experts for each row: the gate's product, and `choose_experts`.

    `gate` multiplies in float32; `bias` is float32 [E], added for the choice alone.
    """

    __slots__ = ("_bias", "_config", "_gate")

    def __init__(self, gate: Linear, bias: torch.Tensor | None, config: MixtureConfig) -> None:
        self._gate = gate
        self._bias = bias
        self._config = config

    def __call__(
        self, x: torch.Tensor, row_invariant: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 [T, hidden] → weights float32 [T, k] and expert indices int64 [T, k]."""
        logits = self._gate(x, row_invariant)
        if not row_invariant or x.device.type != "cpu":
            return choose_experts(logits, self._bias, self._config)
        # As in row_invariant_silu_and_mul: a loop that ATen cuts may round an exp differently.
        parts = [
            choose_experts(rows, self._bias, self._config)
            for rows in torch.split(logits, _INVARIANT_ROWS)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def choose_experts(
    logits: torch.Tensor, bias: torch.Tensor | None, config: MixtureConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits [T, E] → weights float32 [T, k], indices int64 [T, k].

    Groups: DeepSeek-V2 (2405.04434) section 2.1.3, DeepSeek-V3 (2412.19437) section 2.1.2.
    """
    scores = _sigmoid(logits) if config.scoring == "sigmoid" else logits.softmax(-1)
    ranked = scores if bias is None else scores + bias
    if config.num_groups > 1:
        ranked = _within_best_groups(ranked, config)
    indices = ranked.topk(config.num_active, dim=-1, sorted=False).indices
    weights = scores.gather(1, indices)
    if config.is_normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    return weights * config.scale, indices


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """Each row with the same bits in any batch: all of it goes through the vectors of ATen's loop.

    What is left over at a tensor's end goes through scalar code, whose exp may round differently.
    """
    num_columns = logits.shape[1]
    if logits.device.type != "cpu" or num_columns % _LOOP_ELEMENTS == 0:
        return logits.sigmoid()
    return F.pad(logits, (0, -num_columns % _LOOP_ELEMENTS)).sigmoid()[:, :num_columns]


def _within_best_groups(ranked: torch.Tensor, config: MixtureConfig) -> torch.Tensor:
    """[T, E], -inf where an expert's group is not among the best."""
    groups = ranked.view(ranked.shape[0], config.num_groups, -1)
    best = groups.topk(2, dim=-1).values.sum(-1) if config.group_score == "top2" else groups.amax(2)
    chosen = best.topk(config.num_active_groups, dim=-1, sorted=False).indices
    is_out = torch.ones_like(best, dtype=torch.bool).scatter_(1, chosen, False)
    return groups.masked_fill(is_out[..., None], float("-inf")).flatten(1)


class Experts(Protocol):
    """The routed experts of one layer."""

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, row_invariant: bool
    ) -> torch.Tensor:
        """[T, hidden], [T, k], [T, k] → float32 [T, hidden]."""
        ...


class ListedExperts:
    """Experts one by one, each over the rows that chose it; the host reads who is active."""

    __slots__ = ("_experts",)

    def __init__(self, experts: Sequence[FeedForward]) -> None:
        self._experts = tuple(experts)

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, row_invariant: bool
    ) -> torch.Tensor:
        """[T, hidden], [T, k], [T, k] → float32 [T, hidden]."""
        num_rows, num_active = indices.shape
        chosen = indices.flatten()
        pairs = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self._experts)).tolist()
        out = x.new_empty(num_rows * num_active, x.shape[1])
        start = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                own = pairs[start : start + count]
                out[own] = expert(x[own // num_active], row_invariant)
                start += count
        return _weighted_sum(out.view(num_rows, num_active, -1), weights)


class GroupedExperts:
    """Experts stacked in one tensor per product, for the grouped kernel. Never waits for a host.

    gate_up: [E, 2I, hidden]; down: [E, hidden, I].
    """

    __slots__ = ("_down", "_gate_up")

    def __init__(self, gate_up: GroupedWeight, down: GroupedWeight) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, row_invariant: bool
    ) -> torch.Tensor:
        """[T, hidden], [T, k], [T, k] → float32 [T, hidden]."""
        num_rows, num_active = indices.shape
        pairs = align_pairs(indices, self._gate_up.num_experts, row_invariant)
        inner = silu_and_mul(grouped_linear(x, self._gate_up, pairs, num_active))
        out = grouped_linear(inner, self._down, pairs, 1)
        return _weighted_sum(out.view(num_rows, num_active, -1), weights)


def _weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, k, hidden], float32 [T, k] → float32 [T, hidden], added in the order of k.

    Sums and products by element: the same bits for a row in any batch.
    """
    total = outputs[:, 0].float() * weights[:, :1]
    for j in range(1, outputs.shape[1]):
        total += outputs[:, j].float() * weights[:, j : j + 1]
    return total


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """One layer: routed experts, and those that every row goes to, with Qwen2's gate or without.

    It takes rows in float32 for the router, whose choice turns on small differences, and yields
    float32, since the residual that takes it is; experts multiply in `dtype`.
    """

    dtype: torch.dtype
    router: Router
    experts: Experts
    shared: FeedForward | None = None
    shared_gate: Linear | None = None

    def __call__(self, x: torch.Tensor, row_invariant: bool = False) -> torch.Tensor:
        """Float32 [T, hidden] → float32 [T, hidden]."""
        weights, indices = self.router(x, row_invariant)
        wide, x = x, x.to(self.dtype)
        out = self.experts(x, weights, indices, row_invariant)
        if self.shared is not None:
            shared = self.shared(x, row_invariant)
            if self.shared_gate is None:
                out += shared
            else:
                gates = self.shared_gate(wide, row_invariant).sigmoid()
                out += shared * gates
        return out
