import math

import pytest
import torch

from serve_app.models.kernels import paged_decode as module
from serve_app.models.kernels.paged_decode import (
    choose_num_splits,
    paged_decode,
    paged_decode_torch,
)

BLOCK_SIZE = 16


def _inputs(dtype, lens, device="cpu", num_heads=6, num_kv_heads=2, head_dim=32):
    width = math.ceil(max(lens) / BLOCK_SIZE) + 1
    num_blocks = len(lens) * width + 1
    query = torch.randn(len(lens), num_heads, head_dim, device=device).to(dtype)
    cache = torch.randn(2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim, device=device).to(dtype)
    tables = 1 + torch.randperm(num_blocks - 1, device=device).view(len(lens), width)
    return query, cache, tables, torch.tensor(lens, device=device)


def _one_by_one(query, cache, tables, lens):
    rows = []
    for row, length in enumerate(lens.tolist()):
        keys, values = cache[:, tables[row]].flatten(1, 2)[:, :length].double().transpose(1, 2)
        group = query.shape[1] // keys.shape[0]
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = (keys @ query[row].double().unsqueeze(-1)).squeeze(-1) / query.shape[2] ** 0.5
        rows.append((scores.softmax(-1).unsqueeze(1) @ values).squeeze(1))
    return torch.stack(rows)


def _attend(attend, inputs, max_context_len, **options):
    scale = inputs[0].shape[2] ** -0.5
    return attend(*inputs, max_context_len, scale, **options)


def test_twin_is_attention_row_by_row(dtype, assert_near):
    inputs = _inputs(dtype, [1, 16, 33, 70])
    assert_near(_attend(paged_decode_torch, inputs, 70), _one_by_one(*inputs))


def test_twin_ignores_a_generous_maximum_and_empty_rows(assert_near):
    inputs = _inputs(torch.float32, [5, 0, 20])
    output = _attend(paged_decode_torch, inputs, 48)
    assert_near(output[[0, 2]], _attend(paged_decode_torch, inputs, 20)[[0, 2]])
    assert (output[1] == 0).all()


@pytest.mark.parametrize("num_splits", [1, 3, 24])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(7, 1, 32), (4, 4, 24)])
def test_kernel_is_the_twin(
    dtype, kernel_device, monkeypatch, num_splits, num_heads, num_kv_heads, head_dim, assert_near
):
    monkeypatch.setattr(module, "choose_num_splits", lambda *_: num_splits)
    monkeypatch.setattr(module, "tile_tokens", lambda *_: 16)
    inputs = _inputs(dtype, [1, 0, 16, 37, 300], kernel_device, num_heads, num_kv_heads, head_dim)
    output = _attend(paged_decode, inputs, 312)
    assert_near(output, _attend(paged_decode_torch, inputs, 312))
    assert (output[1] == 0).all()


def test_kernel_takes_int32_tables(kernel_device, assert_near):
    query, cache, tables, lens = _inputs(torch.float16, [9, 40], kernel_device)
    output = _attend(paged_decode, (query, cache, tables.int(), lens.int()), 40)
    assert_near(output, _attend(paged_decode_torch, (query, cache, tables, lens), 40))


def test_invariant_rows_dont_depend_on_the_batch(dtype, kernel_device, monkeypatch, assert_near):
    monkeypatch.setattr(module, "INVARIANT_SPAN_TOKENS", 64)
    inputs = _inputs(dtype, [200, 1250, 50], kernel_device)
    together = _attend(paged_decode, inputs, 1250, batch_invariant=True)
    for row, length in enumerate((200, 1250, 50)):
        query, cache, tables, lens = inputs
        alone = (query[row : row + 1], cache, tables[row : row + 1], lens[row : row + 1])
        output = _attend(paged_decode, alone, length, batch_invariant=True)
        assert torch.equal(output[0], together[row])
    assert_near(together, _attend(paged_decode_torch, inputs, 1250))


def test_splits_fill_the_card_for_long_contexts_and_spare_short_ones():
    assert choose_num_splits(8 * 4, 8192, 64, 132) == 8
    assert choose_num_splits(1 * 4, 8192, 64, 132) >= 32
    assert choose_num_splits(128 * 4, 192, 64, 132) == 1
    assert choose_num_splits(1 * 4, 1, 64, 132) == 1


def test_captured_kernel_follows_the_lengths(kernel_device, assert_near):
    if kernel_device.type != "cuda":
        pytest.skip("captures on CUDA only")
    query, cache, tables, lens = _inputs(torch.float16, [30, 900], kernel_device)
    _attend(paged_decode, (query, cache, tables, lens), 900)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = _attend(paged_decode, (query, cache, tables, lens), 900)
    for lengths in ([900, 1], [17, 512]):
        lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert_near(output, _attend(paged_decode_torch, (query, cache, tables, lens), 900))
