"""Whether a model fits a device: one `MemoryPlan`, and what would fit instead. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from serve_app.hardware.memory import (
    DTYPE_BYTES,
    RUNTIME_BYTES,
    ModelShape,
    activation_bytes,
    dense_copy_bytes,
    kv_bytes_per_token,
    weights_bytes,
)

BLOCK_TOKENS = 16
MIN_CONTEXT_TOKENS = 512
MIN_STEP_TOKENS = 256
FORMATS = ("dense", "int8", "int4")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One model on one device.

    `memory_bytes` is what may be used. KV takes `kv_cache_tokens`, or, when None, the share
    `kv_fraction` of what the weights leave. `num_batched_tokens` is the token budget of one step.
    `serves_packed`: kernels compiled there multiply by packed weights at any number of rows, so
    none has a dense copy; `maps_embedding`: tokens are also looked up in the file.
    """

    shape: ModelShape
    device: str
    memory_bytes: int
    weight_format: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    num_batched_tokens: int
    kv_fraction: float = 0.5
    kv_cache_tokens: int | None = None
    serves_packed: bool = False
    maps_embedding: bool = False

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights."""
        return weights_bytes(
            self.shape, self.weight_format, self.dtype, maps_embedding=self.maps_embedding
        )

    @property
    def dense_copy_bytes(self) -> int:
        """Bytes of the dense copy that quantized layers keep where memory is plenty."""
        if self.serves_packed:
            return 0
        return dense_copy_bytes(self.shape, self.weight_format, self.dtype, self.memory_bytes)

    @property
    def runtime_bytes(self) -> int:
        """Bytes that the device's runtime takes."""
        return RUNTIME_BYTES[self.device]

    @property
    def activations_bytes(self) -> int:
        """Peak bytes of one step beyond weights and KV."""
        return activation_bytes(
            self.shape,
            num_batched_tokens=self.num_batched_tokens,
            num_seqs=self.max_num_seqs,
            dtype=self.dtype,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        return kv_bytes_per_token(self.shape, self.dtype)

    @property
    def kv_tokens(self) -> int:
        """Tokens of the KV cache, in whole blocks; at most what all sequences can use."""
        useful = self.max_num_seqs * _whole_blocks_up(self.max_model_len)
        if self.kv_cache_tokens is not None:
            return min(useful, self.kv_cache_tokens // BLOCK_TOKENS * BLOCK_TOKENS)
        free_bytes = self.memory_bytes - self._fixed_bytes
        budget = int(max(0, free_bytes) * self.kv_fraction)
        tokens = budget // self.kv_bytes_per_token
        return min(useful, tokens // BLOCK_TOKENS * BLOCK_TOKENS)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def needed_bytes(self) -> int:
        """Everything together."""
        return self._fixed_bytes + self.activations_bytes + self.kv_bytes

    @property
    def _fixed_bytes(self) -> int:
        return self.weights_bytes + self.dense_copy_bytes + self.runtime_bytes

    @property
    def left_bytes(self) -> int:
        """What stays free; negative when the plan does not fit."""
        return self.memory_bytes - self.needed_bytes

    @property
    def num_full_sequences(self) -> int:
        """Sequences of `max_model_len` tokens that the KV cache holds at once."""
        return self.kv_tokens // _whole_blocks_up(self.max_model_len)

    @property
    def fits(self) -> bool:
        """Whether all of it fits and at least one sequence of full length can run."""
        return self.left_bytes >= 0 and self.num_full_sequences >= 1


def alternatives(plan: MemoryPlan) -> list[tuple[str, MemoryPlan]]:
    """Return changes of one or two settings with which the model fits, the mildest first.

    Each is (what to change, the plan that then fits); empty where only a larger device helps.
    """
    found: list[tuple[str, MemoryPlan]] = []
    for weight_format in FORMATS[FORMATS.index(plan.weight_format) :]:
        changed = replace(plan, weight_format=weight_format)
        words = [] if changed == plan else [f"--weights {weight_format}"]
        for more_words, candidate in _milder(changed):
            if candidate.fits and words + more_words:
                found.append((" ".join(words + more_words), candidate))
                break
    return found


def smallest_memory_bytes(plan: MemoryPlan) -> int:
    """Return the least memory in which these weights and one full sequence fit."""
    one_sequence = _whole_blocks_up(plan.max_model_len) * plan.kv_bytes_per_token
    return plan.weights_bytes + plan.runtime_bytes + plan.activations_bytes + one_sequence


def _milder(plan: MemoryPlan) -> Iterator[tuple[list[str], MemoryPlan]]:
    """Yield ever smaller versions of the plan with the same weights."""
    yield [], plan
    one_sequence = _whole_blocks_up(plan.max_model_len)
    yield (
        [f"--kv-cache-tokens {one_sequence}"],
        replace(plan, kv_cache_tokens=one_sequence),
    )
    small_step = replace(
        plan,
        num_batched_tokens=min(plan.num_batched_tokens, MIN_STEP_TOKENS),
        max_num_seqs=min(plan.max_num_seqs, 8),
    )
    step_words = [
        f"--max-num-batched-tokens {small_step.num_batched_tokens}",
        f"--max-num-seqs {small_step.max_num_seqs}",
    ]
    yield step_words, small_step
    length = plan.max_model_len // 2
    while length >= MIN_CONTEXT_TOKENS:
        length_words = [f"--max-model-len {length}"]
        yield length_words, replace(plan, max_model_len=length)
        yield [*length_words, *step_words], replace(small_step, max_model_len=length)
        length //= 2


def _whole_blocks_up(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def default_step_tokens(device: str) -> int:
    """Return the token budget that a plan assumes where the engine would measure its own."""
    return 256 if device == "cpu" else 2048


def default_dtype(device: str, has_fast_bfloat16: bool) -> str:
    """Return what `dtype: auto` means: bfloat16 where the device is fast at it, else float32."""
    dtype = "bfloat16" if device != "cpu" or has_fast_bfloat16 else "float32"
    assert dtype in DTYPE_BYTES
    return dtype
