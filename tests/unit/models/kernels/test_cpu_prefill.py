"""Attention of prompts beside PyTorch's in float32, and what a row's bits depend on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from serve_app.models import attention
from serve_app.models.interface import AttentionMetadata, PrefillChunk
from serve_app.models.kernels import cpu_prefill
from serve_app.models.kernels.cpu_prefill import CpuPrefill, plan_cpu_prefill

CPU = torch.device("cpu")
Chunks = Sequence[tuple[int, int]]
"""Rows and context of each."""


@pytest.fixture(autouse=True)
def needs_the_kernel() -> None:
    if cpu_prefill._library() is None:
        pytest.skip("neither AMX nor AVX-512 BF16 here, no g++, or another OpenMP than GCC's")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Case:
    """Sequences scattered over a cache whose other slots are not numbers."""

    def __init__(
        self, contexts: Sequence[int], heads: int, kv_heads: int, dim: int, block_size: int = 16
    ) -> None:
        counts = [-(-context // block_size) for context in contexts]
        blocks = torch.randperm(sum(counts)) + 1
        self.cache = torch.full(
            (2, sum(counts) + 1, block_size, kv_heads, dim), torch.nan, dtype=torch.bfloat16
        )
        self.tables = blocks.split(counts)
        self.queries, self.keys, self.values = [], [], []
        for context, table in zip(contexts, self.tables, strict=True):
            self.queries.append(2 * torch.randn(context, heads, dim).bfloat16())
            slots = [table[t // block_size] * block_size + t % block_size for t in range(context)]
            for plane, kept in enumerate((self.keys, self.values)):
                kept.append(torch.randn(context, kv_heads, dim).bfloat16())
                self.cache[plane].flatten(0, 1)[torch.stack(slots)] = kept[-1]

    def expected(self, index: int) -> torch.Tensor:
        """All rows of a sequence, float32 [context, heads, dim]."""
        sources = (self.queries[index], self.keys[index], self.values[index])
        query, key, value = (x.float().transpose(0, 1)[None] for x in sources)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    def attend(self, parts: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Rows [first, end) of sequences, (index, first, end) each, in one call."""
        chunks, start = [], 0
        for index, first, end in parts:
            width = -(-end // self.cache.shape[2])
            table = self.tables[index][:width]
            chunks.append(PrefillChunk(start, end - first, end, table))
            start += end - first
        rows = torch.cat([self.queries[i][first:end] for i, first, end in parts])
        # as the layers' queries: heads of a wider row
        query = torch.cat((rows, torch.full_like(rows, torch.nan)), 1)[:, : rows.shape[1]]
        kernel = plan_cpu_prefill(chunks, CPU, query.dtype, query.shape[2], self.cache.shape[2])
        assert kernel is not None
        out = torch.zeros(rows.shape, dtype=rows.dtype)
        kernel.attend(query, self.cache, out)
        return list(out.split([end - first for _, first, end in parts]))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(9, 3, 64, 16), (7, 1, 128, 16), (4, 4, 96, 32), (4, 2, 32, 16)],
)
def test_it_is_pytorchs_attention(heads: int, kv_heads: int, dim: int, block_size: int) -> None:
    contexts = (1, 16, 33, 128, 129, 300)
    case = Case(contexts, heads, kv_heads, dim, block_size)
    parts = [(index, 0, context) for index, context in enumerate(contexts)]
    for index, out in enumerate(case.attend(parts)):
        expected = case.expected(index)
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=1e-2)


def test_a_rows_bits_depend_on_its_context_alone() -> None:
    case = Case((300, 77), 6, 2, 64)
    (whole,) = case.attend([(0, 0, 300)])
    for cuts in ((0, 64, 128, 192, 256, 300), (0, 1, 2, 130, 300), (0, 127, 128, 129, 299, 300)):
        for first, end in itertools.pairwise(cuts):
            _, out = case.attend([(1, 0, 77), (0, first, end)])
            assert torch.equal(out, whole[first:end]), (first, end)


def test_threads_and_calls_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((200, 40, 90), 6, 2, 64)
    parts = [(0, 0, 200), (1, 0, 40), (2, 30, 90)]
    expected = case.attend(parts)
    before = torch.get_num_threads()
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        try:
            found = case.attend(parts)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    monkeypatch.setattr(cpu_prefill, "_MAX_WORKSPACE_TOKENS", 64)
    found = case.attend(parts)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_scores_far_apart_leave_the_largest_alone() -> None:
    case = Case((40,), 2, 1, 64)
    case.queries[0] = torch.full_like(case.queries[0], 8.0)
    direction = torch.arange(40.0).view(40, 1, 1).expand(40, 1, 64)
    case.keys[0] = direction.bfloat16()
    for token in range(40):
        case.cache[0, case.tables[0][token // 16], token % 16] = case.keys[0][token]
    (out,) = case.attend([(0, 0, 40)])
    assert torch.equal(out, case.values[0].expand(-1, 2, -1))


def test_a_query_that_is_not_a_number_stays_alone() -> None:
    case = Case((50,), 2, 1, 64)
    (expected,) = case.attend([(0, 0, 50)])
    case.queries[0][20, 1] = torch.nan
    (out,) = case.attend([(0, 0, 50)])
    assert out[20, 1].isnan().all()
    out[20, 1] = expected[20, 1]
    assert torch.equal(out, expected)


def test_it_stands_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [PrefillChunk(0, 8, 8, torch.tensor([1]))]
    assert isinstance(plan_cpu_prefill(chunks, CPU, torch.bfloat16, 64, 16), CpuPrefill)
    assert plan_cpu_prefill([], CPU, torch.bfloat16, 64, 16) is None
    assert plan_cpu_prefill(chunks, CPU, torch.float32, 64, 16) is None
    assert plan_cpu_prefill(chunks, CPU, torch.bfloat16, 80, 16) is None
    assert plan_cpu_prefill(chunks, CPU, torch.bfloat16, 64, 8) is None
    monkeypatch.setattr(cpu_prefill, "disabled_kernels", lambda: frozenset({"cpu_prefill"}))
    assert plan_cpu_prefill(chunks, CPU, torch.bfloat16, 64, 16) is None


def test_a_plan_takes_it() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    chunks = (PrefillChunk(0, 8, 8, torch.tensor([1])),)
    metadata = AttentionMetadata(0, nothing, nothing.view(0, 1), nothing, 0, chunks, block_size=16)
    plan = attention.plan_attention(metadata, torch.bfloat16, 64)
    assert plan.prompts is not None
    assert plan.parts == ()
    assert attention.plan_attention(metadata, torch.float32, 64).prompts is None
