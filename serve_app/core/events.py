"""What an engine tells: token events, capabilities, limits and statistics, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from serve_app.core.errors import ErrorInfo


class FinishReason(StrEnum):
    """Why a sequence ended. Exactly one terminal event per sequence carries one of these."""

    STOP = "stop"  # a stop token id (or, above the engine, a stop string)
    LENGTH = "length"  # max_tokens or the context's end
    ABORTED = "aborted"  # told to; nobody listens any more
    ERROR = "error"  # the engine failed; `error` says how


class BatchingMode(StrEnum):
    """How sequences share the device: joining at any step, only as a whole batch, or one by one."""

    CONTINUOUS = "continuous"
    STATIC = "static"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token, and of the most likely ones at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one engine step did for one request.

    `new_token_ids` may be empty on a terminal event. `stop_token_id` is the id that stopped it.
    `prompt_logprobs` comes once, with the first event: an entry per prompt token, None for the
    first.
    `num_cached_tokens` (prefix-cache hits) is meaningful on the first event, and only that one has
    `queue_time_s`: seconds from submission until it ran; None where the engine cannot tell.
    `embedding`, on the one event of an embedding: the vector, float32, little-endian.
    """

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    error: ErrorInfo | None = None
    embedding: bytes | None = None
    queue_time_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """What an engine can do; needing what is False here is an `unsupported_parameter`.

    generation: it yields tokens. embeddings: it yields vectors. tools: its text can hold tool calls
    (whether the model writes any is its card's `tool_syntax`).
    """

    logprobs: bool = True
    top_logprobs: bool = True
    prompt_logprobs: bool = True
    logit_bias: bool = True
    penalties: bool = True
    min_p: bool = True
    seed: bool = True
    min_tokens: bool = True
    cache_salt: bool = True
    batching_modes: tuple[str, ...] = ("continuous", "static", "off")
    batch_invariant: bool = False
    structured_output: bool = False
    thinking_budget: bool = False
    generation: bool = True
    embeddings: bool = False
    tools: bool = True


BASIC_CAPABILITIES = EngineCapabilities(
    logprobs=False,
    top_logprobs=False,
    prompt_logprobs=False,
    logit_bias=False,
    penalties=False,
    min_p=False,
    seed=False,
    min_tokens=False,
    cache_salt=False,
)
"""What every engine that generates can do: temperature, top-k and top-p, and no more."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about a started engine: who it is, its real limits and its start-up times (seconds).

    engine_reason: why it is this engine, in words that go on from "because".
    """

    engine: str
    model: str
    device: str
    device_name: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    capabilities: EngineCapabilities = EngineCapabilities()
    startup_s: dict[str, float] = field(default_factory=dict)
    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    details: dict[str, str] = field(default_factory=dict)
    engine_reason: str = ""


@dataclass(frozen=True, slots=True)
class BatchingOptions:
    """The batching toggles that change at run time; None leaves a value as it is."""

    mode: BatchingMode = BatchingMode.CONTINUOUS
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters (since start) and gauges of an engine.

    Gauges: num_running, num_waiting and the blocks: free + cached + used == num_blocks (cached:
    content kept for prefix hits, reclaimable; used: held by a live sequence).
    Counters: everything ending in _total; num_joins_total counts sequences that joined a batch
    which was already decoding, num_cache_releases_total times that the allocator's unused memory
    was given back under pressure, num_shed_total sequences ended for lack of device memory.
    Speculative decoding: num_drafts_total drafts, their tokens and the tokens of them that held.
    bandwidth_limit_bytes: what a large copy within the device moves a second, read and written.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_used_blocks: int = 0
    max_num_running: int = 0
    num_steps_total: int = 0
    num_prompt_tokens_total: int = 0
    num_generation_tokens_total: int = 0
    num_scheduled_tokens_total: int = 0
    num_preemptions_total: int = 0
    num_joins_total: int = 0
    num_chunked_prefills_total: int = 0
    num_aborted_total: int = 0
    num_prefix_queries_tokens_total: int = 0
    num_prefix_hit_tokens_total: int = 0
    step_time_s_total: float = 0.0
    last_step_time_s: float = 0.0
    weight_bytes_read_total: int = 0
    kv_bytes_read_total: int = 0
    last_step_bytes: int = 0
    bandwidth_limit_bytes: float = 0.0
    num_cache_releases_total: int = 0
    num_shed_total: int = 0
    num_drafts_total: int = 0
    num_draft_tokens_total: int = 0
    num_accepted_tokens_total: int = 0
    mode: str = BatchingMode.CONTINUOUS.value
    is_paused: bool = False

    @property
    def memory_bandwidth_bytes(self) -> float:
        """Bytes a second that the last step read: its weights once, its contexts' KV."""
        return self.last_step_bytes / self.last_step_time_s if self.last_step_time_s else 0.0

    @property
    def bandwidth_share(self) -> float:
        """`memory_bandwidth_bytes` over the device's measured copy bandwidth; 0 where unknown."""
        limit = self.bandwidth_limit_bytes
        return self.memory_bandwidth_bytes / limit if limit else 0.0

    @property
    def kv_cache_usage(self) -> float:
        """Share (0–1) of the KV blocks that live sequences hold."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0
