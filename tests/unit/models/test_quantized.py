from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from serve_app.models.gguf import GGMLType
from serve_app.models.packed import PACKED_TYPES, PackedRows
from serve_app.models.quantized import QuantizedWeight, concatenate, quantize

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def pack(kind, num_rows=24, num_columns=96, seed=0):
    values = np.random.default_rng(seed).normal(size=(num_rows, num_columns)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    return PackedRows(GGMLType[kind], torch.from_numpy(blocks)), blocks


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_mean_what_the_gguf_package_says(kind):
    packed, blocks = pack(kind)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    weight = packed.unpack()
    assert packed.shape == weight.shape == (24, 96)
    assert weight.bits == (4 if kind.startswith("Q4") else 8)
    dense = weight.dequantize(torch.float32).numpy()
    np.testing.assert_allclose(dense, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_selected_while_packed(kind):
    packed, _ = pack(kind)
    rows = torch.randperm(24)
    chosen = packed.select(rows).unpack().dequantize(torch.float32)
    assert torch.equal(chosen, packed.unpack().dequantize(torch.float32)[rows])


@pytest.mark.parametrize("bits", [4, 8])
def test_wide_groups_repeat_their_scale(bits):
    dense = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    weight = quantize(dense, bits, 128)
    assert weight.scales.shape == weight.offsets.shape == (6, 8)
    scales = weight.scales.view(6, 2, 4)
    assert torch.equal(scales, scales[..., :1].expand(6, 2, 4))
    assert scales.unique().numel() == 12
    steps = scales[..., :1].repeat_interleave(128, dim=-1).reshape(6, 256)
    assert ((weight.dequantize(torch.float32) - dense).abs() <= steps / 2 + 1e-6).all()


def test_mixed_bits_concatenate_exactly():
    parts = [pack(kind, seed=seed)[0].unpack() for seed, kind in enumerate(KINDS)]
    whole = concatenate(parts)
    assert whole.bits == 8
    expected = torch.cat([part.dequantize(torch.float32) for part in parts])
    assert torch.equal(whole.dequantize(torch.float32), expected)


@pytest.mark.parametrize(("bits", "levels"), [(4, 15), (8, 254)])
def test_rounding_stays_within_half_a_step(bits, levels):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    rounded = quantize(weight, bits).dequantize(torch.float32)
    groups = weight.unflatten(1, (-1, 32))
    width = groups.amax(-1) - groups.amin(-1) if bits == 4 else 2 * groups.abs().amax(-1)
    error = (rounded - weight).unflatten(1, (-1, 32)).abs().amax(-1)
    assert (error <= 0.501 * width / levels).all()


def test_constant_and_zero_groups_survive():
    weight = torch.zeros(2, 32)
    weight[1] = 3.0
    for bits in (4, 8):
        rounded = quantize(weight, bits).dequantize(torch.float32)
        torch.testing.assert_close(rounded, weight)


def test_dequantize_covers_more_rows_than_one_go(monkeypatch):
    monkeypatch.setattr("serve_app.models.quantized._ROWS_AT_ONCE", 7)
    weight = QuantizedWeight(4, torch.full((20, 32), 3, dtype=torch.int8), *torch.ones(2, 20, 1))
    assert torch.equal(weight.dequantize(torch.float32), torch.full((20, 32), 4.0))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_256_mean_what_the_gguf_package_says(kind):
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 3, block_bytes), dtype=np.uint8)
    for start in (208,) if kind == "Q6_K" else (0, 2):
        factor = rng.uniform(1e-3, 1e-2, (6, 3, 1)).astype(np.float16)
        blocks[..., start : start + 2] = factor.view(np.uint8)
    blocks = blocks.reshape(6, -1)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    packed = PackedRows(GGMLType[kind], torch.from_numpy(blocks))
    unpacked = packed.unpack()
    assert packed.shape == tuple(unpacked.shape) == (6, 3 * block)
    if isinstance(unpacked, QuantizedWeight):
        assert unpacked.bits == (4 if kind == "Q4_K" else 8)
        unpacked = unpacked.dequantize(torch.float32)
    np.testing.assert_allclose(unpacked.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_every_packed_type_is_compared_above():
    compared = {*KINDS, "Q4_K", "Q5_K", "Q6_K"}
    assert {kind.name for kind in PACKED_TYPES} == compared
