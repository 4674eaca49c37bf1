from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from serve_app.models.gguf import GGMLType
from serve_app.models.packed import PACKED_TYPES, PackedRows
from serve_app.models.quantized import QuantizedWeight
from serve_app.models.token_embedding import DenseEmbedding, PackedEmbedding


@pytest.mark.parametrize("ggml_type", PACKED_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_rows_are_the_bits_of_the_dequantized_matrix(
    ggml_type: GGMLType, dtype: torch.dtype
) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((40, 512), dtype=np.float32)
    try:
        data = gguf.quantize(values, gguf.GGMLQuantizationType(ggml_type.value))
    except NotImplementedError:
        pytest.skip("the gguf package reads this type and does not write it")
    rows = PackedRows(ggml_type, torch.from_numpy(data))
    whole = rows.unpack()
    dense = whole.dequantize(dtype) if isinstance(whole, QuantizedWeight) else whole.to(dtype)
    token_ids = torch.tensor([3, 39, 0, 3])
    packed = PackedEmbedding(rows, dtype)
    assert torch.equal(packed(token_ids), DenseEmbedding(dense)(token_ids))
    assert packed.nbytes == 0
