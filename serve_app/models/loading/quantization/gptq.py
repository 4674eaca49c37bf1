"""GPTQ's packing, which neural-compressor and AutoRound write too.

Format (https://github.com/AutoGPTQ/AutoGPTQ and its successor GPTQModel): `qweight` int32
[K * bits / 32, N], packed along K; `scales` float16 [G, N]; `qzeros` int32 [G, N * bits / 32],
packed along N; `g_idx` int32 [K], the group of each column. Version 1 stores zero - 1, version 2
(`checkpoint_format: gptq_v2`) the zero itself. Widths differ by layer in mixed checkpoints, so
they are taken from the tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serve_app.models.loading.quantization.groups import (
    bits_of,
    from_groups,
    from_indexed_groups,
    group_size_of,
    unpack_words,
)
from serve_app.models.loading.quantization.layout import Layout, LayoutError, unsupported
from serve_app.models.quantized import QuantizedWeight

_VERSIONS = {"gptq": 1, "gptq_v2": 0}
_KNOWN = "checkpoint_format gptq and gptq_v2 with 2, 4 or 8 bits"


class GPTQ:
    """quant_method "gptq". `zero_shift` is what the stored zeros lack."""

    # The last is neural-compressor's, for another number type on another device.
    layout = Layout(
        ".qweight", (".qzeros", ".scales"), (".g_idx",), ignored=(".scale_bf16_to_fp8",)
    )

    def __init__(self, values: Mapping[str, Any]) -> None:
        version = str(values.get("checkpoint_format") or "gptq")
        if version not in _VERSIONS:
            raise unsupported(f"GPTQ of checkpoint_format {version!r}", _KNOWN)
        self._zero_shift = _VERSIONS[version]
        size = values.get("group_size")
        self._group_size = size if isinstance(size, int) else None

    def unpack(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> QuantizedWeight | torch.Tensor:
        """Groups of 32; dense where desc_act put the columns into groups out of order."""
        words, scales, packed_zeros = parts[".qweight"], parts[".scales"], parts[".qzeros"]
        if scales.dim() != 2 or packed_zeros.dim() != 2:
            raise LayoutError("its scales or qzeros are no matrices")
        num_groups, num_rows = scales.shape
        bits = bits_of(packed_zeros.shape[1], num_rows)
        codes = unpack_words(words.T, bits)
        zeros = unpack_words(packed_zeros, bits)[:, :num_rows]
        zeros = zeros + self._zero_shift & (1 << bits) - 1
        index = parts.get(".g_idx")
        num_columns = codes.shape[1] if index is None else index.shape[0]
        if not 0 <= codes.shape[1] - num_columns < 32 // bits:
            raise LayoutError(f"{num_columns} group indices do not fit {codes.shape[1]} columns")
        codes = codes[:, :num_columns]
        size = group_size_of(num_columns, num_groups, self._group_size)
        if index is not None and not _is_in_order(index, size):
            return from_indexed_groups(codes, scales.T, zeros.T, index, dtype)
        return from_groups(codes, scales.T, zeros.T, bits, size, dtype)


def _is_in_order(index: torch.Tensor, group_size: int) -> bool:
    order = torch.arange(index.shape[0], device=index.device) // group_size
    return torch.equal(index.long(), order)
