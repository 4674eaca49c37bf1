"""Attention of one decode row per sequence over the paged KV cache, split along the context.

Flash-decoding: each program folds one span of one sequence's tokens for one KV head into a partial
softmax (FlashAttention, 2205.14135); a second kernel joins the spans. The query heads that share a
KV head share its loads.
"""

import math

import torch

from serve_app.models.kernels._triton import (
    cdiv,
    has_kernel,
    next_power_of_2,
    num_compute_units,
    overlap_options,
    tl,
    triton,
    wait_for_inputs,
)

INVARIANT_SPAN_TOKENS = 512
_SPLIT_CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_JOIN_BLOCK = 16
_LOG2_E = 1.4426950408889634


def paged_decode(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    scale: float,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Return [B, Hq, D] in query's dtype.

    query: [B, Hq, D]; layer_cache: [2, num_blocks, block_size, Hkv, D]; block_tables: integers
    [B, W]; context_lens: integers [B], the row's own token included, each ≤ max_context_len ≤
    W · block_size. A row of context 0 gives zeros. batch_invariant: spans of a fixed number of
    tokens, so that a row's bits don't depend on the rest of the batch.
    """
    if not has_kernel("paged_decode", query):
        return paged_decode_torch(
            query, layer_cache, block_tables, context_lens, max_context_len, scale
        )
    batch, num_heads, head_dim = query.shape
    output = torch.empty((batch, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if batch == 0:
        return output
    num_kv_heads = layer_cache.shape[3]
    block_tokens = tile_tokens(head_dim, layer_cache.dtype, query.device)
    if batch_invariant:
        num_splits = max(1, cdiv(max_context_len, INVARIANT_SPAN_TOKENS))
    else:
        units = num_compute_units(query.device)
        num_splits = choose_num_splits(batch * num_kv_heads, max_context_len, block_tokens, units)
    partial, logsumexp = output, output
    if num_splits > 1:
        shape = (batch, num_heads, num_splits)
        partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        logsumexp = torch.empty(shape, dtype=torch.float32, device=query.device)
    group = num_heads // num_kv_heads
    _span_kernel[(num_kv_heads, num_splits, batch)](
        query, layer_cache, block_tables, context_lens, partial, logsumexp,
        scale * _LOG2_E, num_splits, query.stride(0), query.stride(1), block_tables.stride(0),
        *layer_cache.stride()[:4],
        GROUP=group, BLOCK_GROUP=max(16, next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_DIM=max(16, next_power_of_2(head_dim)),
        BLOCK_SIZE=layer_cache.shape[2], BLOCK_TOKENS=block_tokens,
        FIXED_SPAN=INVARIANT_SPAN_TOKENS if batch_invariant else 0, IS_WHOLE=num_splits == 1,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=_num_stages(query.device), **overlap_options(query),
    )  # fmt: skip
    if num_splits > 1:
        _join_kernel[(num_heads, batch)](
            partial, logsumexp, context_lens, output, num_splits,
            HEAD_DIM=head_dim, BLOCK_DIM=next_power_of_2(head_dim), BLOCK_TOKENS=block_tokens,
            FIXED_SPAN=INVARIANT_SPAN_TOKENS if batch_invariant else 0, BLOCK_SPLITS=_JOIN_BLOCK,
            num_warps=4, **overlap_options(query),
        )  # fmt: skip
    return output


def paged_decode_torch(
    query: torch.Tensor,
    layer_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    scale: float,
) -> torch.Tensor:
    """Do what paged_decode does, in PyTorch: it gathers each sequence's blocks."""
    batch, num_heads, head_dim = query.shape
    block_size, num_kv_heads = layer_cache.shape[2:4]
    tables = block_tables[:, : cdiv(max_context_len, block_size)].long()
    keys, values = layer_cache[:, tables].flatten(2, 3).float()
    positions = torch.arange(keys.shape[1], device=query.device)
    visible = positions[None, :] < context_lens[:, None]
    grouped = query.view(batch, num_kv_heads, -1, head_dim).float()
    scores = torch.einsum("bhgd,bthd->bhgt", grouped, keys) * scale
    scores = scores.masked_fill(~visible[:, None, None, :], -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a row of context 0
    output = torch.einsum("bhgt,bthd->bhgd", weights, values)
    return output.reshape(batch, num_heads, head_dim).to(query.dtype)


def tile_tokens(head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the tokens of one tile: 16 KiB of keys on CUDA, 8 on XPU; at least 16, at most 128."""
    budget = 8192 if device.type == "xpu" else 16384
    tokens = budget // (next_power_of_2(head_dim) * dtype.itemsize)
    return max(16, min(128, tokens))


def choose_num_splits(
    num_pairs: int, max_context_len: int, block_tokens: int, num_units: int
) -> int:
    """Return how many spans each of `num_pairs` (sequence, KV head) pairs is cut into.

    It minimises a model of the time, in tiles: waves of two programs a unit, each its tiles and
    one of start-up; a second kernel costs three, and more with more spans to join. Host integers
    only, so a captured graph keeps its choice.
    """
    num_tiles = max(1, cdiv(max_context_len, block_tokens))
    slots = 2 * num_units

    def cost(splits: int) -> float:
        waves = cdiv(num_pairs * splits, slots)
        join = 0.0 if splits == 1 else 3.0 + splits / 16
        return waves * (cdiv(num_tiles, splits) + 1) + join

    return min((s for s in _SPLIT_CHOICES if s <= num_tiles), key=cost)


def _num_stages(device: torch.device) -> int:
    # the block table, the keys and the values follow each other: three stages hold one tile of keys
    # and values (32 KiB) in flight, five hold two, for the datacenter cards' shared memory
    if device.type != "cuda":
        return 2
    return 5 if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0)) else 3


@triton.jit
def _span_tokens(context, num_splits, BLOCK_TOKENS: tl.constexpr, FIXED_SPAN: tl.constexpr):
    # even spans of whole tiles over the sequence's real length, whatever the captured maximum
    if FIXED_SPAN > 0:
        span = context * 0 + FIXED_SPAN
    else:
        per_split = (context + num_splits - 1) // num_splits
        span = (per_split + BLOCK_TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    return span


@triton.jit
def _softmax_step(scores, maximum, total):
    # a tile's scores [R, T] in powers of two join a running softmax: its new maximum and total [R],
    # the tile's weights [R, T], and the factor [R] by which what was summed before shrinks
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    shrink = tl.exp2(maximum - new_maximum)
    weights = tl.exp2(scores - new_maximum[:, None])
    return new_maximum, total * shrink + tl.sum(weights, axis=1), weights, shrink


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def _span_kernel(
    query_ptr, cache_ptr, tables_ptr, lens_ptr, partial_ptr, logsumexp_ptr,
    scale_log2, num_splits, query_stride, query_head_stride, table_stride,
    cache_kv_stride, cache_block_stride, cache_token_stride, cache_head_stride,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, FIXED_SPAN: tl.constexpr,
    IS_WHOLE: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    kv_head, split = tl.program_id(0), tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    context = tl.load(lens_ptr + sequence).to(tl.int32)
    if IS_WHOLE:
        begin, end = context * 0, context
    else:
        span = _span_tokens(context, num_splits, BLOCK_TOKENS, FIXED_SPAN)
        begin = split * span
        end = tl.minimum(begin + span, context)
        if begin >= context:
            return
    member = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + member
    head_mask = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    query_offsets = head[:, None] * query_head_stride + dims[None, :]
    query = tl.load(query_ptr + sequence * query_stride + query_offsets, mask=head_mask, other=0.0)
    table = tables_ptr + sequence * table_stride
    keys_ptr = cache_ptr + kv_head.to(tl.int64) * cache_head_stride
    values_ptr = keys_ptr + cache_kv_stride
    maximum = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for tile in range(begin, end, BLOCK_TOKENS):
        tokens = tile + tl.arange(0, BLOCK_TOKENS)
        valid = tokens < end
        block = tl.load(table + tokens // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        rows = block * cache_block_stride + (tokens % BLOCK_SIZE) * cache_token_stride
        places = rows[:, None] + dims[None, :]
        mask = valid[:, None]
        if BLOCK_DIM != HEAD_DIM:
            mask = mask & (dims < HEAD_DIM)[None, :]
        keys = tl.load(keys_ptr + places, mask=mask, other=0.0)
        values = tl.load(values_ptr + places, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale_log2
        scores = tl.where(valid[None, :], scores, float("-inf"))
        maximum, total, weights, shrink = _softmax_step(scores, maximum, total)
        mixed = tl.dot(
            weights.to(values.dtype), values, mixed * shrink[:, None], input_precision=PRECISION
        )
    divisor = tl.where(total > 0, total, 1.0)
    result = mixed / divisor[:, None]
    out_row = sequence * (tl.num_programs(0) * GROUP) + head
    if IS_WHOLE:
        place = out_row[:, None] * HEAD_DIM + dims[None, :]
        tl.store(partial_ptr + place, result.to(partial_ptr.dtype.element_ty), mask=head_mask)
    else:
        out_row = out_row * num_splits + split
        tl.store(partial_ptr + out_row[:, None] * HEAD_DIM + dims[None, :], result, mask=head_mask)
        tl.store(logsumexp_ptr + out_row, maximum + tl.log2(divisor), mask=member < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def _join_kernel(
    partial_ptr,
    logsumexp_ptr,
    lens_ptr,
    output_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    FIXED_SPAN: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_inputs(OVERLAPS)
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    context = tl.load(lens_ptr + sequence).to(tl.int32)
    span = tl.maximum(_span_tokens(context, num_splits, BLOCK_TOKENS, FIXED_SPAN), 1)
    num_used = (context + span - 1) // span
    row = sequence * tl.num_programs(0) + head
    dims = tl.arange(0, BLOCK_DIM)
    in_head = dims < HEAD_DIM
    maximum = tl.max(tl.full([BLOCK_SPLITS], -1.0e30, tl.float32), axis=0)
    total = maximum * 0.0
    mixed = tl.zeros([BLOCK_DIM], tl.float32)
    # blocks of a fixed size: spans past num_used add exact zeros, so their number changes no bit
    for first in range(0, num_used, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        used = split < num_used
        place = row * num_splits + split
        logsumexp = tl.load(logsumexp_ptr + place, mask=used, other=float("-inf"))
        mask = used[:, None] & in_head[None, :]
        spans = tl.load(
            partial_ptr + place[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0
        )
        new_maximum = tl.maximum(maximum, tl.max(logsumexp, axis=0))
        shrink = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(logsumexp - new_maximum)
        total = total * shrink + tl.sum(weights, axis=0)
        mixed = mixed * shrink + tl.sum(spans * weights[:, None], axis=0)
        maximum = new_maximum
    result = mixed / tl.where(total > 0, total, 1.0)
    tl.store(
        output_ptr + row * HEAD_DIM + dims, result.to(output_ptr.dtype.element_ty), mask=in_head
    )
