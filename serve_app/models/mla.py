"""Multi-head latent attention over a paged cache of latents (DeepSeek-V2, 2405.04434, section 2.1).

The cache holds one vector per token and layer: the normalised latent c (kv_lora_rank values) and
one rotated key that all heads share. Head h's keys are [W_key·c, shared key], its values W_value·c.
Decode rows absorb both matrices: with q' = W_keyᵀ·q a row meets the latents as they lie, as one
key/value head, and W_value is applied once to their weighted mean. A longer chunk expands the
context into keys and values instead, which costs less per pair of query and key.

Shapes: T rows, H heads, R = kv_lora_rank, P rotary size, N and V sizes of a head's unrotated key
and of its value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from serve_app.models.attention import AttentionPlan, DecodeGroup, PrefillPart
from serve_app.models.kernels.latent_decode import latent_decode
from serve_app.models.layers import RMSNorm, apply_rotary
from serve_app.models.linear import Linear
from serve_app.models.sparse_config import LatentConfig

_ABSORBED_ROWS = 32
"""Chunks up to this length attend to the latents directly, on a CPU."""


class PerHead:
    """A `Kernel`: each head's columns times that head's own matrix, [T, H · I] → [T, H · O]."""

    __slots__ = ("nbytes", "weight")

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight`: [H, I, O]."""
        self.weight = weight
        self.nbytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H · I] → [T, H · O] in x's dtype."""
        heads = x.view(x.shape[0], self.weight.shape[0], -1).transpose(0, 1)
        out = torch.bmm(heads.to(self.weight.dtype), self.weight)
        return out.transpose(0, 1).reshape(x.shape[0], -1).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The attention of one layer.

    down: [hidden → query (or its low-rank form) + R + P] in one product. query_norm and query_up
    are None where queries are projected directly. key_up: [H, N, R] and value_up: [H, R, V], once
    as the absorbed layers' weights and once by themselves, for the expansion. Rotary rows are in
    half-split order.
    """

    shape: LatentConfig
    num_heads: int
    scale: float
    down: Linear
    query_norm: RMSNorm | None
    query_up: Linear | None
    latent_norm: RMSNorm
    absorb_key: Linear
    absorb_value: Linear
    key_up: torch.Tensor
    value_up: torch.Tensor
    output: Linear

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        plan: AttentionPlan,
        row_invariant: bool,
    ) -> torch.Tensor:
        """[T, hidden] → [T, hidden]; the rows' latents go to `cache` first.

        cos, sin: [T, 1, P] rows of `rotary_table`. cache: [1, num_blocks, block_size, 1, R + P].
        """
        query, latent = self._project(x, cos, sin, row_invariant)
        cache.view(-1, self.shape.cached_dim).index_copy_(0, slots, latent)
        out = self._attend(query, cache[0, :, :, 0], plan, row_invariant)
        return self.output(out, row_invariant)

    def _project(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, row_invariant: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden] → rotated queries [T, H, N + P] and what is cached [T, R + P]."""
        num_rows, shape = x.shape[0], self.shape
        joint = self.down(x, row_invariant)
        query, latent = joint.split((joint.shape[1] - shape.cached_dim, shape.cached_dim), dim=1)
        if self.query_norm is not None and self.query_up is not None:
            query = self.query_up(self.query_norm(query.contiguous()), row_invariant)
        query = query.reshape(num_rows, self.num_heads, -1)
        apply_rotary(query[..., shape.nope_head_dim :], cos, sin)
        mean, key = latent.split((shape.kv_lora_rank, shape.rope_head_dim), dim=1)
        apply_rotary(key[:, None], cos, sin)
        return query, torch.cat((self.latent_norm(mean.contiguous()), key), dim=1)

    def _attend(
        self, query: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan, row_invariant: bool
    ) -> torch.Tensor:
        """[T, H, N + P] over the cache [num_blocks, block_size, R + P] → [T, H · V].

        Rows that belong to neither a decode nor a chunk (padding) give zeros.
        """
        num_decodes = plan.num_decodes
        if num_decodes == plan.num_rows:
            return self._decode(query, cache, plan, row_invariant)
        out = query.new_zeros(query.shape[0], self.num_heads * self.shape.value_head_dim)
        if num_decodes:
            out[:num_decodes] = self._decode(query[:num_decodes], cache, plan, row_invariant)
        for part in plan.parts:
            rows = slice(part.chunk.start, part.chunk.start + part.chunk.length)
            context = cache[part.chunk.block_table].flatten(0, 1)[: part.chunk.context_len]
            is_short = part.chunk.length <= _ABSORBED_ROWS and cache.device.type == "cpu"
            attend = self._prefill_absorbed if is_short and part.mask is not None else self._prefill
            out[rows] = attend(query[rows], context, part)
        return out

    def _absorbed(self, query: torch.Tensor, row_invariant: bool) -> torch.Tensor:
        """[T, H, N + P] → queries that meet the cached vectors, [T, H, R + P]."""
        num_rows = query.shape[0]
        nope, rope = query.split((self.shape.nope_head_dim, self.shape.rope_head_dim), dim=2)
        absorbed = self.absorb_key(nope.reshape(num_rows, -1), row_invariant)
        return torch.cat((absorbed.view(num_rows, self.num_heads, -1), rope), dim=2)

    def _decode(
        self, query: torch.Tensor, cache: torch.Tensor, plan: AttentionPlan, row_invariant: bool
    ) -> torch.Tensor:
        """One row per sequence, [B, H, N + P] → [B, H · V]."""
        query = self._absorbed(query, row_invariant)
        rank = self.shape.kv_lora_rank
        if plan.paged is not None:
            mixed = latent_decode(
                query,
                cache,
                plan.paged.block_tables,
                plan.paged.context_lens,
                plan.paged.max_context_len,
                self.scale,
                latent_dim=rank,
                batch_invariant=plan.batch_invariant,
            )
        elif len(plan.groups) == 1 and plan.groups[0].rows is None:
            mixed = self._decode_group(query, cache, plan.groups[0])
        else:
            mixed = query.new_empty(*query.shape[:2], rank)
            for group in plan.groups:
                mixed[group.rows] = self._decode_group(query[group.rows], cache, group)
        return self.absorb_value(mixed.reshape(query.shape[0], -1), row_invariant)

    def _decode_group(
        self, query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup
    ) -> torch.Tensor:
        """[n, H, R + P] → weighted means of latents [n, H, R]; heads stand as query positions."""
        context = cache.index_select(0, group.blocks).view(group.num_rows, 1, -1, query.shape[2])
        mask = group.mask.expand(-1, -1, self.num_heads, -1)
        # Fused kernels want values as wide as keys, and the latents are a part of the keys.
        out = F.scaled_dot_product_attention(
            query[:, None], context, context, attn_mask=mask, scale=self.scale
        )
        return out[:, 0, :, : self.shape.kv_lora_rank]

    def _prefill_absorbed(
        self, query: torch.Tensor, context: torch.Tensor, part: PrefillPart
    ) -> torch.Tensor:
        """A short chunk [C, H, N + P] over context [S, R + P] → [C, H · V]."""
        absorbed = self._absorbed(query, False).transpose(0, 1)[None]
        shared = context[None, None].expand(1, self.num_heads, -1, -1)
        out = F.scaled_dot_product_attention(
            absorbed, shared, shared, attn_mask=part.mask, scale=self.scale
        )
        mixed = out[0, :, :, : self.shape.kv_lora_rank].transpose(0, 1)
        return self.absorb_value(mixed.reshape(query.shape[0], -1))

    def _prefill(
        self, query: torch.Tensor, context: torch.Tensor, part: PrefillPart
    ) -> torch.Tensor:
        """A chunk [C, H, N + P] over context [S, R + P], expanded → [C, H · V]."""
        shape, num_tokens = self.shape, context.shape[0]
        latent, key = context.split((shape.kv_lora_rank, shape.rope_head_dim), dim=1)
        latent = latent.to(self.key_up.dtype)
        keys = query.new_empty(self.num_heads, num_tokens, query.shape[2])
        keys[..., : shape.nope_head_dim] = torch.matmul(latent, self.key_up.transpose(1, 2))
        keys[..., shape.nope_head_dim :] = key
        values = torch.matmul(latent, self.value_up).to(query.dtype)
        # Fused kernels want values as wide as keys.
        missing = query.shape[2] - shape.value_head_dim
        values = F.pad(values, (0, missing)) if missing > 0 else values
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=part.mask,
            is_causal=part.mask is None,
            scale=self.scale,
        )
        return out[0, :, :, : shape.value_head_dim].transpose(0, 1).reshape(query.shape[0], -1)
