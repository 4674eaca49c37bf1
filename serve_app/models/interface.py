"""What the engine's ModelRunner asks of a network, and what it hands to it.

One forward pass takes the rows of a step, flattened: first one row per decoding sequence, then the
rows of each prefill chunk. Shapes use T rows in all, B decode rows, S rows that need logits,
L layers, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Shape of a layer's KV cache, the same for each layer.

    `is_latent`: one vector of `head_dim` per token stands for keys and values (MLA), with one head.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    is_latent: bool = False

    @property
    def num_planes(self) -> int:
        """2: keys and values; 1: latents."""
        return 1 if self.is_latent else 2

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        values = self.num_planes * self.num_kv_heads * self.head_dim
        return self.num_layers * values * self.dtype.itemsize


@dataclass(slots=True)
class PrefillChunk:
    """One sequence's chunk in a step: rows [start, start + length) of the flattened batch.

    `context_len` counts the sequence's tokens after this chunk (= positions end). `block_table` is
    int64 [ceil(context_len / block_size)] on the device.
    """

    start: int
    length: int
    context_len: int
    block_table: torch.Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where each row's K/V goes and what it may see.

    slot_mapping: int64 [T], block * block_size + offset; block 0 is scratch, for padding rows.
    decode_block_tables: int64 [B, W] padded with 0; decode_context_lens: int64 [B], the row itself
    included. `max_decode_context_len` is a host int ≥ max of those (fixed when captured).
    """

    num_decodes: int
    slot_mapping: torch.Tensor
    decode_block_tables: torch.Tensor
    decode_context_lens: torch.Tensor
    max_decode_context_len: int
    prefill_chunks: tuple[PrefillChunk, ...] = ()
    block_size: int = 16
    batch_invariant: bool = False


class CausalLM(Protocol):
    """A decoder-only network with a paged KV cache."""

    vocab_size: int
    max_position: int
    kv_spec: KVCacheSpec
    device: torch.device

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> torch.Tensor:
        """Return the cache, [L, 2, num_blocks, block_size, Hkv, D]; block 0 is scratch.

        A latent cache (`kv_spec.is_latent`) has 1 instead of 2.
        """
        ...

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """int64 [T], int64 [T] → hidden [T, hidden] after the final norm; writes K/V."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] → float32 logits [S, vocab]."""
        ...


class Product(Protocol):
    """A multiplication by a weight."""

    def read_bytes(self, num_rows: int) -> int:
        """Bytes of the weight that a product of `num_rows` rows reads."""
        ...


@dataclass(slots=True)
class LoadedModel:
    """A network with facts that the loader knows."""

    network: CausalLM
    name: str
    architecture: str
    dtype: torch.dtype
    weights_bytes: int
    weight_format: str
    eos_token_ids: tuple[int, ...]
    products: tuple[Product, ...] = ()

    def read_bytes(self, num_rows: int) -> int:
        """Bytes of weights that a step of `num_rows` rows reads; all of them where it is unknown.

        Of a mixture of experts the experts' weights count as `products` holds them.
        """
        if not self.products:
            return self.weights_bytes
        return sum(product.read_bytes(num_rows) for product in self.products)
