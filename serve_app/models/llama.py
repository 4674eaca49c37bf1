"""The dense decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3) over a paged KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from serve_app.models.attention import AttentionPlan, attend, plan_attention
from serve_app.models.config import NetworkConfig
from serve_app.models.cpu_step import CpuDecodeStep
from serve_app.models.head import OutputHead
from serve_app.models.interface import AttentionMetadata, KVCacheSpec, PrefillChunk
from serve_app.models.kernels._triton import has_kernel
from serve_app.models.kernels.cpu import CpuKernels, cpu_kernels
from serve_app.models.kernels.cpu_packed import EXACT_ROWS
from serve_app.models.kernels.rope import rope_and_cache
from serve_app.models.layers import (
    RMSNorm,
    apply_rotary,
    row_invariant_silu_and_mul,
    silu_and_mul,
)
from serve_app.models.linear import Linear, Reduce, RowParallelLinear
from serve_app.models.token_embedding import TokenEmbedding

Rows = torch.Tensor | slice
"""Rows of a step: int64 [n], or a range of them."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer. `query_norm` and `key_norm` are Qwen3's."""

    input_norm: RMSNorm
    qkv: Linear
    output: Linear | RowParallelLinear
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear | RowParallelLinear
    query_norm: RMSNorm | None = None
    key_norm: RMSNorm | None = None

    @property
    def joins_chunks(self) -> bool:
        """Whether chunks computed together have the bits that each has alone (`Linear`)."""
        return all(isinstance(each, Linear) and each.has_two_widths for each in self._products)

    @property
    def packed_rows(self) -> int:
        """How many decode rows packed kernels multiply by all of the weights; 0: not all do."""
        norms = (self.input_norm, self.mlp_norm)
        if any(norm.dtype is not norm.weight.dtype for norm in norms):
            return 0
        return min(x.packed_rows if isinstance(x, Linear) else 0 for x in self._products)

    @property
    def _products(self) -> tuple[Linear | RowParallelLinear, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    def mlp(self, x: torch.Tensor, row_invariant: bool) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        x = self.gate_up(x, row_invariant)
        x = row_invariant_silu_and_mul(x) if row_invariant else silu_and_mul(x)
        return self.down(x, row_invariant)


class LlamaNetwork:
    """A `CausalLM`. Not for several threads at once.

    Built for `batch_invariant`, a forward pass whose metadata asks for it computes each prefill
    chunk by itself and the decode rows with kernels that treat every row alike; chunks go together
    where all of a layer's kernels give them the same bits.
    """

    def __init__(
        self,
        config: NetworkConfig,
        embedding: TokenEmbedding,
        layers: Sequence[DecoderLayer],
        final_norm: RMSNorm,
        head: OutputHead,
        rotary: tuple[torch.Tensor, torch.Tensor],
        batch_invariant: bool = False,
    ) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_position = config.max_position
        self.device = final_norm.weight.device
        self.dtype = final_norm.weight.dtype
        self.kv_spec = KVCacheSpec(
            config.num_layers, config.num_kv_heads, config.head_dim, self.dtype
        )
        self.batch_invariant = batch_invariant
        self._embedding = embedding
        self._layers = tuple(layers)
        self._final_norm = final_norm
        self._head = head
        self._cos, self._sin = rotary
        self._has_rope_kernel = has_kernel("rope", self._cos)
        self._cpu = cpu_kernels(self._cos) if CpuKernels.takes_heads(config.head_dim) else None
        self._joins_chunks = self._cpu is not None and all(x.joins_chunks for x in self._layers)
        self._max_step_rows = self._count_step_rows()
        self._step: CpuDecodeStep | None = None

    def reduce_over_ranks(self, reduce: Reduce) -> None:
        """Sum what the layers' parts yield over all ranks: this network holds one rank's shard."""
        self._layers = tuple(
            replace(
                layer,
                output=RowParallelLinear(layer.output, reduce),
                down=RowParallelLinear(layer.down, reduce),
            )
            for layer in self._layers
        )
        self._joins_chunks = False
        self._max_step_rows = 0

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> torch.Tensor:
        """Return zeros [L, 2, num_blocks, block_size, Hkv, D]; block 0 is scratch."""
        spec = self.kv_spec
        entry = (spec.num_kv_heads, spec.head_dim)
        shape = (spec.num_layers, spec.num_planes, num_blocks, block_size, *entry)
        return torch.zeros(shape, dtype=spec.dtype, device=self.device)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """int64 [T], int64 [T] → hidden states [T, hidden] after the final norm; writes K/V."""
        if not metadata.batch_invariant:
            return self._run(input_ids, positions, kv_cache, metadata, row_invariant=False)
        assert self.batch_invariant, "the network was not loaded with batch_invariant"
        if not metadata.prefill_chunks:
            return self._run(input_ids, positions, kv_cache, metadata, row_invariant=True)
        shape = (input_ids.shape[0], self.config.hidden_size)
        hidden = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for rows, own, row_invariant in self._passes(metadata):
            hidden[rows] = self._run(input_ids[rows], positions[rows], kv_cache, own, row_invariant)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] → float32 logits [S, vocab]."""
        return self._head(hidden, self.batch_invariant)

    def _passes(
        self, metadata: AttentionMetadata
    ) -> Iterator[tuple[Rows, AttentionMetadata, bool]]:
        """The passes of a batch-invariant step: rows, what they attend by, `row_invariant`.

        Decode rows go alone, and each chunk; joined, the short chunks go with the decode rows,
        whose kernels have the same bits, and the long ones together.
        """
        chunks = metadata.prefill_chunks
        if self._joins_chunks:
            short = tuple(chunk for chunk in chunks if chunk.length <= EXACT_ROWS)
            long = tuple(chunk for chunk in chunks if chunk.length > EXACT_ROWS)
            if metadata.num_decodes or short:
                yield *_part(metadata, metadata.num_decodes, short), True
            if long:
                yield *_part(metadata, 0, long), False
            return
        if metadata.num_decodes:
            yield *_part(metadata, metadata.num_decodes, ()), True
        for chunk in chunks:
            yield *_part(metadata, 0, (chunk,)), False

    def _run(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        row_invariant: bool,
    ) -> torch.Tensor:
        cos = self._cos.index_select(0, positions)
        sin = self._sin.index_select(0, positions)
        x = self._embedding(input_ids)
        if metadata.num_decodes == x.shape[0] <= self._max_step_rows and CpuDecodeStep.is_on:
            return self._decode_step(kv_cache).run(x, cos, sin, metadata)
        plan = plan_attention(metadata, self.dtype, self.config.head_dim)
        residual = None
        slots = metadata.slot_mapping
        for layer, cache in zip(self._layers, kv_cache, strict=True):
            x, residual = layer.input_norm.add(x, residual)
            x = self._attention(layer, x, cos, sin, cache, slots, plan, row_invariant)
            x, residual = layer.mlp_norm.add(x, residual)
            x = layer.mlp(x, row_invariant)
        return self._final_norm.add(x, residual)[0]

    def _count_step_rows(self) -> int:
        """How many decode rows `CpuDecodeStep` takes at most; 0: it does not take the network."""
        if self._cpu is None or not CpuDecodeStep.takes(self.config):
            return 0
        return min((layer.packed_rows for layer in self._layers), default=0)

    def _decode_step(self, kv_cache: torch.Tensor) -> CpuDecodeStep:
        if self._step is None or not self._step.fits(kv_cache):
            layers, rows = self._layers, self._max_step_rows
            self._step = CpuDecodeStep(self.config, layers, self._final_norm, kv_cache, rows)
        return self._step

    def _attention(
        self,
        layer: DecoderLayer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        plan: AttentionPlan,
        row_invariant: bool,
    ) -> torch.Tensor:
        """[T, hidden] → [T, hidden]; writes the rows' keys and values into `cache` first."""
        qkv = layer.qkv(x, row_invariant)
        if self._has_rope_kernel:
            half = self.config.head_dim // 2
            # The table's sine carries the half-split form's sign in its first half.
            query = rope_and_cache(
                qkv,
                cos[:, :half],
                sin[:, half:],
                slots,
                cache,
                self.config.num_heads,
                q_weight=layer.query_norm.weight if layer.query_norm else None,
                k_weight=layer.key_norm.weight if layer.key_norm else None,
                eps=self.config.rms_eps,
            )
        elif self._cpu is not None:
            query = self._cpu.rotate_and_cache(
                qkv,
                cos,
                sin,
                slots,
                cache,
                self.config.num_heads,
                query_weight=layer.query_norm.wide_weight if layer.query_norm else None,
                key_weight=layer.key_norm.wide_weight if layer.key_norm else None,
                eps=self.config.rms_eps,
            )
        else:
            query = self._rotate_and_cache(layer, qkv, cos[:, None], sin[:, None], cache, slots)
        out = attend(query, cache, plan)
        return layer.output(out.reshape(x.shape[0], -1), row_invariant)

    def _rotate_and_cache(
        self,
        layer: DecoderLayer,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """[T, (Hq + 2 Hkv) * D] → rotated queries [T, Hq, D], a view; K and V go to `cache`."""
        num_rows, num_heads = qkv.shape[0], self.config.num_heads
        num_rotated = num_heads + self.config.num_kv_heads
        heads = qkv.view(num_rows, -1, self.config.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            heads[:, :num_heads] = layer.query_norm(heads[:, :num_heads])
            heads[:, num_heads:num_rotated] = layer.key_norm(heads[:, num_heads:num_rotated])
        apply_rotary(heads[:, :num_rotated], cos, sin)
        # Keys and values lie side by side: [T, 2, Hkv * D] → [2, T, Hkv * D], one copy for both.
        new = heads[:, num_heads:].reshape(num_rows, 2, -1).transpose(0, 1)
        cache.view(2, -1, new.shape[2]).index_copy_(1, slots, new)
        return heads[:, :num_heads]


def _part(
    metadata: AttentionMetadata, num_decodes: int, chunks: tuple[PrefillChunk, ...]
) -> tuple[Rows, AttentionMetadata]:
    """The first `num_decodes` rows and those of `chunks`, and what they attend by."""
    numbers, moved = list(range(num_decodes)), []
    for chunk in chunks:
        moved.append(replace(chunk, start=len(numbers)))
        numbers += range(chunk.start, chunk.start + chunk.length)
    rows: Rows = slice(numbers[0], numbers[-1] + 1)
    if len(numbers) <= numbers[-1] - numbers[0]:  # others lie between
        rows = torch.tensor(numbers, device=metadata.slot_mapping.device)
    own = replace(
        metadata,
        num_decodes=num_decodes,
        slot_mapping=metadata.slot_mapping[rows],
        prefill_chunks=tuple(moved),
    )
    return rows, own
