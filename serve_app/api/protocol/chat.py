"""Chat completions: the request, the answer and the stream's chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, Tag

from serve_app.api.protocol.base import (
    Harmless,
    RequestModel,
    ResponseModel,
    is_empty,
    never,
    text_or_list,
)
from serve_app.api.protocol.bounds import Bounded
from serve_app.api.protocol.sampling import MAX_LOGPROBS, Metadata, SamplingFields
from serve_app.api.protocol.tools import (
    MAX_TOOLS,
    AnsweredToolCall,
    ResponseFormat,
    Tool,
    ToolCallDelta,
    ToolChoice,
)
from serve_app.api.protocol.usage import Usage
from serve_app.core.errors import ClientError, UnsupportedParameterError

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ContentPart(RequestModel):
    """A piece of a message's content; only text is understood."""

    ignored: ClassVar[frozenset[str]] = frozenset({"image_url", "input_audio", "file", "video_url"})

    type: str
    text: str | None = None
    refusal: str | None = None


Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[tuple[ContentPart, ...], Bounded(), Tag("(list)")],
    text_or_list("content parts"),
]


class FunctionCall(RequestModel):
    """Which function an earlier assistant turn called; `arguments` is a JSON string."""

    name: str
    arguments: str = ""


class ToolCall(RequestModel):
    """A tool call of an earlier assistant turn."""

    id: str | None = None
    type: str = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    """One turn of the conversation."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {"audio": never, "function_call": never}
    ignored: ClassVar[frozenset[str]] = frozenset({"refusal", "annotations"})

    role: Role
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Bounded()] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def to_template(self, param: str) -> dict[str, Any]:
        """Return the turn as the chat template sees it; `param` is its path for errors.

        developer becomes system, text parts are joined by newlines, arguments are parsed.
        """
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self._text(param)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        reasoning = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [_tool_call(call) for call in self.tool_calls]
        return message

    def _text(self, param: str) -> str:
        if self.content is None:
            if self.role == "assistant":
                return ""
            raise ClientError(f"{param}.content is missing", param=f"{param}.content")
        if isinstance(self.content, str):
            return self.content
        return "\n".join(
            _part_text(part, f"{param}.content.{index}") for index, part in enumerate(self.content)
        )


def _part_text(part: ContentPart, param: str) -> str:
    if part.type not in ("text", "refusal"):
        raise UnsupportedParameterError(
            f"{param}.type: only content parts of type text are supported", param=f"{param}.type"
        )
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise ClientError(f"{param}.{part.type} is missing", param=f"{param}.{part.type}")
    return text


def _tool_call(call: ToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    try:
        # Templates print arguments as JSON themselves: a string would be quoted twice.
        arguments = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {
        **SamplingFields.unsupported,
        "functions": is_empty,
        "function_call": lambda value: value == "none",
        "audio": never,
        "modalities": lambda value: value == ["text"],
        "prediction": never,
        "web_search_options": never,
        "verbosity": lambda value: value == "medium",
        "best_of": lambda value: value == 1,
        "echo": is_empty,
        "documents": is_empty,
        "mm_processor_kwargs": is_empty,
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"store", "service_tier", "safety_identifier"}
        | {"prompt_cache_key", "prompt_cache_retention"}
    )

    messages: Annotated[tuple[ChatMessage, ...], Bounded()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Stands over max_tokens.")
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[tuple[Tool, ...], Bounded(MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = Field(
        None, description="auto unless given; required and a named function are forced."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="Given to the template; the server's config sets a limit for each."
    )
    thinking_budget: int | None = Field(
        None, ge=0, description="Most tokens of thinking; stands over reasoning_effort."
    )
    metadata: Metadata | None = Field(None, description="Taken, and kept nowhere.")
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = Field(None, description="Refused unless the server allows it.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TopLogprob(ResponseModel):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A sampled token with its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AssistantMessage(ResponseModel):
    """The answer; the reasoning's key is `reasoning_content` or, by config, `reasoning`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), frozen=True)

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredToolCall] | None = None


class ChatChoice(ResponseModel):
    """One of `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = None


class ChatCompletion(ResponseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(ResponseModel):
    """What a chunk adds; empty in the chunk that carries the finish reason."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), frozen=True)

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(ResponseModel):
    """A chunk's part of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = None


class ChatCompletionChunk(ResponseModel):
    """One event of a chat stream; `usage` is there when asked for, null before the last."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
