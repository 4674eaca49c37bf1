"""Decoders with experts: DeepSeek-V2 and V3 over latent attention, Qwen2-MoE and Qwen3-MoE.

The frame (embedding, residuals, head, batch invariance) is the Llama family's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from serve_app.models.attention import AttentionPlan
from serve_app.models.interface import KVCacheSpec
from serve_app.models.layers import RMSNorm
from serve_app.models.linear import Linear
from serve_app.models.llama import LlamaNetwork
from serve_app.models.mla import LatentAttention
from serve_app.models.moe import FeedForward, MixtureOfExperts


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """A layer of `LlamaNetwork` whose MLP may be a mixture of experts."""

    input_norm: RMSNorm
    qkv: Linear
    output: Linear
    mlp_norm: RMSNorm
    mlp: FeedForward | MixtureOfExperts
    query_norm: RMSNorm | None = None
    key_norm: RMSNorm | None = None
    joins_chunks: ClassVar[bool] = False
    packed_rows: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class LatentLayer:
    """A layer of `DeepseekNetwork`."""

    input_norm: RMSNorm
    attention: LatentAttention
    mlp_norm: RMSNorm
    mlp: FeedForward | MixtureOfExperts
    joins_chunks: ClassVar[bool] = False
    packed_rows: ClassVar[int] = 0


class DeepseekNetwork(LlamaNetwork):
    """A `CausalLM` with latent attention, whose cache holds one latent per token and layer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """As `LlamaNetwork`, with layers of `LatentLayer`."""
        super().__init__(*args, **options)
        latent = self.config.latent
        assert latent is not None, "a network without latents is a LlamaNetwork"
        self.kv_spec = KVCacheSpec(
            self.config.num_layers, 1, latent.cached_dim, self.dtype, is_latent=True
        )

    def _attention(
        self,
        layer: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        plan: AttentionPlan,
        row_invariant: bool,
    ) -> torch.Tensor:
        """[T, hidden] → [T, hidden]; writes the rows' latents into `cache` first."""
        return layer.attention(x, cos[:, None], sin[:, None], cache, slots, plan, row_invariant)
