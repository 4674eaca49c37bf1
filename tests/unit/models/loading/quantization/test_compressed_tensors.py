"""compressed-tensors checkpoints against the dense model that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from serve_app.models.loading.quantization.table import FORMATS
from tests.unit.models.loading.checkpoints import int_quantized, pack_quantized, round_layer
from tests.unit.models.loading.quantization.formats import bfloat16, compressed, quantize


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_packed(folder, check, group_size, sym, bits):
    config = compressed("pack-quantized", bits=bits, group_size=group_size, sym=sym)
    dense = quantize(
        folder,
        config,
        lambda layer: pack_quantized(layer, sym=sym),
        bits=bits,
        group_size=group_size,
        sym=sym,
        scale_type=bfloat16,
    )
    check(dense, packed=f"int{bits}")


def test_compressed_tensors_with_activation_order(folder, check):
    dense = quantize(
        folder,
        compressed("pack-quantized"),
        lambda layer: pack_quantized(layer, sym=True, with_index=True),
        shuffled=True,
        scale_type=bfloat16,
    )
    check(dense, packed="dense")


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (8, 64), (4, 32)])
@pytest.mark.parametrize("sym", [True, False])
def test_compressed_tensors_of_one_byte(folder, check, bits, group_size, sym):
    config = compressed("int-quantized", bits=bits, group_size=group_size, sym=sym)
    dense = quantize(
        folder,
        config,
        lambda layer: int_quantized(layer, sym=sym),
        bits=bits,
        group_size=group_size,
        sym=sym,
        scale_type=bfloat16,
    )
    check(dense, packed=f"int{bits}")


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_own_packing_is_read(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rounded = round_layer(torch.randn(24, 64), bits, 32, sym=False, scale_type=bfloat16)
    half = 2 ** (bits - 1)
    codes, zeros = (
        torch.from_numpy((values.astype(np.int16) - half).astype(np.int8))
        for values in (rounded.codes, rounded.zeros)
    )
    parts = {
        ".weight_packed": helpers.pack_to_int32(codes, bits),
        ".weight_scale": torch.from_numpy(rounded.scales),
        ".weight_shape": torch.tensor(codes.shape),
        ".weight_zero_point": helpers.pack_to_int32(zeros, bits, packed_dim=0).contiguous(),
    }
    for name, part in pack_quantized(rounded, sym=False).items():
        assert torch.equal(part, parts[f".{name}"].to(part.dtype))
    form = FORMATS["compressed-tensors"](compressed("pack-quantized", bits=bits))
    weight = form.unpack(parts, torch.float32).dequantize(torch.float32)
    torch.testing.assert_close(weight, rounded.dense)
