"""AWQ's GEMM packing.

Format (https://github.com/casper-hansen/AutoAWQ): `qweight` int32 [K, N / 8] and `qzeros` int32
[G, N / 8], both packed along N with the eight columns of a word in the order 0 2 4 6 1 3 5 7;
`scales` float16 [G, N]. Zeros are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serve_app.models.loading.quantization.groups import from_groups, group_size_of, unpack_words
from serve_app.models.loading.quantization.layout import Layout, LayoutError, unsupported
from serve_app.models.quantized import QuantizedWeight

_BITS = 4
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
_KNOWN = "version gemm with 4 bits"


class AWQ:
    """quant_method "awq"."""

    layout = Layout(".qweight", (".qzeros", ".scales"))

    def __init__(self, values: Mapping[str, Any]) -> None:
        version = str(values.get("version", "gemm")).lower()
        bits = values.get("bits", values.get("w_bit", _BITS))
        if version != "gemm" or bits != _BITS:
            raise unsupported(f"AWQ of version {version!r} with {bits} bits", _KNOWN)
        size = values.get("group_size", values.get("q_group_size"))
        self._group_size = size if isinstance(size, int) else None

    def unpack(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> QuantizedWeight | torch.Tensor:
        """Groups of 32."""
        scales = parts[".scales"]
        codes, zeros = _in_order(parts[".qweight"]), _in_order(parts[".qzeros"])
        if scales.dim() != 2 or codes.shape[1] != scales.shape[1]:
            raise LayoutError(
                f"{codes.shape[1]} packed rows do not fit scales {list(scales.shape)}"
            )
        size = group_size_of(codes.shape[0], scales.shape[0], self._group_size)
        return from_groups(codes.T.contiguous(), scales.T, zeros.T, _BITS, size, dtype)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, W] → uint8 [R, 8 * W]."""
    nibbles = unpack_words(words, _BITS).unflatten(1, (-1, 8))
    return nibbles[..., list(_NIBBLE_OF_COLUMN)].flatten(1)
