"""How much memory there is, and the arithmetic of how much a model needs. No torch.

The sum of a plan::

    needed = weights + KV cache + activations + runtime

    weights      linear weights × bits of their format, embeddings × bits of the compute type, and
                 where it is small, a dense copy of quantized layers for large batches
    KV cache     tokens × 2 × layers × kv_heads × head_dim × bytes of the compute type; with latent
                 attention (MLA) tokens × layers × cached values × bytes
    activations  step rows × the widest moment of one layer, plus float32 logits of the sampled rows
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve_app.hardware.cpu import SYSTEM_ROOT, read_cgroup_limits

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one value of a compute type."""

GROUP_SIZE = 32
"""Weights that share one scale and one zero point in the group-wise formats, as in GGUF."""

# Bits per linear weight: the value, and its share of a 16-bit scale and a 16-bit zero per group.
FORMAT_BITS = {"int4": 4 + 32 / GROUP_SIZE, "int8": 8 + 32 / GROUP_SIZE}

DENSE_COPY_SHARE = 0.35
"""Largest share of the memory that a dense copy of quantized layers may take."""

RUNTIME_BYTES = {"cpu": 400 << 20, "xpu": 600 << 20, "cuda": 700 << 20}
"""What the runtime takes per process on each kind of device: libraries, context, workspace."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only network that memory depends on.

    `intermediate_size` is one expert's where `num_experts` > 0; `num_experts` counts the routed and
    shared experts of a layer, all of which are held. The first `num_dense_layers` have an MLP of
    `dense_intermediate_size` instead. With latent attention (MLA) `latent_dim` values are cached
    per token and layer, `head_dim` is a key's size, and `attention_params` counts a layer's
    attention weights.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    is_tied: bool = False
    num_experts: int = 0
    num_dense_layers: int = 0
    dense_intermediate_size: int = 0
    latent_dim: int = 0
    attention_params: int = 0

    @property
    def num_linear_params(self) -> int:
        """Weights of all linear layers but the vocabulary's and the experts' gates."""
        query = self.hidden_size * self.num_heads * self.head_dim
        key_value = 2 * self.hidden_size * self.num_kv_heads * self.head_dim
        attention = self.attention_params or 2 * query + key_value
        mlp = 3 * self.hidden_size * self.intermediate_size * max(1, self.num_experts)
        dense = 3 * self.hidden_size * self.dense_intermediate_size
        num_sparse = self.num_layers - self.num_dense_layers
        return self.num_layers * attention + num_sparse * mlp + self.num_dense_layers * dense

    @property
    def kv_values_per_token(self) -> int:
        """Values that a token keeps per layer."""
        return self.latent_dim or 2 * self.num_kv_heads * self.head_dim

    @property
    def num_embedding_params(self) -> int:
        """Weights of the input embedding; the output projection has as many when not tied."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All weights, norms and biases left out (under 0.1 %)."""
        return self.num_linear_params + self.num_embedding_params * (1 if self.is_tied else 2)


def weights_bytes(
    shape: ModelShape, weight_format: str, dtype: str, *, maps_embedding: bool = False
) -> int:
    """Return bytes of the weights in `weight_format` (dense, int8, int4) computed in `dtype`.

    The embedding is looked up and stays dense; the output projection is a matrix product and takes
    the format, from a copy of its own where it is tied and the format is not dense. With
    `maps_embedding` rows are looked up in the file, whose output rows have 8 bits as a rule.
    """
    dense_bits = 8 * DTYPE_BYTES[dtype]
    if weight_format == "dense":
        return shape.num_params * dense_bits // 8
    bits = FORMAT_BITS[weight_format]
    if maps_embedding:
        head_bits = max(bits, FORMAT_BITS["int8"])
        return int(shape.num_linear_params * bits + shape.num_embedding_params * head_bits) // 8
    quantized = shape.num_linear_params + shape.num_embedding_params
    return int(shape.num_embedding_params * dense_bits + quantized * bits) // 8


def dense_copy_bytes(shape: ModelShape, weight_format: str, dtype: str, memory_bytes: int) -> int:
    """Return bytes of the dense copy that quantized layers keep for large batches, 0 without one.

    The loader makes it where it takes at most `DENSE_COPY_SHARE` of the memory.
    """
    copy_bytes = shape.num_linear_params * DTYPE_BYTES[dtype]
    is_kept = weight_format != "dense" and copy_bytes <= DENSE_COPY_SHARE * memory_bytes
    return copy_bytes if is_kept else 0


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """Return bytes of keys and values that one token holds over all layers."""
    return shape.num_layers * shape.kv_values_per_token * DTYPE_BYTES[dtype]


def activation_bytes(
    shape: ModelShape, *, num_batched_tokens: int, num_seqs: int, dtype: str
) -> int:
    """Estimate the peak of one step: the widest moment of a layer, and the logits.

    Residual, normalised input, then either q, k, v and the attention output or gate, up and their
    product are alive at once for each of `num_batched_tokens` rows; logits are float32 for
    `num_seqs` rows, with two copies in the sampler.
    """
    attention = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    row = 2 * shape.hidden_size + max(attention, 3 * shape.intermediate_size)
    logits = 3 * num_seqs * shape.vocab_size * DTYPE_BYTES["float32"]
    return num_batched_tokens * row * DTYPE_BYTES[dtype] + logits


def total_memory_bytes(root: Path = SYSTEM_ROOT) -> int:
    """Return the machine's memory, or this process's cgroup limit where that is less."""
    total = _meminfo(root).get("MemTotal", 0)
    limit = read_cgroup_limits(root).memory_bytes
    return total if limit is None else min(total or limit, limit)


def available_memory_bytes(root: Path = SYSTEM_ROOT) -> int:
    """Return what can be allocated now without swapping, held to the cgroup's limit."""
    available = _meminfo(root).get("MemAvailable", 0)
    limits = read_cgroup_limits(root)
    if limits.memory_bytes is None:
        return available
    left = max(0, limits.memory_bytes - (limits.memory_used_bytes or 0))
    return min(available or left, left)


def _meminfo(root: Path) -> dict[str, int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key: int(value.split()[0]) * 1024 for key, _, value in pairs if value.split()}
