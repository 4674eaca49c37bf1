"""Attention over the paged KV cache, one backend per device, with SDPA as the reference.

`plan_attention` runs once per forward pass and holds what all layers share (block indices, masks);
`attend` runs per layer. Query heads that share a key/value head are viewed as query positions
where a mask allows it, so that keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from serve_app.models.interface import AttentionMetadata, PrefillChunk
from serve_app.models.kernels._triton import has_kernel
from serve_app.models.kernels.cpu import CpuKernels, cpu_kernels
from serve_app.models.kernels.cpu_prefill import CpuPrefill, plan_cpu_prefill
from serve_app.models.kernels.paged_decode import paged_decode

_INVARIANT_KV_TOKENS = 512
_CPU_KV_TOKENS = 32
_CPU_INVARIANT_KV_TOKENS = 64
_CPU_MERGE_TOKENS = 256


@dataclass(slots=True)
class DecodeGroup:
    """Decode rows that attend in one call.

    rows: int64 [n], or None for all rows. blocks: int64 [n * W]. mask: [n, 1, 1, W * block_size],
    0 where a token may be seen, -inf elsewhere. `run`: one row's blocks where they follow each
    other, `blocks` without padding: they are attended in place.
    """

    rows: torch.Tensor | None
    num_rows: int
    blocks: torch.Tensor
    mask: torch.Tensor
    run: slice | None = None


@dataclass(slots=True)
class PrefillPart:
    """One chunk. mask: [length, context], or None for a sequence's first chunk (causal).

    `run`: the chunk's blocks where they follow each other, which are attended in place.
    """

    chunk: PrefillChunk
    mask: torch.Tensor | None
    run: slice | None = None


@dataclass(slots=True)
class PagedDecodes:
    """Decode rows for a paged kernel: block tables [B, W], context lengths [B], host maximum."""

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    max_context_len: int


@dataclass(slots=True)
class AttentionPlan:
    """What the layers of one forward pass share. `prompts` computes `parts`, where it is there."""

    num_rows: int
    num_decodes: int
    block_size: int
    groups: tuple[DecodeGroup, ...]
    parts: tuple[PrefillPart, ...]
    prompts: CpuPrefill | None
    paged: PagedDecodes | None
    prefill: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    batch_invariant: bool


def plan_attention(
    metadata: AttentionMetadata, dtype: torch.dtype, head_dim: int = 0
) -> AttentionPlan:
    """Prepare a forward pass whose activations are `dtype`; `head_dim`, where known, is theirs."""
    device = metadata.slot_mapping.device
    plan_decode, prefill = _BACKENDS.get(device.type, _DEFAULT_BACKEND)
    paged = None
    if metadata.num_decodes and _has_paged_decode(device, dtype, head_dim):
        paged = _plan_decode_paged(metadata)
    chunks = metadata.prefill_chunks
    prompts = plan_cpu_prefill(chunks, device, dtype, head_dim, metadata.block_size)
    return AttentionPlan(
        num_rows=metadata.slot_mapping.shape[0],
        num_decodes=metadata.num_decodes,
        block_size=metadata.block_size,
        groups=plan_decode(metadata, dtype) if metadata.num_decodes and not paged else (),
        parts=tuple(
            PrefillPart(chunk, _chunk_mask(chunk, dtype), _run_of(chunk.block_table))
            for chunk in (chunks if prompts is None else ())
        ),
        prompts=prompts,
        paged=paged,
        prefill=prefill,
        batch_invariant=metadata.batch_invariant,
    )


def attend(query: torch.Tensor, kv_cache_layer: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """[T, Hq, D] over one layer's cache [2, num_blocks, block_size, Hkv, D] → [T, Hq, D].

    Rows that belong to neither a decode nor a chunk (padding) give zeros.
    """
    if plan.num_decodes == plan.num_rows:
        if plan.paged is not None:
            return _decode_paged(query, kv_cache_layer, plan.paged, plan)
        if len(plan.groups) == 1:
            return _decode(query, kv_cache_layer, plan.groups[0], plan)
    out = torch.zeros_like(query)
    if plan.paged is not None:
        decodes = query[: plan.num_decodes]
        out[: plan.num_decodes] = _decode_paged(decodes, kv_cache_layer, plan.paged, plan)
    for group in plan.groups:
        rows = group.rows
        if rows is None:
            decodes = query[: plan.num_decodes]
            out[: plan.num_decodes] = _decode(decodes, kv_cache_layer, group, plan)
        else:
            out[rows] = _decode(query[rows], kv_cache_layer, group, plan)
    if plan.prompts is not None:
        plan.prompts.attend(query, kv_cache_layer, out)
    for part in plan.parts:
        rows_of_chunk = slice(part.chunk.start, part.chunk.start + part.chunk.length)
        keys, values = _gather(kv_cache_layer, part.chunk.block_table, 1, part.run)
        keys, values = keys[:, : part.chunk.context_len], values[:, : part.chunk.context_len]
        out[rows_of_chunk] = plan.prefill(query[rows_of_chunk], keys, values, part.mask)
    return out


def _decode_paged(
    query: torch.Tensor, kv_cache_layer: torch.Tensor, paged: PagedDecodes, plan: AttentionPlan
) -> torch.Tensor:
    """One row per sequence, [B, Hq, D], straight from the blocks."""
    if (cpu := cpu_kernels(query)) is not None:
        return cpu.decode_attention(
            query, kv_cache_layer, paged.block_tables, paged.context_lens, paged.max_context_len
        )
    return paged_decode(
        query,
        kv_cache_layer,
        paged.block_tables,
        paged.context_lens,
        paged.max_context_len,
        query.shape[-1] ** -0.5,
        batch_invariant=plan.batch_invariant,
    )


def _has_paged_decode(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    like = torch.empty(0, dtype=dtype, device=device)
    if device.type == "cpu":
        return CpuKernels.takes_heads(head_dim) and cpu_kernels(like) is not None
    return has_kernel("paged_decode", like)


def _decode(
    query: torch.Tensor, kv_cache_layer: torch.Tensor, group: DecodeGroup, plan: AttentionPlan
) -> torch.Tensor:
    """One row per sequence, [n, Hq, D]; heads of a group become query positions."""
    num_rows, num_heads, head_dim = query.shape
    keys, values = _gather(kv_cache_layer, group.blocks, num_rows, group.run)
    num_kv_heads = keys.shape[2]
    grouped = query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = group.mask.expand(-1, num_kv_heads, grouped.shape[2], -1)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if plan.batch_invariant and query.device.type != "cpu":
        # Split-KV kernels choose their splits by the size of the batch; these two never split.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    else:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.reshape(num_rows, num_heads, head_dim)


def _gather(
    kv_cache_layer: torch.Tensor, blocks: torch.Tensor, num_rows: int, run: slice | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [num_rows, tokens, Hkv, D] of int64 [num_rows * W] blocks.

    A view of the cache where `run` names the blocks of one row, else a copy.
    """
    if run is not None:
        keys, values = kv_cache_layer[:, run].flatten(1, 2).unsqueeze(1).unbind(0)
        return keys, values
    gathered = kv_cache_layer.index_select(1, blocks)
    keys, values = gathered.view(2, num_rows, -1, *kv_cache_layer.shape[3:]).unbind(0)
    return keys, values


def _run_of(blocks: torch.Tensor) -> slice | None:
    """The blocks, int64 [W], as a slice where each follows the one before; on a CPU only.

    A table with padding is no run: what lies behind a sequence's last block is somebody else's,
    and a value that is not finite would come through the mask.
    """
    if blocks.device.type != "cpu" or not blocks.shape[0]:
        return None
    table = blocks.tolist()
    first = table[0]
    is_run = first > 0 and table == list(range(first, first + len(table)))
    return slice(first, first + len(table)) if is_run else None


def _plan_decode_paged(metadata: AttentionMetadata) -> PagedDecodes:
    # A padding row sees one token of the scratch block: without any it would yield NaN.
    lens = metadata.decode_context_lens.clamp(min=1)
    return PagedDecodes(metadata.decode_block_tables, lens, metadata.max_decode_context_len)


def _plan_decode_padded(metadata: AttentionMetadata, dtype: torch.dtype) -> tuple[DecodeGroup, ...]:
    """All rows in one call as long as the longest allows: host sizes only, fit for capture."""
    step = _INVARIANT_KV_TOKENS if metadata.batch_invariant else metadata.block_size
    num_tokens = _round_up(metadata.max_decode_context_len, max(step, metadata.block_size))
    tables = _widen(metadata.decode_block_tables, num_tokens // metadata.block_size)
    mask = _decode_mask(metadata.decode_context_lens, num_tokens, dtype)
    return (DecodeGroup(None, metadata.num_decodes, tables.reshape(-1), mask),)


def _plan_decode_grouped(
    metadata: AttentionMetadata, dtype: torch.dtype
) -> tuple[DecodeGroup, ...]:
    """Rows of similar context length together, so that a long sequence does not pad the others.

    A row's padded length follows from its own context alone where `batch_invariant` asks for it;
    otherwise neighbouring lengths are merged while the padding costs less than another call.
    """
    step = _CPU_INVARIANT_KV_TOKENS if metadata.batch_invariant else _CPU_KV_TOKENS
    step = max(step, metadata.block_size)
    lens = metadata.decode_context_lens.tolist()
    if len(lens) == 1 and (alone := _plan_decode_in_place(metadata, lens[0], step, dtype)):
        return (alone,)
    by_length: dict[int, list[int]] = {}
    for row, context_len in enumerate(lens):
        by_length.setdefault(_round_up(max(context_len, 1), step), []).append(row)
    if not metadata.batch_invariant:
        by_length = _merge_lengths(by_length)
    tables = _widen(metadata.decode_block_tables, max(by_length) // metadata.block_size)
    groups = []
    for num_tokens, members in sorted(by_length.items()):
        width = num_tokens // metadata.block_size
        rows = None if len(by_length) == 1 else torch.tensor(members)
        chosen = tables if rows is None else tables[rows]
        own_lens = metadata.decode_context_lens
        own_lens = own_lens if rows is None else own_lens[rows]
        mask = _decode_mask(own_lens, num_tokens, dtype)
        groups.append(DecodeGroup(rows, len(members), chosen[:, :width].reshape(-1), mask))
    return tuple(groups)


def _plan_decode_in_place(
    metadata: AttentionMetadata, context_len: int, step: int, dtype: torch.dtype
) -> DecodeGroup | None:
    """The only row, over its blocks as they lie in the cache; None where they are scattered."""
    num_blocks = -(-max(context_len, 1) // metadata.block_size)
    if metadata.batch_invariant and num_blocks * metadata.block_size % step:
        return None  # in company it is padded further, and the padding belongs to somebody else
    blocks = metadata.decode_block_tables[0, :num_blocks]
    run = _run_of(blocks)
    if run is None:
        return None
    num_tokens = num_blocks * metadata.block_size
    mask = _decode_mask(metadata.decode_context_lens, num_tokens, dtype)
    return DecodeGroup(None, 1, blocks, mask, run)


def _merge_lengths(by_length: dict[int, list[int]]) -> dict[int, list[int]]:
    merged: dict[int, list[int]] = {}
    previous: int | None = None
    for length in sorted(by_length):
        rows = by_length[length]
        if previous is not None and len(merged[previous]) * (length - previous) < _CPU_MERGE_TOKENS:
            rows = merged.pop(previous) + rows
        merged[length] = sorted(rows)
        previous = length
    return merged


def _decode_mask(context_lens: torch.Tensor, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive, [n, 1, 1, num_tokens]; never a bool mask, which XPU computes on its slow path.

    A padding row sees one token: without any, its NaN would spread through the scratch block.
    """
    positions = torch.arange(num_tokens, device=context_lens.device)
    hidden = positions >= context_lens.clamp(min=1)[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=context_lens.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None, None]


def _chunk_mask(chunk: PrefillChunk, dtype: torch.dtype) -> torch.Tensor | None:
    if chunk.context_len == chunk.length:
        return None
    shape = (chunk.length, chunk.context_len)
    device = chunk.block_table.device
    mask = torch.full(shape, float("-inf"), dtype=dtype, device=device)
    return mask.triu_(chunk.context_len - chunk.length + 1)


def _prefill_repeated(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[C, Hq, D] over [1, context, Hkv, D], by SDPA's own handling of grouped heads."""
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != keys.shape[2],
    )
    return out[0].transpose(0, 1)


def _prefill_grouped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """As `_prefill_repeated`; a masked chunk views its head groups as query positions.

    The fused kernel that takes a mask knows no grouped heads, and SDPA would fall to plain math.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    if mask is None or group == 1:
        return _prefill_repeated(query, keys, values, mask)
    # [C, Hkv, G, D] → [Hkv, G, C, D] → [1, Hkv, G * C, D]
    grouped = query.view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    grouped = grouped.reshape(1, num_kv_heads, group * num_rows, head_dim)
    # A fused kernel wants rows of a multiple of 8 elements.
    missing = -mask.shape[1] % 8
    padded = F.pad(mask, (0, missing), value=float("-inf")) if missing else mask
    repeated = padded.repeat(group, 1)[:, : mask.shape[1]]
    out = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=repeated
    )
    out = out.view(num_kv_heads, group, num_rows, head_dim).permute(2, 0, 1, 3)
    return out.reshape(num_rows, num_heads, head_dim)


def _widen(tables: torch.Tensor, width: int) -> torch.Tensor:
    """The first `width` columns; columns that are missing point to the scratch block 0."""
    missing = width - tables.shape[1]
    return F.pad(tables, (0, missing)) if missing > 0 else tables[:, :width]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


_DEFAULT_BACKEND = (_plan_decode_padded, _prefill_grouped)
_BACKENDS = {"cpu": (_plan_decode_grouped, _prefill_repeated)}
