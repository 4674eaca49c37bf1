"""Attention of one decode row per sequence over paged latents (MLA with absorbed weights).

As `paged_decode`, with one key/value head whose values are the first columns of its keys: a tile of
latents is read once and serves as both, for a block of query heads.
"""

import math

import torch

from serve_app.models.kernels._triton import (
    cdiv,
    has_kernel,
    next_power_of_2,
    num_compute_units,
    tl,
    triton,
)
from serve_app.models.kernels.paged_decode import (
    INVARIANT_SPAN_TOKENS,
    _join_kernel,
    _softmax_step,
    _span_tokens,
    choose_num_splits,
)

_BLOCK_HEADS = 16
_BLOCK_TOKENS = 32
_JOIN_BLOCK = 16
_LOG2_E = 1.4426950408889634


def latent_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    scale: float,
    *,
    latent_dim: int,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Return weighted means of latents, [B, H, latent_dim] in query's dtype.

    query: [B, H, D]; cache: [num_blocks, block_size, D], whose first `latent_dim` columns are the
    values; block_tables: integers [B, W]; context_lens: integers [B], the row's own token included,
    each ≤ max_context_len ≤ W · block_size. A row of context 0 gives zeros. batch_invariant: spans
    of a fixed number of tokens, so that a row's bits don't depend on the rest of the batch.
    """
    if not has_kernel("paged_decode", query):
        return latent_decode_torch(
            query, cache, block_tables, context_lens, max_context_len, scale, latent_dim=latent_dim
        )
    batch, num_heads, width = query.shape
    output = torch.empty((batch, num_heads, latent_dim), dtype=query.dtype, device=query.device)
    if batch == 0:
        return output
    head_blocks = cdiv(num_heads, _BLOCK_HEADS)
    if batch_invariant:
        num_splits = max(1, cdiv(max_context_len, INVARIANT_SPAN_TOKENS))
    else:
        units = num_compute_units(query.device)
        num_splits = choose_num_splits(batch * head_blocks, max_context_len, _BLOCK_TOKENS, units)
    shape = (batch, num_heads, num_splits)
    partial = torch.empty((*shape, latent_dim), dtype=torch.float32, device=query.device)
    logsumexp = torch.empty(shape, dtype=torch.float32, device=query.device)
    fixed_span = INVARIANT_SPAN_TOKENS if batch_invariant else 0
    query = query.contiguous()
    _latent_span_kernel[(head_blocks, num_splits, batch)](
        query, cache, block_tables, context_lens, partial, logsumexp,
        scale * _LOG2_E, num_splits, block_tables.stride(0), cache.stride(0), cache.stride(1),
        NUM_HEADS=num_heads, BLOCK_HEADS=_BLOCK_HEADS,
        LATENT=latent_dim, BLOCK_LATENT=max(16, next_power_of_2(latent_dim)),
        ROPE=width - latent_dim, BLOCK_ROPE=max(16, next_power_of_2(width - latent_dim)),
        BLOCK_SIZE=cache.shape[1], BLOCK_TOKENS=_BLOCK_TOKENS, FIXED_SPAN=fixed_span,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=2 if query.dtype != torch.float32 else 1,
    )  # fmt: skip
    _join_kernel[(num_heads, batch)](
        partial, logsumexp, context_lens, output, num_splits,
        HEAD_DIM=latent_dim, BLOCK_DIM=next_power_of_2(latent_dim), BLOCK_TOKENS=_BLOCK_TOKENS,
        FIXED_SPAN=fixed_span, BLOCK_SPLITS=_JOIN_BLOCK, OVERLAPS=False, num_warps=4,
    )  # fmt: skip
    return output


def latent_decode_torch(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    scale: float,
    *,
    latent_dim: int,
) -> torch.Tensor:
    """Do what latent_decode does, in PyTorch: it gathers each sequence's blocks."""
    tables = block_tables[:, : cdiv(max_context_len, cache.shape[1])].long()
    context = cache[tables].flatten(1, 2).float()
    positions = torch.arange(context.shape[1], device=query.device)
    hidden = positions[None, :] >= context_lens[:, None]
    scores = torch.einsum("bhd,btd->bht", query.float(), context) * scale
    scores = scores.masked_fill(hidden[:, None, :], -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a row of context 0
    context = context[..., :latent_dim].masked_fill(hidden[..., None], 0.0)
    return torch.einsum("bht,btd->bhd", weights, context).to(query.dtype)


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def _latent_span_kernel(
    query_ptr, cache_ptr, tables_ptr, lens_ptr, partial_ptr, logsumexp_ptr,
    scale_log2, num_splits, table_stride, cache_block_stride, cache_token_stride,
    NUM_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, LATENT: tl.constexpr,
    BLOCK_LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, FIXED_SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    context = tl.load(lens_ptr + sequence).to(tl.int32)
    span = _span_tokens(context, num_splits, BLOCK_TOKENS, FIXED_SPAN)
    begin = split * span
    end = tl.minimum(begin + span, context)
    if begin >= context:
        return
    head = tl.program_id(0) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    in_heads = head < NUM_HEADS
    dims, turns = tl.arange(0, BLOCK_LATENT), tl.arange(0, BLOCK_ROPE)
    in_latent, in_rope = dims < LATENT, turns < ROPE
    row = sequence * NUM_HEADS + head
    query_row = query_ptr + row[:, None] * (LATENT + ROPE)
    query_mask = in_heads[:, None] & in_latent[None, :]
    query = tl.load(query_row + dims[None, :], mask=query_mask, other=0.0)
    turned = tl.load(
        query_row + LATENT + turns[None, :], mask=in_heads[:, None] & in_rope[None, :], other=0.0
    )
    table = tables_ptr + sequence * table_stride
    maximum = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    mixed = tl.zeros([BLOCK_HEADS, BLOCK_LATENT], tl.float32)
    for tile in range(begin, end, BLOCK_TOKENS):
        tokens = tile + tl.arange(0, BLOCK_TOKENS)
        valid = tokens < end
        block = tl.load(table + tokens // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        entry = cache_ptr + block * cache_block_stride + (tokens % BLOCK_SIZE) * cache_token_stride
        mask = valid[:, None] & in_latent[None, :]
        latents = tl.load(entry[:, None] + dims[None, :], mask=mask, other=0.0)
        mask = valid[:, None] & in_rope[None, :]
        keys = tl.load(entry[:, None] + LATENT + turns[None, :], mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(latents), input_precision=PRECISION)
        scores = tl.dot(turned, tl.trans(keys), scores, input_precision=PRECISION) * scale_log2
        scores = tl.where(valid[None, :], scores, float("-inf"))
        maximum, total, weights, shrink = _softmax_step(scores, maximum, total)
        mixed = tl.dot(
            weights.to(latents.dtype), latents, mixed * shrink[:, None], input_precision=PRECISION
        )
    divisor = tl.where(total > 0, total, 1.0)
    place = row * num_splits + split
    target = partial_ptr + place[:, None] * LATENT + dims[None, :]
    tl.store(target, mixed / divisor[:, None], mask=query_mask)
    tl.store(logsumexp_ptr + place, maximum + tl.log2(divisor), mask=in_heads)
