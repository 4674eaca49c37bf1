"""How a request goes to the upstream and its answer comes back: as they are, or translated.

Chat and completions pass unchanged. Few upstreams have the Responses API, so such a request leaves
as the chat request that asks for the same, and the chat answer is told in the Responses API's form.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.api.errors import error_event
from serve_app.api.jobs import new_id
from serve_app.api.protocol.base import parse_request
from serve_app.api.protocol.responses import ResponsesRequest
from serve_app.api.protocol.usage import CompletionTokensDetails, PromptTokensDetails, Usage
from serve_app.api.responses_input import to_chat
from serve_app.api.responses_output import AnswerHead, ResponsesOutput
from serve_app.api.sse import DONE
from serve_app.core.requests import GenerateChunk
from serve_app.text.tool_calls.stream import ToolDelta

CHAT_PATH = "/v1/chat/completions"
RESPONSES_PATH = "/v1/responses"

_DATA = b"data:"
_Pieces = tuple[str, str, list[ToolDelta]]


class BrokenAnswerError(Exception):
    """The upstream's answer ended too early, or is none that can be read."""


class Passage(Protocol):
    """One request: where it goes, as what, and how the answer is told."""

    @property
    def path(self) -> str:
        """Our path of what is asked for there."""
        ...

    @property
    def body(self) -> dict[str, Any]:
        """The request's object."""
        ...

    def pieces(self, data: AsyncIterator[bytes], is_stream: bool) -> AsyncIterator[bytes]:
        """Yield what the client gets. Raises BrokenAnswerError, and what `data` raises."""
        ...

    def failure(self, error: Exception, request_id: str) -> bytes:
        """Return what ends a stream that broke off."""
        ...


def passage_of(path: str, raw: bytes, asked: dict[str, Any], model: str | None) -> Passage:
    """Return how a request passes to an upstream that is asked for `model`, None: the client's.

    Raises ClientError where it asks for what has no translation.
    """
    return ResponsesPassage(raw, model) if path == RESPONSES_PATH else PlainPassage(path, asked)


@dataclass(frozen=True, slots=True)
class PlainPassage:
    """A request that the upstream understands as it is."""

    path: str
    body: dict[str, Any]

    def pieces(self, data: AsyncIterator[bytes], is_stream: bool) -> AsyncIterator[bytes]:
        """Yield the answer's bytes as they come."""
        return data

    def failure(self, error: Exception, request_id: str) -> bytes:
        """Return an error event and the end of the stream."""
        return error_event(error, request_id) + DONE


class ResponsesPassage:
    """A request of the Responses API that goes as chat. Raises ClientError as `to_chat` does."""

    def __init__(self, raw: bytes, model: str | None) -> None:
        asked = parse_request(ResponsesRequest, raw)
        self.path = CHAT_PATH
        self.body = _chat_body(asked)
        self._chat = _UpstreamChat()
        head = AnswerHead(new_id("resp"), int(time.time()), model or asked.model or "")
        self._output = ResponsesOutput(head, self._chat, asked)

    async def pieces(self, data: AsyncIterator[bytes], is_stream: bool) -> AsyncIterator[bytes]:
        """Yield typed events, or the whole answer in one piece."""
        if not is_stream:
            value = _object(b"".join([piece async for piece in data]))
            self._output.add(0, self._chat.take(value, "message"))
            self._check_whole()
            yield self._output.answer()
            return
        async for value in _events(data):
            if "error" in value:
                raise BrokenAnswerError
            is_first = not self._chat.has_begun
            chunk = self._chat.take(value, "delta")
            if is_first or self._chat.has_news or chunk.finish_reason is not None:
                yield self._output.events(0, chunk)
        self._check_whole()
        yield self._output.closing_events()

    def failure(self, error: Exception, request_id: str) -> bytes:
        """Return response.failed, which keeps what there is of the answer."""
        return self._output.failed_event(error, request_id)

    def _check_whole(self) -> None:
        if not self._chat.is_finished:
            raise BrokenAnswerError


def _chat_body(asked: ResponsesRequest) -> dict[str, Any]:
    """Return the chat request, without what other servers refuse in a conversation's history."""
    body = to_chat(asked).model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude_none=True
    )
    for message in body["messages"]:
        message.pop("reasoning_content", None)
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return body


@dataclass(slots=True)
class _UpstreamChat:
    """Plays ChatOutput's part for an answer that is parsed already: its pieces and its counts."""

    has_begun: bool = False
    is_finished: bool = False
    _pieces: _Pieces = ("", "", [])
    _usage: dict[str, Any] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)

    @property
    def tally(self) -> _UpstreamChat:
        """The token counts so far."""
        return self

    @property
    def has_news(self) -> bool:
        """Whether the last `take` brought any text or call."""
        return any(self._pieces)

    def usage(self) -> Usage:
        """Return what the upstream counted, 0 where it told nothing."""
        prompt, completion = (_count(self._usage, f"{kind}_tokens") for kind in _KINDS)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=_count(self._usage.get("prompt_tokens_details"), "cached_tokens")
            ),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=_count(
                    self._usage.get("completion_tokens_details"), "reasoning_tokens"
                )
            ),
        )

    def take(self, value: dict[str, Any], part: str) -> GenerateChunk:
        """Read an answer (`part` message) or an event (delta). Raises BrokenAnswerError."""
        self.has_begun = True
        self._pieces = ("", "", [])
        if isinstance(value.get("usage"), dict):
            self._usage = value["usage"]
        choices = value.get("choices")
        if not choices:  # the usage event has none
            return GenerateChunk()
        try:
            told = choices[0].get(part) or {}
            reasoning = told.get("reasoning_content") or told.get("reasoning") or ""
            calls = [self._call(call, place) for place, call in _numbered(told.get("tool_calls"))]
            self._pieces = (str(reasoning), str(told.get("content") or ""), calls)
            reason = choices[0].get("finish_reason")
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            raise BrokenAnswerError from None
        if reason is None:
            return GenerateChunk()
        self.is_finished = True
        return GenerateChunk(finish_reason="length" if reason == "length" else "stop")

    def pieces(self, choice: int, chunk: GenerateChunk) -> _Pieces:
        """Return what the last `take` brought."""
        return self._pieces

    def _call(self, call: dict[str, Any], place: int) -> ToolDelta:
        """Return a call, or a piece of one; id and name come with its first piece."""
        index, function = int(call.get("index", place)), call.get("function") or {}
        arguments = str(function.get("arguments") or "")
        if index in self._seen:
            return ToolDelta(index, arguments=arguments)
        self._seen.add(index)
        name = str(function["name"])
        return ToolDelta(index, id=str(call.get("id") or ""), name=name, arguments=arguments)


_KINDS = ("prompt", "completion")


def _numbered(calls: Any) -> list[tuple[int, Any]]:
    return list(enumerate(calls or ()))


def _count(values: Any, name: str) -> int:
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0


def _object(text: bytes) -> dict[str, Any]:
    try:
        value: Any = json.loads(text)
    except ValueError:
        raise BrokenAnswerError from None
    if not isinstance(value, dict):
        raise BrokenAnswerError
    return value


async def _events(data: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream of events, up to [DONE]."""
    buffer = b""
    async for piece in data:
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            if not line.startswith(_DATA):
                continue
            text = line.removeprefix(_DATA).strip()
            if text == b"[DONE]":
                return
            yield _object(text)
