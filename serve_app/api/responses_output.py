"""Answers of the Responses API: items with typed events, read off chat's own parsing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from serve_app.api.errors import error_info, error_message, log_error
from serve_app.api.generation import GenerationResponse
from serve_app.api.output import TokenCounts
from serve_app.api.protocol.responses import FunctionToolChoice, ResponsesRequest, TextFormat
from serve_app.api.sse import json_bytes
from serve_app.core.requests import GenerateChunk
from serve_app.text.tool_calls.stream import ToolDelta

Event = dict[str, Any]

_FAILED = "server_error"
"""The specification's code for a failure that is not the request's fault."""

_ID_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_PART_TYPES = {"reasoning": "reasoning_text", "message": "output_text"}


@dataclass(slots=True)
class _Item:
    """An item of `output` in the making; `name` and `call_id` are a call's."""

    type: str
    id: str
    index: int
    name: str = ""
    call_id: str = ""
    texts: list[str] = field(default_factory=list)
    status: str = "in_progress"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def place(self) -> Event:
        """Where events say that they belong."""
        return {"item_id": self.id, "output_index": self.index}

    @property
    def text_place(self) -> Event:
        return {**self.place, "content_index": 0}

    def part(self, text: str) -> Event:
        part: Event = {"type": _PART_TYPES[self.type], "text": text}
        if self.type == "message":
            part.update({"annotations": [], "logprobs": []})
        return part

    def as_output(self) -> Event:
        """Return the item as it stands; text shows once the item is closed."""
        head = {"type": self.type, "id": self.id, "status": self.status}
        if self.type == "function_call":
            call = {"call_id": self.call_id, "name": self.name}
            return {**head, **call, "arguments": self.closed_text}
        content = [] if self.status == "in_progress" else [self.part(self.text)]
        if self.type == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}

    @property
    def closed_text(self) -> str:
        return "" if self.status == "in_progress" else self.text


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What an answer is called: its id, when it began (Unix seconds), its model."""

    id: str
    created: int
    model: str


class ChatSource(Protocol):
    """What reads an answer's chunks: chat's own parsing, or an upstream's answer."""

    @property
    def tally(self) -> TokenCounts:
        """The token counts so far."""
        ...

    def pieces(self, choice: int, chunk: GenerateChunk) -> tuple[str, str, list[ToolDelta]]:
        """Return what a chunk adds to the reasoning, the content and the calls."""
        ...


class ResponsesOutput:
    """One answer: reasoning, message and function calls, each opened and closed in its turn."""

    def __init__(self, head: AnswerHead, chat: ChatSource, body: ResponsesRequest) -> None:
        self._head = head
        self._chat = chat
        self._settings = _settings(body)
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._is_begun = False
        self._is_cut = False
        self._num_events = 0

    @property
    def tally(self) -> TokenCounts:
        """The token counts so far."""
        return self._chat.tally

    def events(self, choice: int, chunk: GenerateChunk) -> bytes:
        """Return the events for a chunk."""
        events = [] if self._is_begun else self._begin()
        return b"".join(map(self._encode, events + self._take(choice, chunk)))

    def closing_events(self) -> bytes:
        """Return the last event: the whole answer, completed or incomplete."""
        status = "incomplete" if self._is_cut else "completed"
        return self._encode({"type": f"response.{status}", "response": self._response(status)})

    def failed_event(self, error: Exception, request_id: str) -> bytes:
        """Return the last event of an answer that failed half-way; what there is of it stays."""
        info = error_info(error)
        log_error(error, info)
        if self._open is not None:
            self._open.status = "incomplete"
        told = {"code": _FAILED, "message": error_message(info, request_id)}
        response = {**self._response("failed"), "error": told}
        return self._encode({"type": "response.failed", "response": response})

    def add(self, choice: int, chunk: GenerateChunk) -> None:
        """Gather a chunk."""
        self._take(choice, chunk)

    def answer(self) -> bytes:
        """Return the whole answer as JSON."""
        return json_bytes(self._response("incomplete" if self._is_cut else "completed"))

    def _begin(self) -> list[Event]:
        self._is_begun = True
        response = self._response("in_progress")
        return [
            {"type": f"response.{name}", "response": response}
            for name in ("created", "in_progress")
        ]

    def _take(self, choice: int, chunk: GenerateChunk) -> list[Event]:
        reasoning, content, deltas = self._chat.pieces(choice, chunk)
        events: list[Event] = []
        for kind, text in (("reasoning", reasoning), ("message", content)):
            if text:
                events += self._add_text(kind, text)
        for delta in deltas:
            events += self._add_call(delta)
        if chunk.finish_reason is not None:
            self._is_cut = chunk.finish_reason == "length"
            events += [] if self._items else self._open_item("message")
            events += self._close("incomplete" if self._is_cut else "completed")
        return events

    def _add_text(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open.type != kind:
            events = self._close() + self._open_item(kind)
        item = self._opened
        item.texts.append(text)
        event = {"type": f"response.{_PART_TYPES[kind]}.delta", **item.text_place, "delta": text}
        if kind == "message":
            event["logprobs"] = []
        return [*events, event]

    def _add_call(self, delta: ToolDelta) -> list[Event]:
        events: list[Event] = []
        if delta.name is not None:
            events = self._close()
            events += self._open_item("function_call", delta.name, delta.id or "")
        if not delta.arguments:
            return events
        item = self._opened
        item.texts.append(delta.arguments)
        kind = "response.function_call_arguments.delta"
        return [*events, {"type": kind, **item.place, "delta": delta.arguments}]

    @property
    def _opened(self) -> _Item:
        assert self._open is not None
        return self._open

    def _open_item(self, kind: str, name: str = "", call_id: str = "") -> list[Event]:
        place = len(self._items)
        # The answer's id and the place make an id that no other item has.
        item_id = f"{_ID_PREFIXES[kind]}_{self._head.id.rpartition('-')[2]}_{place}"
        item = self._open = _Item(kind, item_id, place, name, call_id)
        self._items.append(item)
        events: list[Event] = [
            {
                "type": "response.output_item.added",
                "output_index": item.index,
                "item": item.as_output(),
            }
        ]
        if kind in _PART_TYPES:
            part = item.part("")
            events.append({"type": "response.content_part.added", **item.text_place, "part": part})
        return events

    def _close(self, status: str = "completed") -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        item.status = status
        text = item.text
        events: list[Event] = []
        if item.type == "function_call":
            told = {"name": item.name, "arguments": text}
            events.append({"type": "response.function_call_arguments.done", **item.place, **told})
        else:
            part = item.part(text)
            rest: Event = {key: part[key] for key in ("text", "logprobs") if key in part}
            done = f"response.{_PART_TYPES[item.type]}.done"
            events.append({"type": done, **item.text_place, **rest})
            events.append({"type": "response.content_part.done", **item.text_place, "part": part})
        output = {"output_index": item.index, "item": item.as_output()}
        return [*events, {"type": "response.output_item.done", **output}]

    def _encode(self, event: Event) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        data = json_bytes({**event, "sequence_number": number})
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)

    def _response(self, status: str) -> Event:
        is_over = status != "in_progress"
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "model": self._head.model,
            "output": [item.as_output() for item in self._items] if is_over else [],
            "usage": self._usage() if is_over else None,
            **self._settings,
        }

    def _usage(self) -> Event:
        usage = self.tally.usage()
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {
                "reasoning_tokens": usage.completion_tokens_details.reasoning_tokens
            },
            "total_tokens": usage.total_tokens,
        }


class ResponsesResponse(GenerationResponse):
    """The answer to a job in the Responses API's form: no [DONE], an error is response.failed."""

    end_of_stream: ClassVar[bytes] = b""
    _output: ResponsesOutput

    def failure_events(self, error: Exception) -> bytes:
        """Return what tells of an error within a stream."""
        return self._output.failed_event(error, self._info.request_id)


def _settings(body: ResponsesRequest) -> Event:
    """Return what the answer repeats of the request."""
    choice = body.tool_choice
    wish = (body.text.format if body.text else None) or TextFormat(type="text")
    return {
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_output_tokens": body.max_output_tokens,
        "tools": [tool.model_dump(include=_TOOL_KEYS) for tool in body.tools or ()],
        "tool_choice": choice.model_dump(include=_CHOICE_KEYS)
        if isinstance(choice, FunctionToolChoice)
        else choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": {"format": wish.model_dump(include=_FORMAT_KEYS, by_alias=True, exclude_none=True)},
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "truncation": "disabled",
        "store": False,
        "background": False,
        "previous_response_id": None,
        "user": body.user,
    }


_TOOL_KEYS = {"type", "name", "description", "parameters", "strict"}
_CHOICE_KEYS = {"type", "name"}
_FORMAT_KEYS = {"type", "name", "description", "schema_", "strict"}
