"""The first layer: token ids to their rows, dense or as the checkpoint packs them."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from serve_app.models.packed import PackedRows
from serve_app.models.quantized import QuantizedWeight


class TokenEmbedding(Protocol):
    """`nbytes`: memory of its own."""

    nbytes: int

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → [T, hidden] in the activations' type."""
        ...


class DenseEmbedding:
    """Rows of a matrix [vocab, hidden]."""

    __slots__ = ("nbytes", "weight")

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.nbytes = weight.nbytes

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → [T, hidden]."""
        return F.embedding(token_ids, self.weight)


class PackedEmbedding:
    """Rows of a mapped file, unpacked where they are looked up: the file's pages are its memory."""

    __slots__ = ("_dtype", "_rows", "nbytes")

    def __init__(self, rows: PackedRows, dtype: torch.dtype) -> None:
        self._rows = rows
        self._dtype = dtype
        self.nbytes = 0

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → [T, hidden], the bits of the dequantized matrix's rows."""
        rows = self._rows.select(token_ids).unpack()
        if isinstance(rows, QuantizedWeight):
            return rows.dequantize(self._dtype)
        return rows.to(self._dtype)
