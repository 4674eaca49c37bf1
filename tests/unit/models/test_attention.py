"""`attend` against attention written out token by token in float64."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.attention import attend, plan_attention
from serve_app.models.interface import AttentionMetadata, PrefillChunk

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 16, 16


class Pages:
    """A cache [2, blocks, 16, Hkv, D] with random sequences, in shuffled blocks or in runs."""

    def __init__(self, lengths, device, dtype=torch.float32, seed=0, is_shuffled=True):
        generator = torch.Generator().manual_seed(seed)
        num_blocks = sum(-(-length // BLOCK) for length in lengths) + 1
        self.cache = torch.randn(2, num_blocks, BLOCK, KV_HEADS, DIM, generator=generator)
        order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        if not is_shuffled:
            order = list(range(num_blocks - 1, 0, -1))
        self.tables = [[order.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
        self.cache = self.cache.to(device, dtype)
        self.lengths, self.device = lengths, device

    def key_values(self, row):
        pages = self.cache[:, self.tables[row]].double().cpu()
        return pages.flatten(1, 2)[:, : self.lengths[row]]

    def metadata(self, num_decodes, chunks=(), num_rows=None, max_len=None, batch_invariant=False):
        tables = self.tables[:num_decodes]
        width = max(map(len, tables), default=1)
        padded = torch.tensor([table + [0] * (width - len(table)) for table in tables])
        return AttentionMetadata(
            num_decodes=num_decodes,
            slot_mapping=torch.zeros(
                num_rows or num_decodes, dtype=torch.int64, device=self.device
            ),
            decode_block_tables=padded.reshape(-1, width).long().to(self.device),
            decode_context_lens=torch.tensor(self.lengths[:num_decodes]).to(self.device),
            max_decode_context_len=max_len or max(self.lengths[:num_decodes], default=0),
            prefill_chunks=tuple(chunks),
            block_size=BLOCK,
            batch_invariant=batch_invariant,
        )


def exact(query, key_values, position):
    keys, values = key_values[:, : position + 1].repeat_interleave(HEADS // KV_HEADS, 2)
    scores = torch.einsum("hd,thd->ht", query.double().cpu(), keys) / DIM**0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values)


def queries(num_rows, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(num_rows, HEADS, DIM, generator=generator).to(device, dtype)


def run(query, pages, metadata):
    return attend(query, pages.cache, plan_attention(metadata, query.dtype))


@pytest.mark.parametrize("lengths", [[1], [64], [65, 1, 200], [3, 700, 3, 90, 511, 16, 17]])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_decode_rows(lengths, batch_invariant, device):
    pages = Pages(lengths, device)
    query = queries(len(lengths), device)
    out = run(query, pages, pages.metadata(len(lengths), batch_invariant=batch_invariant)).cpu()
    for row, length in enumerate(lengths):
        expected = exact(query[row], pages.key_values(row), length - 1)
        assert (out[row] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("length", "context_len"), [(1, 1), (40, 40), (40, 100), (16, 33), (1, 9)])
def test_a_chunk_sees_its_past_and_itself(length, context_len, device):
    pages = Pages([context_len], device)
    table = torch.tensor(pages.tables[0], device=device)
    chunk = PrefillChunk(0, length, context_len, table)
    query = queries(length, device)
    out = run(query, pages, pages.metadata(0, [chunk], length)).cpu()
    for row in range(length):
        position = context_len - length + row
        expected = exact(query[row], pages.key_values(0), position)
        assert (out[row] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_in_a_run_are_attended_where_they_lie(dtype, batch_invariant):
    for length in (1, 16, 17, 64, 100, 640):
        # A neighbour behind the row's last block, with a value that must not come through.
        pages = Pages([length, 40], "cpu", dtype, is_shuffled=False)
        pages.cache[:, pages.tables[1]] = float("nan")
        query = queries(1, "cpu", dtype)
        metadata = pages.metadata(1, batch_invariant=batch_invariant)
        (group,) = plan_attention(metadata, dtype).groups
        num_blocks = len(pages.tables[0])
        is_in_place = not batch_invariant or num_blocks * BLOCK % 64 == 0
        assert (group.run is not None) == is_in_place
        out = run(query, pages, metadata)
        expected = exact(query[0], pages.key_values(0), length - 1)
        tolerance = 1e-5 if dtype is torch.float32 else 0.05
        assert (out[0].double() - expected).abs().max() < tolerance
        chunk = PrefillChunk(0, 1, length, torch.tensor(pages.tables[0]))
        metadata = pages.metadata(0, [chunk], 1)
        assert plan_attention(metadata, dtype).parts[0].run == slice(1, 1 + num_blocks)
        out = run(query, pages, metadata)
        assert (out[0].double() - expected).abs().max() < tolerance


def test_scattered_or_padded_blocks_are_no_run():
    pages = Pages([100, 20], "cpu")
    chunk = PrefillChunk(0, 1, 100, torch.tensor(pages.tables[0]))
    assert plan_attention(pages.metadata(0, [chunk], 1), torch.float32).parts[0].run is None
    padded = PrefillChunk(0, 1, 1, torch.zeros(1, dtype=torch.int64))
    assert plan_attention(pages.metadata(0, [padded], 1), torch.float32).parts[0].run is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_in_a_run_has_the_bits_of_the_same_row_in_scattered_blocks(dtype):
    for length in (5, 64, 128, 576):
        together = Pages([length, 30], "cpu", dtype, is_shuffled=False)
        query = queries(2, "cpu", dtype)
        both = run(query, together, together.metadata(2, batch_invariant=True))
        alone = run(query[:1], together, together.metadata(1, batch_invariant=True))
        assert torch.equal(alone[0], both[0]), length


def test_rows_of_neither_kind_give_zeros(device):
    pages = Pages([5, 30, 20], device)
    chunk = PrefillChunk(3, 10, 20, torch.tensor(pages.tables[2], device=device))
    out = run(queries(16, device), pages, pages.metadata(2, [chunk], 16))
    assert out[:2].all()
    assert not out[2].any()
    assert out[3:13].all()
    assert not out[13:].any()


def test_rows_without_context_are_finite(device):
    pages = Pages([5, 30], device)
    pages.lengths = [0, 30]
    out = run(queries(2, device), pages, pages.metadata(2))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_row_is_the_same_bits_with_any_mates(dtype, device):
    lengths = [7, 64, 65, 130, 300, 513, 90, 1, 128, 640, 33, 400]
    pages = Pages(lengths, device, dtype)
    query = queries(len(lengths), device, dtype)
    together = run(query, pages, pages.metadata(len(lengths), batch_invariant=True))
    for count in range(1, len(lengths)):
        metadata = pages.metadata(count, batch_invariant=True, max_len=1024)
        assert torch.equal(run(query[:count], pages, metadata), together[:count]), count


def test_a_long_mate_does_not_pad_short_rows_on_the_cpu():
    lengths = [20] * 8 + [5000]
    pages = Pages(lengths, "cpu")
    plan = plan_attention(pages.metadata(len(lengths)), torch.float32)
    assert sum(group.blocks.numel() for group in plan.groups) * BLOCK < 5000 + 8 * 64 + 64
