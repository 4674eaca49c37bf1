"""From a request of the Responses API to the chat request that asks for the same."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from serve_app.api.protocol.chat import ChatCompletionRequest, ChatMessage, FunctionCall, ToolCall
from serve_app.api.protocol.responses import (
    FunctionToolChoice,
    InputItem,
    InputText,
    ResponsesRequest,
    TextFormat,
)
from serve_app.api.protocol.sampling import SamplingFields
from serve_app.api.protocol.tools import (
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolChoice,
)
from serve_app.core.errors import ClientError, UnsupportedParameterError

_TEXT_PARTS = frozenset({"input_text", "output_text", "reasoning_text", "text"})
_DEFAULT_SCHEMA_NAME = "answer"
_NAMES = {
    "response_format.json_schema": "text.format.schema",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    ".function.parameters": ".parameters",
    "messages": "input",
}
"""Chat's parameters → ours, the longer names first."""
_CHAT_NAMES = re.compile("|".join(rf"{re.escape(name)}\b" for name in _NAMES))


@dataclass(slots=True)
class _AssistantTurn:
    """Reasoning, then text, then calls: what one turn of the model consists of."""

    reasoning: str | None = None
    content: str | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> ChatMessage:
        """Return the turn as chat has it."""
        return ChatMessage(
            role="assistant",
            content=self.content,
            reasoning_content=self.reasoning,
            tool_calls=tuple(self.calls) or None,
        )


def to_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """Return the chat request. Raises ClientError, with our parameters' names, on what has none."""
    _check_stateless(body)
    shared = {
        name: getattr(body, name)
        for name in SamplingFields.model_fields
        if name in body.model_fields_set
    }
    return ChatCompletionRequest(
        **shared,
        messages=_messages(body),
        max_completion_tokens=body.max_output_tokens,
        tools=_tools(body),
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(None if body.text is None else body.text.format),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
    )


def in_our_names(error: ClientError) -> ClientError:
    """Return chat's error as one that names the parameters of the Responses API."""
    return type(error)(
        _renamed(error.message),
        param=None if error.param is None else _renamed(error.param),
        code=error.code,
        retry_after_s=error.retry_after_s,
    )


def _renamed(text: str) -> str:
    return _CHAT_NAMES.sub(lambda match: _NAMES[match.group()], text)


def _check_stateless(body: ResponsesRequest) -> None:
    if body.previous_response_id is not None:
        raise UnsupportedParameterError(
            "previous_response_id is not supported: this server keeps no answers; send the whole"
            " conversation as input",
            param="previous_response_id",
        )
    if body.store:
        raise UnsupportedParameterError(
            "store is not supported: this server keeps no answers; leave it out or send false",
            param="store",
        )
    if body.background:
        raise UnsupportedParameterError(
            "background is not supported: this server keeps no answers; use stream: true",
            param="background",
        )


def _messages(body: ResponsesRequest) -> tuple[ChatMessage, ...]:
    messages: list[ChatMessage] = []
    if body.instructions is not None:
        messages.append(ChatMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return (*messages, ChatMessage(role="user", content=body.input))
    turn: _AssistantTurn | None = None
    for place, item in enumerate(body.input):
        path = f"input.{place}"
        if _is_of_assistant(item):
            if turn is not None and _begins_turn(turn, item):
                messages.append(turn.message())
                turn = None
            turn = turn or _AssistantTurn()
            _add_to_turn(turn, item, path)
            continue
        if turn is not None:
            messages.append(turn.message())
            turn = None
        messages.append(_message(item, path))
    if turn is not None:
        messages.append(turn.message())
    return tuple(messages)


def _is_of_assistant(item: InputItem) -> bool:
    if item.type == "message":
        return item.role == "assistant"
    return item.type in ("function_call", "reasoning")


def _begins_turn(turn: _AssistantTurn, item: InputItem) -> bool:
    """Whether the item cannot follow within the turn: turns are reasoning, text, calls."""
    if item.type == "function_call":
        return False
    if turn.calls or turn.content is not None:
        return True
    return item.type == "reasoning" and turn.reasoning is not None


def _add_to_turn(turn: _AssistantTurn, item: InputItem, path: str) -> None:
    if item.type == "message":
        turn.content = _required_text(item.content, f"{path}.content")
    elif item.type == "reasoning":
        turn.reasoning = None if item.content is None else _text(item.content, f"{path}.content")
    else:
        name = _required(item.name, f"{path}.name")
        call_id = _required(item.call_id, f"{path}.call_id")
        arguments = _required(item.arguments, f"{path}.arguments")
        call = ToolCall(id=call_id, function=FunctionCall(name=name, arguments=arguments))
        turn.calls.append(call)


def _message(item: InputItem, path: str) -> ChatMessage:
    if item.type == "function_call_output":
        call_id = _required(item.call_id, f"{path}.call_id")
        output = _required_text(item.output, f"{path}.output")
        return ChatMessage(role="tool", content=output, tool_call_id=call_id)
    if item.type != "message":
        raise UnsupportedParameterError(
            f"{path}.type: only message, function_call, function_call_output and reasoning are"
            " supported",
            param=f"{path}.type",
        )
    if item.role is None:
        raise ClientError(f"{path}.role is missing", param=f"{path}.role")
    return ChatMessage(role=item.role, content=_required_text(item.content, f"{path}.content"))


def _required(value: str | None, param: str) -> str:
    if value is None:
        raise ClientError(f"{param} is missing", param=param)
    return value


def _required_text(value: InputText | None, param: str) -> str:
    if value is None:
        raise ClientError(f"{param} is missing", param=param)
    return _text(value, param)


def _text(value: InputText, param: str) -> str:
    if isinstance(value, str):
        return value
    texts = []
    for place, part in enumerate(value):
        path = f"{param}.{place}"
        if part.type == "refusal":
            texts.append(_required(part.refusal, f"{path}.refusal"))
        elif part.type in _TEXT_PARTS:
            texts.append(_required(part.text, f"{path}.text"))
        else:
            raise UnsupportedParameterError(
                f"{path}.type: only text is supported", param=f"{path}.type"
            )
    return "\n".join(texts)


def _tools(body: ResponsesRequest) -> tuple[Tool, ...] | None:
    if body.tools is None:
        return None
    return tuple(
        Tool(
            type="function",
            function=FunctionDefinition(
                name=tool.name,
                description=tool.description,
                parameters=tool.parameters,
                strict=tool.strict,
            ),
        )
        for tool in body.tools
    )


def _tool_choice(body: ResponsesRequest) -> ToolChoice | None:
    choice = body.tool_choice
    if isinstance(choice, FunctionToolChoice):
        return NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
    return choice


def _response_format(wish: TextFormat | None) -> ResponseFormat | None:
    if wish is None:
        return None
    if wish.type != "json_schema":
        return ResponseFormat(type=wish.type)
    if wish.schema_ is None:
        raise ClientError("text.format.schema is missing", param="text.format.schema")
    schema = JsonSchemaFormat(
        name=wish.name or _DEFAULT_SCHEMA_NAME,
        description=wish.description,
        schema=wish.schema_,
        strict=wish.strict,
    )
    return ResponseFormat(type="json_schema", json_schema=schema)
