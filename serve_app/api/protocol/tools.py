"""Tools and response formats as chat requests have them, and tool calls as answers do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from serve_app.api.protocol.base import RequestModel, ResponseModel

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(RequestModel):
    """A function; `parameters` is a JSON Schema of an object, none at all where left out."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """Something that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestModel):
    """The function that must be called."""

    name: FunctionName


class NamedToolChoice(RequestModel):
    """Exactly one call, of this function."""

    type: Literal["function"]
    function: NamedFunction


def _choice_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "(word)"
    return "(function)" if isinstance(value, dict | RequestModel) else None


ChoiceWord = Annotated[Literal["none", "auto", "required"], Tag("(word)")]
WORD_OR_FUNCTION = Discriminator(
    _choice_tag,
    custom_error_type="tool_choice_type",
    custom_error_message="Input should be none, auto, required or a function",
)
ToolChoice = Annotated[ChoiceWord | Annotated[NamedToolChoice, Tag("(function)")], WORD_OR_FUNCTION]


class JsonSchemaFormat(RequestModel):
    """The schema of `response_format` json_schema; followed whether `strict` or not."""

    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """The form of the answer: text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class CalledFunction(ResponseModel):
    """A call's function; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class AnsweredToolCall(ResponseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CalledFunctionDelta(ResponseModel):
    """A piece of a call: the name first, then arguments to be joined."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """A piece of the `index`-th call; id and type come with the first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta
