"""Completions and /generate: requests, answers and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from serve_app.api.protocol.base import Harmless, ResponseModel, is_empty, never
from serve_app.api.protocol.bounds import Bounded
from serve_app.api.protocol.sampling import MAX_LOGPROBS, SamplingFields
from serve_app.api.protocol.usage import Usage


def _prompt_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "(string)"
    if not isinstance(value, list | tuple) or not value:
        return None
    first = value[0]
    if isinstance(first, str):
        return "(strings)"
    return "(id lists)" if isinstance(first, list | tuple) else "(ids)"


TokenIds = Annotated[tuple[int, ...], Bounded(None)]
Prompt = Annotated[
    Annotated[str, Tag("(string)")]
    | Annotated[tuple[str, ...], Bounded(), Tag("(strings)")]
    | Annotated[TokenIds, Tag("(ids)")]
    | Annotated[tuple[TokenIds, ...], Bounded(), Tag("(id lists)")],
    Discriminator(
        _prompt_tag,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, a list of strings, a list of token ids,"
        " or a list of lists of token ids, and not empty",
    ),
]


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {
        **SamplingFields.unsupported,
        "suffix": is_empty,
        "response_format": lambda value: isinstance(value, dict) and value.get("type") == "text",
        "prompt_embeds": never,
    }

    prompt: Prompt
    n: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1, description="Only the value of n.")
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None


class CompletionLogprobs(ResponseModel):
    """Log-probabilities in the completions form; offsets count characters of `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One answer to one prompt: index = prompt's place × n + which of the n."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None


class Completion(ResponseModel):
    """Answer of POST /v1/completions, and (with `usage` null or absent) a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class GenerateBody(SamplingFields):
    """Body (or query) of POST /generate."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {
        **SamplingFields.unsupported,
        "n": lambda value: value == 1,
        "best_of": lambda value: value == 1,
        "logprobs": is_empty,
        "echo": is_empty,
        "suffix": is_empty,
    }

    prompt: str


class GenerateAnswer(ResponseModel):
    """Answer of POST /generate."""

    text: str
    model: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    usage: Usage


class GenerateEvent(ResponseModel):
    """One event of a /generate stream: text, or at the end the finish reason and the usage."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
