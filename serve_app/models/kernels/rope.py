"""Rotary embedding of q and k inside the packed qkv, and the write of k and v to the paged cache.

Rotary in the half-split order (RoFormer, 2104.09864): with x = (a, b), rotated is
(a·cos − b·sin, b·cos + a·sin). Qwen3's RMSNorm of q and k comes before it.
"""

import torch

from serve_app.models.kernels._triton import (
    cdiv,
    has_kernel,
    next_power_of_2,
    overlap_options,
    tl,
    triton,
    wait_for_inputs,
)

_HEADS_PER_PROGRAM = 4


def rope_and_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    layer_cache: torch.Tensor,
    num_heads: int,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return the rotated q, [T, Hq, D] in qkv's dtype; k and v go to `layer_cache`.

    qkv: [T, (Hq + 2 Hkv) · D]; cos, sin: float32 [T, D/2], rows of the tables, last dimension
    dense; slot_mapping: integers [T], block · block_size + offset; layer_cache:
    [2, num_blocks, block_size, Hkv, D]; q_weight, k_weight: [D], both or none.
    """
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together")
    if not has_kernel("rope", qkv):
        return rope_and_cache_torch(
            qkv, cos, sin, slot_mapping, layer_cache, num_heads,
            q_weight=q_weight, k_weight=k_weight, eps=eps,
        )  # fmt: skip
    num_rows = qkv.shape[0]
    block_size, num_kv_heads, head_dim = layer_cache.shape[2:]
    query = torch.empty((num_rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_rows == 0:
        return query
    grid = (num_rows, cdiv(num_heads + 2 * num_kv_heads, _HEADS_PER_PROGRAM))
    _rope_kernel[grid](
        qkv, cos, sin, slot_mapping, layer_cache, query,
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        eps, qkv.stride(0), cos.stride(0), sin.stride(0), *layer_cache.stride()[:4],
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=block_size,
        HALF=head_dim // 2, BLOCK_HALF=next_power_of_2(head_dim // 2),
        HEADS=_HEADS_PER_PROGRAM, HAS_NORM=q_weight is not None, num_warps=2,
        **overlap_options(qkv),
    )  # fmt: skip
    return query


def rope_and_cache_torch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    layer_cache: torch.Tensor,
    num_heads: int,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Do what rope_and_cache does, in PyTorch."""
    num_kv_heads, head_dim = layer_cache.shape[3:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None and k_weight is not None:
        query, key = _head_norm(query, q_weight, eps), _head_norm(key, k_weight, eps)
    blocks = torch.div(slot_mapping, layer_cache.shape[2], rounding_mode="floor")
    offsets = slot_mapping % layer_cache.shape[2]
    layer_cache[0].index_put_((blocks, offsets), _rotate(key, cos, sin))
    layer_cache[1].index_put_((blocks, offsets), value)
    return _rotate(query, cos, sin)


def _head_norm(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = heads.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return scaled.to(heads.dtype) * weight


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(heads.dtype)


@triton.jit
def _weighted(scaled, dtype: tl.constexpr, q_weight_ptr, k_weight_ptr, columns, mask, is_query):
    # rounded before and after the weight, as the network's own RMSNorm rounds
    q_weight = tl.load(q_weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.where(is_query, q_weight[None, :], k_weight[None, :])
    return (scaled.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def _head_offsets(
    head, kv_stride, head_stride, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr
):
    # where a token's key or value heads lie in the cache; heads of the query come before them
    kv = (head >= NUM_HEADS + NUM_KV_HEADS).to(tl.int64)
    return kv * kv_stride + (head - NUM_HEADS - kv * NUM_KV_HEADS) * head_stride


@triton.jit
def _rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, cache_ptr, query_ptr, q_weight_ptr, k_weight_ptr,
    eps, qkv_stride, cos_stride, sin_stride,
    cache_kv_stride, cache_block_stride, cache_token_stride, cache_head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr, HAS_NORM: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_half[None, :]
    is_query = (head < NUM_HEADS)[:, None]
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    source = qkv_ptr + row * qkv_stride + head[:, None] * (2 * HALF) + columns[None, :]
    wait_for_inputs(OVERLAPS)
    raw_first = tl.load(source, mask=mask, other=0.0)
    raw_second = tl.load(source + HALF, mask=mask, other=0.0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if HAS_NORM:
        dtype: tl.constexpr = raw_first.dtype
        mean = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        inverse = (1.0 / tl.sqrt(mean + eps))[:, None]
        first = _weighted(
            first * inverse, dtype, q_weight_ptr, k_weight_ptr, columns, in_half, is_query
        )
        second = _weighted(
            second * inverse, dtype, q_weight_ptr, k_weight_ptr, HALF + columns, in_half, is_query
        )
    cos = tl.load(cos_ptr + row * cos_stride + columns, mask=in_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row * sin_stride + columns, mask=in_half, other=0.0)[None, :]
    rotated_first = (first * cos - second * sin).to(raw_first.dtype)
    rotated_second = (second * cos + first * sin).to(raw_first.dtype)
    rotated_first = tl.where(is_value, raw_first, rotated_first)
    rotated_second = tl.where(is_value, raw_second, rotated_second)
    target = query_ptr + (row * NUM_HEADS + head)[:, None] * (2 * HALF) + columns[None, :]
    tl.store(target, rotated_first, mask=mask & is_query)
    tl.store(target + HALF, rotated_second, mask=mask & is_query)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    place = slot // BLOCK_SIZE * cache_block_stride + slot % BLOCK_SIZE * cache_token_stride
    place += _head_offsets(head, cache_kv_stride, cache_head_stride, NUM_HEADS, NUM_KV_HEADS)
    target = cache_ptr + place[:, None] + columns[None, :]
    tl.store(target, rotated_first, mask=mask & (head >= NUM_HEADS)[:, None])
    tl.store(target + HALF, rotated_second, mask=mask & (head >= NUM_HEADS)[:, None])
