"""The Responses API, stateless: the request, the answer and the stream's events."""

from __future__ import annotations

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
from serve_app.api.protocol.sampling import Metadata, SamplingFields
from serve_app.api.protocol.tools import (
    MAX_TOOLS,
    WORD_OR_FUNCTION,
    ChoiceWord,
    FunctionName,
)

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
_KEPT_IN_ITEMS = ["reasoning.encrypted_content"]
"""Reasoning items carry their text openly, so nothing is lost without the encrypted one."""


class InputPart(RequestModel):
    """A piece of an item's content; only text is understood."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"annotations", "logprobs", "image_url", "file_id", "file_data", "detail", "filename"}
    )

    type: str
    text: str | None = None
    refusal: str | None = None


InputText = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[tuple[InputPart, ...], Bounded(), Tag("(list)")],
    text_or_list("content parts"),
]


class InputItem(RequestModel):
    """A turn, a call, a call's result or reasoning; what an answer's `output` holds fits too."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"id", "status", "summary", "encrypted_content", "phase"}
    )

    type: str = Field("message", description="message, function_call(_output) or reasoning.")
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: InputText | None = None
    call_id: str | None = None
    name: FunctionName | None = None
    arguments: str | None = None
    output: InputText | None = None


Input = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[tuple[InputItem, ...], Bounded(), Tag("(list)"), Field(min_length=1)],
    text_or_list("items"),
]


class FunctionTool(RequestModel):
    """A function; `parameters` is a JSON Schema of an object, none at all where left out."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionToolChoice(RequestModel):
    """Exactly one call, of this function."""

    type: Literal["function"]
    name: FunctionName


ResponsesToolChoice = Annotated[
    ChoiceWord | Annotated[FunctionToolChoice, Tag("(function)")], WORD_OR_FUNCTION
]


class TextFormat(RequestModel):
    """The form of the answer: text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(RequestModel):
    """What the text of the answer is like."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {"verbosity": lambda value: value == "medium"}

    format: TextFormat | None = None


class ReasoningOptions(RequestModel):
    """How hard the model thinks. Summaries are not made: reasoning items carry the whole text."""

    ignored: ClassVar[frozenset[str]] = frozenset({"summary", "generate_summary"})

    effort: Effort | None = None


class ResponsesRequest(SamplingFields):
    """Body of POST /v1/responses."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {
        **SamplingFields.unsupported,
        "conversation": never,
        "context_management": is_empty,
        "include": lambda value: value in ([], _KEPT_IN_ITEMS),
        "logprobs": is_empty,
        "messages": never,
        "n": lambda value: value == 1,
        "prompt": never,
        "response_format": never,
        "top_logprobs": is_empty,
        "truncation": lambda value: value == "disabled",
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"service_tier", "safety_identifier", "max_tool_calls"}
        | {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
    )

    input: Input
    instructions: str | None = Field(None, description="A system message in front of the input.")
    max_output_tokens: int | None = Field(None, ge=1, description="Reasoning counts.")
    tools: Annotated[tuple[FunctionTool, ...], Bounded(MAX_TOOLS)] | None = None
    tool_choice: ResponsesToolChoice | None = Field(
        None, description="auto unless given; required and a named function are forced."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: Metadata | None = Field(None, description="Comes back with the answer.")
    store: bool | None = Field(None, description="Nothing is kept: true is refused.")
    background: bool | None = Field(None, description="Nothing is kept: true is refused.")
    previous_response_id: str | None = Field(None, description="Nothing is kept: refused.")


class TextPart(ResponseModel):
    """Text of an item: `annotations` and `logprobs` only with output_text, and empty."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ReasoningItem(ResponseModel):
    """What the model thought."""

    type: Literal["reasoning"]
    id: str
    status: ItemStatus
    summary: list[Any]
    content: list[TextPart]


class MessageItem(ResponseModel):
    """What the model says."""

    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[TextPart]


class FunctionCallItem(ResponseModel):
    """A call; `arguments` is JSON as the model wrote it."""

    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = Annotated[ReasoningItem | MessageItem | FunctionCallItem, Field(discriminator="type")]


class InputTokensDetails(ResponseModel):
    """How many input tokens came from the prefix cache; writing to it is not counted."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(ResponseModel):
    """How many generated tokens were spent on reasoning."""

    reasoning_tokens: int


class ResponsesUsage(ResponseModel):
    """Token counts of an answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponsesError(ResponseModel):
    """Why an answer failed half-way."""

    code: str
    message: str


class IncompleteDetails(ResponseModel):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"]


class ResponsesAnswer(ResponseModel):
    """Answer of POST /v1/responses; settings are those of the request, null where it had none."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponsesError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponsesUsage | None
    instructions: str | None
    metadata: dict[str, str]
    temperature: float | None
    top_p: float | None
    max_output_tokens: int | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any]
    truncation: Literal["disabled"] = "disabled"
    store: Literal[False] = False
    background: Literal[False] = False
    previous_response_id: None = None
    user: str | None


class ResponsesEvent(ResponseModel):
    """One event of a stream: its type (response.created, response.output_text.delta, …) and data.

    `response` comes with the first two events and the last, `item` and `part` with those that open
    and close one, `delta` with each piece of text, reasoning or arguments.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=(), frozen=True)

    type: str
    sequence_number: int
    response: ResponsesAnswer | None = None
    output_index: int | None = None
    item_id: str | None = None
    item: OutputItem | None = None
    delta: str | None = None
