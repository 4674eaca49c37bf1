"""Products by expert: tiles, the 4-bit layout, the twin against a loop, and the kernel likewise."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.kernels.grouped import (
    GroupedWeight,
    align_pairs,
    grouped_linear,
    grouped_linear_torch,
    pack_rows,
)
from serve_app.models.quantized import quantize

NUM_EXPERTS = 8


def make_indices(num_rows, num_active=3, device="cpu"):
    scores = torch.rand(num_rows, NUM_EXPERTS, device=device)
    scores[:, 5] = -1.0  # an expert that nobody chooses
    return scores.topk(num_active, dim=-1, sorted=False).indices


def make_weight(size, depth, dtype, device="cpu", bits=None):
    dense = torch.randn(NUM_EXPERTS, size, depth) * 0.2
    if bits is None:
        return GroupedWeight(dense.to(device, dtype))
    packed = [pack_rows(quantize(matrix, 4)) for matrix in dense]
    return GroupedWeight(*(torch.stack(part).to(device) for part in zip(*packed, strict=True)))


@pytest.mark.parametrize("num_rows", [1, 7, 21, 22, 40, 300])
def test_each_pair_lies_in_one_tile_of_its_expert(num_rows):
    indices = make_indices(num_rows)
    pairs = align_pairs(indices, NUM_EXPERTS)
    chosen = indices.flatten()
    if pairs.places is None:
        assert torch.equal(pairs.experts, chosen)
        return
    places = pairs.places.view(-1, pairs.tile_rows)
    real = places[places < pairs.num_pairs]
    assert torch.equal(real.sort().values, torch.arange(num_rows * 3))
    for expert, tile in zip(pairs.experts.tolist(), places, strict=True):
        held = tile[tile < pairs.num_pairs]
        assert len(held) == 0 if expert == NUM_EXPERTS else len(held) > 0
        assert (chosen[held] == expert).all()


def test_the_4_bit_layout_reads_back():
    dense = torch.randn(24, 128)
    weight = quantize(dense, 4)
    stacked = GroupedWeight(*(part[None] for part in pack_rows(weight)))
    read = stacked.dense(torch.tensor([0]), torch.float32)[0]
    assert (read - weight.dequantize(torch.float32)).abs().max() < 5e-3
    assert (stacked.num_experts, stacked.num_columns) == (1, 128)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("num_rows", [4, 50])
def test_the_twin_is_a_loop_over_pairs(num_rows, bits, assert_near):
    weight = make_weight(48, 64, torch.float32, bits=bits)
    indices, x = make_indices(num_rows), torch.randn(num_rows, 64)
    pairs = align_pairs(indices, NUM_EXPERTS)
    out = grouped_linear_torch(x, weight, pairs, 3)
    matrices = weight.dense(torch.arange(NUM_EXPERTS), torch.float32)
    expected = torch.einsum("tk,tank->tan", x, matrices[indices]).flatten(0, 1)
    assert_near(out, expected)
    inner = torch.randn(num_rows * 3, 64)
    expected = torch.einsum("pk,pnk->pn", inner, matrices[indices.flatten()])
    assert_near(grouped_linear_torch(inner, weight, pairs, 1), expected)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("num_rows", [1, 9, 30, 200])
@pytest.mark.parametrize(("size", "depth"), [(96, 64), (200, 320)])
def test_the_kernel_is_its_twin(num_rows, size, depth, bits, dtype, kernel_device, assert_near):
    weight = make_weight(size, depth, dtype, kernel_device, bits)
    pairs = align_pairs(make_indices(num_rows, device=kernel_device), NUM_EXPERTS)
    x = torch.randn(num_rows, depth, device=kernel_device).to(dtype)
    out = grouped_linear(x, weight, pairs, 3)
    assert_near(out, grouped_linear_torch(x.float(), weight, pairs, 3).to(dtype))


def test_a_row_alone_has_the_same_bits(dtype, kernel_device):
    weight = make_weight(96, 128, dtype, kernel_device)
    indices = make_indices(70, device=kernel_device)
    x = torch.randn(70, 128, device=kernel_device).to(dtype)
    together = grouped_linear(x, weight, align_pairs(indices, NUM_EXPERTS, True), 3)
    for row in (0, 33, 69):
        own = align_pairs(indices[row : row + 1], NUM_EXPERTS, True)
        alone = grouped_linear(x[row : row + 1], weight, own, 3)
        assert torch.equal(alone, together[3 * row : 3 * row + 3])
