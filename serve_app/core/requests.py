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
class PrepareRequest:
    """What the Preprocessor turns into token ids: exactly one of `messages` and `text`.

    `messages` are chat messages as plain dicts in the order of the conversation (role developer
    already renamed to system); `template_kwargs` go to the chat template (enable_thinking …).
    User text is never parsed as special tokens unless `parse_special` (only /tokenize may set it).
    """

    request_id: str
    messages: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    parse_special: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """Token ids of a prompt. `starts_in_reasoning`: the template opened <think> in the prompt.

    `error` is set, and the ids are empty, when the input was at fault (a template that refuses it).
    """

    token_ids: tuple[int, ...] = ()
    starts_in_reasoning: bool = False
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate, on its way to a ModelReplica.

    `stop` are strings, matched across token boundaries; `deadline_s` is the time that is left.
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


@dataclass(frozen=True, slots=True)
class LogprobItem:
    """A token with its log-probability, as text; `top` holds (token, logprob, bytes)."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top: tuple[tuple[str, float, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """A piece of the answer. The last one has `finish_reason` or `error`; nothing follows it.

    `text` is ready to show: no incomplete UTF-8, no stop text. `num_generated`: tokens so far.
    `stop_reason` is the matched string or token id when finish_reason is "stop", None for EOS.
    `engine_ttft_s`, on the first chunk: seconds from submission to the engine's first token.
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


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A served model as the API shows it; known before a replica is up."""

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


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """State of one ModelReplica: `state` is loading | ready | draining | stuck | dead."""

    replica_id: str
    state: str
    detail: str = ""
    device: str = ""
    last_progress_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """What /health and /readyz report: ready when a replica is, and nothing is draining."""

    is_ready: bool
    status: str
    replicas: tuple[ReplicaHealth, ...] = ()
