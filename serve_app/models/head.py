"""The output layer: hidden states to float32 logits, exact where it decides."""

from __future__ import annotations

import torch

from serve_app.models.linear import Linear, LinearPolicy, Weight, make_head
from serve_app.models.matmul import Kernel, row_invariant
from serve_app.models.quantized import QuantizedWeight
from serve_app.models.wide import wide_kernel

_LIKELY_NATS = 4.0
"""Logits this close to a row's largest are computed anew; others have < 2 % of its odds each."""
_MOST_LIKELY = 256
"""A row with more tokens that close is left: it is flat, its logits are small and so their steps,
and computing half of a vocabulary anew would take longer than the product itself."""


class OutputHead:
    """[S, hidden] → float32 logits [S, vocab].

    A CPU's half-precision product also rounds its result: near 25, where logits of a sure model
    lie, bfloat16 knows steps of 0.125 only, and ties of tokens that differ by a tenth of a nat are
    broken by their id. So the likely tokens' logits are computed again with sums in float32.

    Args:
        linear: the product over the whole vocabulary.
        weight: the dense weight [vocab, hidden], shared with a tied embedding, and with `linear`
            where `shares_weight` says so; None where `linear` yields exact float32 logits itself.
    """

    def __init__(self, linear: Linear, weight: torch.Tensor | None = None) -> None:
        self._linear = linear
        self.shares_weight = weight is not None and linear.holds(weight)
        self._refined = weight if weight is not None and weight.device.type == "cpu" else None

    @property
    def nbytes(self) -> int:
        """Bytes of all copies of the weight."""
        return self._linear.nbytes

    def read_bytes(self, num_rows: int) -> int:
        """Bytes of the weight that a product of `num_rows` rows reads."""
        return self._linear.read_bytes(num_rows)

    def __call__(self, hidden: torch.Tensor, row_invariant: bool = False) -> torch.Tensor:
        """[S, hidden] → [S, vocab]; with `row_invariant` the same bits in any batch."""
        logits = self._linear(hidden, row_invariant).float()
        if self._refined is not None and hidden.dtype != torch.float32:
            _refine(logits, hidden, self._refined)
        return logits


def make_dense_head(weight: Weight, dense: torch.Tensor, policy: LinearPolicy) -> OutputHead:
    """Return the output layer of `weight`, whose dense form is `dense`.

    Cards keep the product's float32 sums, where torch has that; a CPU refines rounded ones.
    """
    is_packed = isinstance(weight, QuantizedWeight) and weight.bits == 4 and policy.keeps_packed
    wide = None if is_packed else wide_kernel(dense, is_skinny=not policy.batch_invariant)
    if wide is None:
        return OutputHead(make_head(weight, dense, policy), dense)
    invariant: Kernel = wide
    if policy.batch_invariant:
        invariant = row_invariant(wide, dense.shape[1], policy.device, policy.dtype)
    return OutputHead(Linear(wide, wide, 0, invariant, "dense"), dense)


def _refine(logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    is_likely = logits >= logits.amax(-1, keepdim=True) - _LIKELY_NATS
    is_likely &= is_likely.sum(-1, keepdim=True) <= _MOST_LIKELY
    rows, token_ids = is_likely.nonzero(as_tuple=True)
    if rows.shape[0] == 0:
        return
    if rows.shape[0] == 1:  # a lone row would be summed in another order than one of several
        rows, token_ids = rows.repeat(2), token_ids.repeat(2)
    weights = weight.index_select(0, token_ids).float()
    exact = weights.mul_(hidden.index_select(0, rows)).sum(-1)
    logits.index_put_((rows, token_ids), exact)
