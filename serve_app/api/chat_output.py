"""Chat completions as a stream or as one answer; reasoning is split off on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve_app.api.jobs import Job, Tally
from serve_app.api.output import chat_logprobs
from serve_app.api.sse import json_bytes, json_string
from serve_app.api.tools import ToolPlan
from serve_app.core.requests import GenerateChunk
from serve_app.text.reasoning import ReasoningParser
from serve_app.text.tool_calls.stream import ToolCallParser, ToolDelta

NO_REASONING = "none"


@dataclass(slots=True)
class _Call:
    """A tool call in the making."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    """One answer in the making."""

    parser: ReasoningParser | None
    tools: ToolCallParser | None
    head: bytes
    has_role: bool = False
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str = "stop"
    stop_reason: str | int | None = None


class ChatOutput:
    """Order of a stream: role with the first token, deltas, the finish chunk alone, the usage."""

    def __init__(
        self, job: Job, reasoning_kind: str, reasoning_field: str, tools: ToolPlan | None = None
    ) -> None:
        self._job = job
        self._field = reasoning_field
        self._field_key = json_string(reasoning_field)
        self._tally = Tally(job)
        self._common = json_bytes(
            {
                "id": job.id,
                "object": "chat.completion.chunk",
                "created": job.created,
                "model": job.card.id,
                "system_fingerprint": job.fingerprint,
            }
        )[:-1]
        self._tail = b'}],"usage":null}\n\n' if job.include_usage else b"}]}\n\n"
        self._choices = [
            _Choice(
                self._new_parser(reasoning_kind, index),
                None if tools is None else tools.new_parser(),
                b'data: %b,"choices":[{"index":%d,"delta":' % (self._common, index),
            )
            for index in range(len(job.requests))
        ]

    @property
    def tally(self) -> Tally:
        """The token counts so far."""
        return self._tally

    def pieces(self, choice: int, chunk: GenerateChunk) -> tuple[str, str, list[ToolDelta]]:
        """Count a chunk; return what it adds to the reasoning, the content and the calls."""
        state = self._choices[choice]
        reasoning, content = self._split(choice, state, chunk)
        return reasoning, *_split_calls(state, content, chunk)

    def events(self, choice: int, chunk: GenerateChunk) -> bytes:
        """Return the events for a chunk: a delta where it says something, then the finish chunk."""
        state = self._choices[choice]
        reasoning, content, deltas = self.pieces(choice, chunk)
        events = b""
        if reasoning or content or chunk.logprobs or not state.has_role:
            events = self._delta(state, reasoning, content, chunk)
        if deltas:
            events += b"".join(self._tool_delta(state, delta) for delta in deltas)
        if chunk.finish_reason is None:
            return events
        finish = {
            "finish_reason": _finish_reason(state, chunk.finish_reason),
            "stop_reason": chunk.stop_reason,
        }
        return b'%b%b{},"logprobs":null,%b%b' % (
            events,
            state.head,
            json_bytes(finish)[1:-1],
            self._tail,
        )

    def closing_events(self) -> bytes:
        """Return the usage chunk where it was asked for."""
        if not self._job.include_usage:
            return b""
        usage = json_bytes(self._tally.usage().model_dump())
        return b'data: %b,"choices":[],"usage":%b}\n\n' % (self._common, usage)

    def add(self, choice: int, chunk: GenerateChunk) -> None:
        """Gather a chunk."""
        state = self._choices[choice]
        reasoning, content, deltas = self.pieces(choice, chunk)
        for delta in deltas:
            if delta.name is not None:
                state.calls.append(_Call(delta.id or "", delta.name))
            state.calls[delta.index].arguments.append(delta.arguments)
        if reasoning:
            state.reasoning.append(reasoning)
        if content:
            state.content.append(content)
        if chunk.logprobs is not None:
            state.logprobs = state.logprobs or []
            state.logprobs += chat_logprobs(chunk.logprobs)
        if chunk.finish_reason is not None:
            state.finish_reason = _finish_reason(state, chunk.finish_reason)
            state.stop_reason = chunk.stop_reason

    def answer(self) -> bytes:
        """Return the ChatCompletion."""
        job = self._job
        return json_bytes(
            {
                "id": job.id,
                "object": "chat.completion",
                "created": job.created,
                "model": job.card.id,
                "system_fingerprint": job.fingerprint,
                "choices": [
                    self._answer_choice(index, state) for index, state in enumerate(self._choices)
                ],
                "usage": self._tally.usage().model_dump(),
            }
        )

    def _answer_choice(self, index: int, state: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(state.content),
            "refusal": None,
        }
        if state.reasoning:
            message[self._field] = "".join(state.reasoning)
        if state.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_answer_call(call) for call in state.calls]
        logprobs = None
        if state.logprobs is not None:
            logprobs = {"content": state.logprobs, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": state.finish_reason,
            "stop_reason": state.stop_reason,
        }

    def _delta(self, state: _Choice, reasoning: str, content: str, chunk: GenerateChunk) -> bytes:
        parts: list[bytes] = []
        if not state.has_role:
            state.has_role = True
            parts.append(b'"role":"assistant"')
            # The role chunk always has content: clients add it up without looking.
            parts.append(b'"content":' + json_string(content))
        elif content or not reasoning:
            parts.append(b'"content":' + json_string(content))
        if reasoning:
            parts.append(b"%b:%b" % (self._field_key, json_string(reasoning)))
        logprobs = b"null"
        if chunk.logprobs:
            logprobs = json_bytes({"content": chat_logprobs(chunk.logprobs), "refusal": None})
        return b'%b{%b},"logprobs":%b,"finish_reason":null%b' % (
            state.head,
            b",".join(parts),
            logprobs,
            self._tail,
        )

    def _tool_delta(self, state: _Choice, delta: ToolDelta) -> bytes:
        function: dict[str, str] = {"arguments": delta.arguments}
        call: dict[str, Any] = {"index": delta.index, "function": function}
        if delta.name is not None:
            call = {
                "index": delta.index,
                "id": delta.id,
                "type": "function",
                "function": {"name": delta.name, **function},
            }
        return b'%b{"tool_calls":[%b]},"logprobs":null,"finish_reason":null%b' % (
            state.head,
            json_bytes(call),
            self._tail,
        )

    def _split(self, choice: int, state: _Choice, chunk: GenerateChunk) -> tuple[str, str]:
        num_tokens = self._tally.add(choice, chunk)
        if state.parser is None:
            return "", chunk.text
        reasoning, content = state.parser.push(chunk.text) if chunk.text else ("", "")
        if chunk.finish_reason is not None:
            rest = state.parser.finish()
            reasoning, content = reasoning + rest[0], content + rest[1]
        if chunk.num_reasoning is not None:
            self._tally.num_reasoning[choice] = chunk.num_reasoning
        elif reasoning and num_tokens:
            # A chunk that holds the end of the reasoning counts by its share of the text.
            share = len(reasoning) / (len(reasoning) + len(content))
            self._tally.add_reasoning(choice, round(num_tokens * share))
        return reasoning, content

    def _new_parser(self, kind: str, choice: int) -> ReasoningParser | None:
        starts_inside = self._job.prompt_of(choice).starts_in_reasoning
        if kind == NO_REASONING:
            return None
        return ReasoningParser(kind, starts_inside)


def _split_calls(state: _Choice, content: str, chunk: GenerateChunk) -> tuple[str, list[ToolDelta]]:
    if state.tools is None:
        return content, []
    content, deltas = state.tools.push(content) if content else ("", [])
    if chunk.finish_reason is not None:
        rest, more = state.tools.finish()
        content, deltas = content + rest, deltas + more
    return content, deltas


def _finish_reason(state: _Choice, reason: str) -> str:
    has_calls = state.tools is not None and state.tools.num_calls > 0
    return "tool_calls" if has_calls and reason == "stop" else reason


def _answer_call(call: _Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": "".join(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}
