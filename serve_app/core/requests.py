"""Messages of one request on its way through the graph: one dataclass per hop.

Ownership::

    api (ingress)  --PrepareRequest-->  Preprocessor  --PreparedPrompt-->  api
    api (ingress)  --GenerateRequest->  ModelReplica  --GenerateChunk*-->  api
    ModelReplica   --submit(id, ids, SamplingParams)-> engine process --TokenEvent*--> ModelReplica

All are frozen and hold plain values only: they cross Ray cheaply and never change in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve_app.core.errors import ErrorInfo
from serve_app.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What form a chat answer shall have; the Preprocessor makes a grammar of it.

    schema: JSON Schema that the answer's text follows; None leaves it free. `schema_param` names
        the parameter that it came in.
    tools: functions that the model may call, as dicts of name, description and parameters.
    forced_tools: names of those of which at least one must be called; empty: as the model likes.
    max_calls: most calls in one answer; None is no limit.
    """

    schema: dict[str, Any] | None = None
    schema_param: str = "response_format"
    tools: tuple[dict[str, Any], ...] = ()
    forced_tools: tuple[str, ...] = ()
    max_calls: int | None = None

    @property
    def needs_grammar(self) -> bool:
        """Whether the answer can only be had by restricting the model's tokens."""
        return self.schema is not None or bool(self.forced_tools)


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What the Preprocessor turns into token ids: exactly one of `messages` and `text`.

    `messages` are chat messages as plain dicts in the order of the conversation (role developer
    already renamed to system); `template_kwargs` go to the chat template (enable_thinking …).
    User text is never parsed as special tokens unless `parse_special` (only /tokenize may set it).
    `trace_context`: the headers under which the Preprocessor's span goes on with the trace.
    """

    request_id: str
    messages: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    parse_special: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    form: OutputForm | None = None
    trace_context: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """Token ids of a prompt. `starts_in_reasoning`: the template opened <think> in the prompt.

    `grammar`: what the answer must follow, where `PrepareRequest.form` asks for that.

    `error` is set, and the ids are empty, when the input was at fault (a template that refuses it).
    """

    token_ids: tuple[int, ...] = ()
    starts_in_reasoning: bool = False
    error: ErrorInfo | None = None
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class RelayTarget:
    """Where an ingress takes a request's chunks outside of its Ray stream (deployments.relay_*).

    `token` lets a replica in; `key` names the request on the connection.
    """

    host: str
    port: int
    token: str
    key: int


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate, on its way to a ModelReplica.

    `stop` are strings, matched across token boundaries; `deadline_s` is the time that is left.
    `target_replica`: the ReplicaHealth.replica_id that shall take it, if it still can;
    `num_expected_hit_tokens`: what it likely has of the prompt in its prefix cache.
    `generated_token_ids`: what another replica generated of the answer before it was lost; prompt,
    sampling and stop stay the original ones, the chunks go on where the last one ended.
    `shown_special_tokens`: names that stay in the text though special tokens are skipped.
    `reasoning_kind` (text.reasoning) and `starts_in_reasoning`: how tokens of thinking are counted.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = True
    deadline_s: float | None = None
    trace_context: dict[str, str] = field(default_factory=dict)
    relay: RelayTarget | None = None
    target_replica: str | None = None
    generated_token_ids: tuple[int, ...] = ()
    shown_special_tokens: tuple[str, ...] = ()
    reasoning_kind: str = "none"
    starts_in_reasoning: bool = False
    num_expected_hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LogprobItem:
    """A token with its log-probability, as text; `top` holds (token, logprob, bytes)."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top: tuple[tuple[str, float, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What decides how soon a replica can start one more request.

    num_streams: running or waiting. max_num_seqs: how many run at once.
    num_waiting_tokens: prompt tokens of the streams that have no token yet, less expected hits.
    num_blocks, num_used_blocks, block_size: the KV cache; 0 blocks where the engine has none.
    prefill_tokens_per_s: as measured lately, 0 where unknown. mean_service_s: of ended streams.
    ttft_p95_s: over the last seconds, 0 where there was nothing.
    num_queued: streams that the engine has not begun, for want of a place or of KV blocks.
    """

    num_streams: int = 0
    max_num_seqs: int = 1
    num_waiting_tokens: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    block_size: int = 16
    prefill_tokens_per_s: float = 0.0
    mean_service_s: float = 0.0
    ttft_p95_s: float = 0.0
    num_queued: int = 0


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """A piece of the answer. The last one has `finish_reason` or `error`; nothing follows it.

    `text` is ready to show: no incomplete UTF-8, no stop text. `num_generated`: tokens so far.
    `stop_reason` is the matched string or token id when finish_reason is "stop", None for EOS.
    `engine_ttft_s`, on the first chunk: seconds from submission to the engine's first token.
    `num_reasoning`: how many of `num_generated` were spent on thinking, its tags included; None
    where nobody counted.
    `is_relayed`, on the first chunk: those that follow go to the request's RelayTarget.
    `load`, on the first chunk: the replica's, for whoever chooses replicas.
    `embedding`, on the only chunk of an embedding: the vector, float32, little-endian.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[LogprobItem, ...] | None = None
    prompt_logprobs: tuple[LogprobItem | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_prompt: int = 0
    num_generated: int = 0
    num_cached: int = 0
    queue_time_s: float | None = None
    engine_ttft_s: float | None = None
    error: ErrorInfo | None = None
    is_relayed: bool = False
    num_reasoning: int | None = None
    load: ReplicaLoad | None = None
    embedding: bytes | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A served model as the API shows it; known before a replica is up.

    embedding_size: values of a vector where the model computes embeddings, None where it generates;
    `can_shorten_embeddings`: a vector's first values are an embedding too (Matryoshka).
    """

    id: str
    aliases: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    created: int
    root: str
    eos_token_ids: tuple[int, ...]
    default_sampling: dict[str, Any] = field(default_factory=dict)
    has_chat_template: bool = True
    is_reasoning: bool = False
    tool_syntax: str | None = None
    embedding_size: int | None = None
    can_shorten_embeddings: bool = False

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the model is for, by its files: chat, completions, tools, reasoning, embeddings."""
        if self.embedding_size is not None:
            return ("embeddings",)
        told = {
            "chat": self.has_chat_template,
            "tools": self.tool_syntax is not None,
            "reasoning": self.is_reasoning,
        }
        return ("completions", *(name for name, is_there in told.items() if is_there))


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """State of one ModelReplica: `state` is loading | ready | draining | stuck | dead.

    `engine` runs it, and `engine_reason` says why that one.
    """

    replica_id: str
    state: str
    detail: str = ""
    device: str = ""
    last_progress_age_s: float = 0.0
    load: ReplicaLoad | None = None
    engine: str = ""
    engine_reason: str = ""


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """What /health and /readyz report: ready when a replica is, and nothing is draining."""

    is_ready: bool
    status: str
    replicas: tuple[ReplicaHealth, ...] = ()
