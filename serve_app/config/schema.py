"""Schema of the application's `args` in a Serve config file; the descriptions are the manual.

Every model is frozen and rejects unknown keys. `xeray config schema` prints it as JSON Schema.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from serve_app.config.section import NonNegativeInt, PositiveInt, Seconds
from serve_app.config.section import Section as _Section
from serve_app.config.sections_autoscaling import AutoscalingSection
from serve_app.config.sections_batching import BatchingSection as BatchingSection
from serve_app.config.sections_batching import MicroBatchingSection
from serve_app.config.sections_continuation import (
    CONTINUE_STREAMS,
    CONTINUE_TIMEOUT_S,
    ContinueStreams,
)
from serve_app.config.sections_cost import CostSection, SloSection
from serve_app.config.sections_embedding import MAX_EMBEDDING_TOKENS, EmbeddingSection, ModelTask
from serve_app.config.sections_patience import RECEIVE_TIMEOUT_S, SEND_TIMEOUT_S
from serve_app.config.sections_pools import PoolSection, RoutingSection, overlaid
from serve_app.config.sections_precision import PrecisionSection
from serve_app.config.sections_reasoning import ReasoningSection
from serve_app.config.sections_speculative import SpeculativeSection
from serve_app.config.sections_tracing import TracingSection

EMBEDDED_MODEL = "embedded"
"""`model.path` of the model that ships with XeRay: SmolLM2-135M-Instruct in Q4_1."""


class ModelSection(_Section):
    """Which model is served, and under which names."""

    path: str = Field(
        EMBEDDED_MODEL,
        description="'embedded', a .gguf file, or a Hugging Face folder of safetensors.",
    )
    name: str | None = Field(
        None, description="Id in /v1/models; default: the file's or folder's own name."
    )
    aliases: tuple[str, ...] = Field(
        (), description="Other names that clients may send; '*' accepts any name."
    )
    max_model_len: PositiveInt | None = Field(
        None, description="Longest prompt + answer in tokens; default: what the model was made for."
    )
    chat_template: str | None = Field(
        None, description="Path of a Jinja chat template that replaces the model's own."
    )
    reasoning: Literal["auto", "none", "deepseek_r1"] = Field(
        "auto", description="How <think> text is split off; auto: by the chat template."
    )
    tool_call_parser: Literal["auto", "none", "hermes", "deepseek_v3", "deepseek_v31"] = Field(
        "auto", description="How the model writes tool calls; auto: by its chat template."
    )
    default_sampling: dict[str, Any] = Field(
        default_factory=dict,
        description="Sampling defaults (temperature, top_p, …) over the model's generation_config.",
    )
    trust_pickle: bool = Field(
        False, description="Allow torch .bin checkpoints; they can run code."
    )
    task: ModelTask = Field("auto", description="auto: embed where the model's files say so.")
    embedding: EmbeddingSection = EmbeddingSection()


class EngineSection(_Section):
    """The engine of each model replica."""

    kind: Literal["auto", "native", "transformers", "openvino", "ipex"] = Field(
        "auto",
        description="auto: native where the architecture is known, else transformers.",
    )
    auto_may_lack_features: bool = Field(
        False,
        description="Let auto measure OpenVINO beside native on a CPU, once, and take the faster:"
        " OpenVINO lacks logit_bias, top_logprobs, prompt log-probabilities, seed and cache_salt.",
    )
    device: Literal["auto", "cpu", "xpu", "cuda"] = Field(
        "auto",
        description="auto: what the pool says (arc, igpu → xpu), else the best there is.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Compute type; auto: bfloat16 where the device is fast at it, else float32.",
    )
    weight_format: Literal["auto", "dense", "int4", "int8"] = Field(
        "auto",
        description="auto: as the checkpoint has them where a kernel is faster, else dense.",
    )
    block_size: Literal[16, 32, 64, 128] = Field(16, description="Tokens per KV block.")
    kv_cache_tokens: PositiveInt | None = Field(
        None,
        description="KV cache size in tokens; default: kv_cache_memory_fraction of free memory.",
    )
    kv_cache_memory_fraction: float = Field(
        0.5,
        gt=0,
        le=0.95,
        description="Share of the memory left after the weights that KV may take.",
    )
    max_num_seqs: PositiveInt = Field(32, description="Most sequences in one step.")
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="Token budget of one step; default: measured so that a step stays short."
    )
    enable_prefix_caching: bool = Field(True, description="Keep and share KV of equal prefixes.")
    batch_invariant: bool = Field(
        False,
        description="Same answer alone or in a batch: fixed kernels and chunks; costs speed.",
    )
    tensor_parallel_size: PositiveInt = Field(
        1,
        description="Cards that one model is cut across; more than 1 needs as many"
        " model_replica.num_cards (not with pool cpu, where ranks share the cores).",
    )
    capture_graphs: bool | None = Field(
        None, description="Capture decode steps; default: on for cuda, off for xpu and cpu."
    )
    speculative: SpeculativeSection = SpeculativeSection()
    warmup: bool = Field(True, description="Run every batch bucket once before ready.")
    num_threads: PositiveInt | None = Field(
        None, description="CPU threads of the engine; default: the replica's physical cores."
    )
    fixed_rate_tokens_per_s: float | None = Field(
        None,
        gt=0,
        description="Replace the model by a clock at this rate per stream; for measuring overhead.",
    )
    watchdog_min_s: Seconds = Field(
        3.0,
        description="A step that takes longer than max(this, 10 × p99 step) counts as stuck; time"
        " that it waited for a CPU which other work had does not count.",
    )
    startup_timeout_s: Seconds = Field(600.0, description="Longest load and warm-up.")

    @model_validator(mode="after")
    def _check_tensor_parallel(self) -> Self:
        if self.tensor_parallel_size == 1:
            return self
        if self.kind not in ("auto", "native"):
            raise ValueError(f"tensor_parallel_size needs kind: native, not {self.kind}")
        if self.batch_invariant:
            raise ValueError("tensor_parallel_size excludes batch_invariant; set it to false")
        return self

    @model_validator(mode="after")
    def _check_speculative(self) -> Self:
        if not self.speculative.is_on:
            return self
        if self.kind not in ("auto", "native"):
            raise ValueError(f"speculative.method needs kind: native, not {self.kind}")
        if self.fixed_rate_tokens_per_s is not None:
            raise ValueError("speculative.method excludes fixed_rate_tokens_per_s: set it to off")
        return self


class _DeploymentSection(_Section):
    num_replicas: PositiveInt = Field(1, description="Replicas, where autoscaling is not given.")
    autoscaling: AutoscalingSection | None = Field(
        None, description="Scale between bounds instead of num_replicas."
    )

    @model_validator(mode="after")
    def _check_one_of(self) -> Self:
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ValueError(
                "num_replicas and autoscaling exclude each other;"
                " set autoscaling.min_replicas and max_replicas instead"
            )
        return self


class IngressSection(_DeploymentSection):
    """The HTTP surface: limits of what one client and all clients may ask."""

    num_replicas: PositiveInt = Field(2, description="Replicas; ≥ 2 keeps answering when one dies.")
    num_cpus: float = Field(0.1, ge=0, description="Ray CPUs that each replica reserves.")
    max_body_bytes: PositiveInt = Field(4 * 1024 * 1024, description="Larger bodies get 413.")
    max_ongoing_requests: PositiveInt = Field(
        1024, description="Requests in flight per ingress replica."
    )
    request_timeout_s: Seconds | None = Field(
        600.0, description="Deadline of a request; passed: 504, or an error event in a stream."
    )
    keep_alive_interval_s: Seconds = Field(
        15.0, description="Silence after which a stream gets a comment."
    )
    receive_timeout_s: Seconds = RECEIVE_TIMEOUT_S
    send_timeout_s: Seconds = SEND_TIMEOUT_S
    continue_streams: ContinueStreams = CONTINUE_STREAMS
    continue_timeout_s: Seconds = CONTINUE_TIMEOUT_S
    default_max_tokens: PositiveInt | None = Field(
        None,
        description="Answer length where the client names none; default: what the context leaves.",
    )
    max_n: PositiveInt = Field(
        16, description="Largest `n` and largest list of prompts × n: 16 × this."
    )
    max_embedding_tokens: PositiveInt = MAX_EMBEDDING_TOKENS
    reasoning_field: Literal["reasoning_content", "reasoning"] = "reasoning_content"
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins allowed by CORS; none by default."
    )
    allow_request_chat_template: bool = Field(
        False, description="Accept chat_template in a request."
    )
    expose_tokenizer_info: bool = Field(False, description="Answer GET /tokenizer_info.")
    web: bool = Field(True, description="Serve the chat page at / and the docs.")


class AuthSection(_Section):
    """API keys. Without a file, and without XERAY_API_KEYS in the environment, none are asked."""

    keys_file: str | None = Field(
        None, description="YAML file of keys on each ingress' host; `xeray keys new` makes entries."
    )
    protect_metrics: bool = Field(
        False, description="Ask a key with the scope metrics for GET /metrics."
    )


class FallbackSection(_Section):
    """An OpenAI-compatible upstream for what this service cannot serve well now. Off without url.

    Prompts leave this machine. A key with `local_only`, the header `X-XeRay-Local-Only`, or
    `metadata.local_only: "true"` keeps a request here.
    """

    url: str | None = Field(
        None, description="Base URL with its version, such as https://api.deepseek.com/v1."
    )
    model: str | None = Field(None, description="Model to ask for there; default: the client's.")
    api_key_env: str = Field(
        "XERAY_FALLBACK_API_KEY", description="Environment variable that holds the upstream's key."
    )
    ttft_p95_limit_ms: float = Field(
        200.0, gt=0, description="Local p95 time to first token from which on requests leave."
    )
    window_s: Seconds = Field(60.0, description="Span over which the p95 is taken.")
    min_samples: PositiveInt = Field(20, description="Fewer first tokens than this tell nothing.")
    failure_threshold: PositiveInt = Field(3, description="Failures in a row that open it.")
    open_s: Seconds = Field(30.0, description="Pause before one request tries an open circuit.")
    budget_per_hour: float | None = Field(
        None, gt=0, description="Most to spend in any hour, in the currency of the price."
    )
    price_per_1k_tokens: float = Field(0.0, ge=0, description="Price of 1,000 tokens there.")
    connect_timeout_s: Seconds = Field(3.0, description="Longest wait for a connection.")
    timeout_s: Seconds = Field(60.0, description="Longest silence of the upstream.")

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        if self.url is not None and not self.url.startswith(("https://", "http://")):
            raise ValueError(f"url must begin with https:// or http://, got {self.url!r}")
        if self.budget_per_hour is not None and not self.price_per_1k_tokens:
            raise ValueError("budget_per_hour needs price_per_1k_tokens")
        return self


class PreprocessorSection(_DeploymentSection):
    """Chat template and tokenisation on Xeon cores."""

    xeon_cores: PositiveInt = Field(
        1,
        description="CPU cores that each replica is pinned to (Ray resource xeon_cores).",
    )
    reserve_xeon_cores: bool = Field(
        True,
        description="Take xeon_cores as a Ray resource; off: only the per-host lock keeps replicas"
        " apart (for a Ray that `serve run` starts itself, which declares no such resource).",
    )
    max_ongoing_requests: PositiveInt = 64
    micro_batching: MicroBatchingSection = MicroBatchingSection()


class ModelReplicaSection(_DeploymentSection):
    """The replicas that hold a device and run the engine."""

    pool: Literal["arc", "igpu", "cuda", "cpu"] = Field(
        "cpu",
        description="What a replica runs on; arc and igpu take the Ray resources arc_gpu and igpu.",
    )
    num_cards: PositiveInt = Field(
        1, description="Cards that each replica holds (pools arc, igpu, cuda)."
    )
    num_cpus: float = Field(1.0, ge=0, description="Ray CPUs that each replica reserves.")
    max_queued_requests: NonNegativeInt = Field(
        128,
        description="Requests waiting in a replica beyond those running; more get a 503.",
    )
    stream_interval_ms: float | None = Field(
        None, ge=0, description="Gathering time of a stream; default: min(100, 3 × streams) ms."
    )
    batching: BatchingSection = BatchingSection()
    health_check_period_s: Seconds = 2.0
    health_check_timeout_s: Seconds = 10.0
    graceful_shutdown_timeout_s: Seconds = Field(
        600.0, description="How long running streams may go on when the replica is told to stop."
    )


class LoggingSection(_Section):
    """Logs of our own processes."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_prompts: bool = Field(False, description="Write prompt text to the log. Off: never.")


class AppConfig(_Section):
    """`args` of the application `serve_app:build_app`."""

    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    ingress: IngressSection = IngressSection()
    auth: AuthSection = AuthSection()
    fallback: FallbackSection = FallbackSection()
    preprocessor: PreprocessorSection = PreprocessorSection()
    model_replica: ModelReplicaSection = ModelReplicaSection()
    pools: tuple[PoolSection, ...] = Field(
        (), description="Several kinds of replicas, best first; none: model_replica is the one."
    )
    routing: RoutingSection = RoutingSection()
    precision: PrecisionSection = PrecisionSection()
    reasoning: ReasoningSection = ReasoningSection()
    logging: LoggingSection = LoggingSection()
    tracing: TracingSection = TracingSection()
    cost: CostSection = CostSection()
    slo: SloSection = SloSection()

    @model_validator(mode="after")
    def _check_pools(self) -> Self:
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pools: each needs a name of its own, got {', '.join(names)}")
        if len(names) > 1 and self.routing.policy != "expected_start":
            raise ValueError("routing.policy: several pools need expected_start")
        if self.precision.is_on and len(names) < 2:
            raise ValueError("precision.mode: auto needs two pools or more, widest first")
        self.pool_configs()
        return self

    def pool_configs(self) -> tuple[AppConfig, ...]:
        """Return one config per pool, best first, whose model_replica and engine are the pool's.

        Raises ValueError where a pool's overrides are not those of the sections.
        """
        if not self.pools:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "pools": (),
                    "model_replica": overlaid(self.model_replica, pool.model_replica, pool.name),
                    "engine": overlaid(self.engine, pool.engine, pool.name),
                }
            )
            for pool in self.pools
        )

    @model_validator(mode="after")
    def _check_cards(self) -> Self:
        size, replica = self.engine.tensor_parallel_size, self.model_replica
        if size > 1 and replica.pool != "cpu" and replica.num_cards != size:
            raise ValueError(
                f"engine.tensor_parallel_size is {size}, but model_replica.num_cards is"
                f" {replica.num_cards}; set both to the same number"
            )
        return self


class ModelReplicaUserConfig(_Section):
    """`user_config` of the deployment ModelReplica: what changes on the running process."""

    batching: BatchingSection = BatchingSection()
    max_queued_requests: NonNegativeInt | None = Field(
        None, description="Waiting requests; default: model_replica.max_queued_requests."
    )
    stream_interval_ms: float | None = Field(
        None, ge=0, description="Gathering time of a stream; default: min(100, 3 × streams) ms."
    )


class PreprocessorUserConfig(_Section):
    """`user_config` of the deployment Preprocessor: what changes on the running process."""

    micro_batching: MicroBatchingSection = MicroBatchingSection()
