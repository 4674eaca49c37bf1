"""Completions as a stream or as one answer: echo, and log-probabilities in the completions form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve_app.api.jobs import Job, Tally
from serve_app.api.output import clamp
from serve_app.api.sse import json_bytes, json_string
from serve_app.core.requests import GenerateChunk, LogprobItem


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt to be repeated before its answer; `tokens` are its ids' texts (for logprobs)."""

    text: str
    tokens: tuple[str, ...] = ()


@dataclass(slots=True)
class _Logprobs:
    """Columns of the completions form; `offset` is where the next token starts, in characters."""

    has_top: bool
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: str, item: LogprobItem | None) -> None:
        self.tokens.append(token)
        self.text_offset.append(self.offset)
        self.offset += len(token)
        self.token_logprobs.append(None if item is None else clamp(item.logprob))
        if self.has_top:
            self.top_logprobs.append(None if item is None else _top(item))

    def take(self) -> dict[str, Any] | None:
        """Return the rows since the last call, or None without any."""
        if not self.tokens:
            return None
        rows = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs if self.has_top else None,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs = [], []
        self.top_logprobs, self.text_offset = [], []
        return rows


@dataclass(slots=True)
class _Choice:
    head: bytes
    logprobs: _Logprobs | None
    echo: Echo | None
    text: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_reason: str | int | None = None


class CompletionOutput:
    """Order of a stream: the echo, deltas, the finish chunk alone, the usage."""

    def __init__(
        self, job: Job, echoes: tuple[Echo, ...] | None = None, num_logprobs: int | None = None
    ) -> None:
        self._job = job
        self._tally = Tally(job)
        self._common = json_bytes(
            {
                "id": job.id,
                "object": "text_completion",
                "created": job.created,
                "model": job.card.id,
                "system_fingerprint": job.fingerprint,
            }
        )[:-1]
        self._tail = b'}],"usage":null}\n\n' if job.include_usage else b"}]}\n\n"
        self._choices = [
            _Choice(
                b'data: %b,"choices":[{"index":%d,"text":' % (self._common, index),
                None if num_logprobs is None else _Logprobs(has_top=num_logprobs > 0),
                echoes[index // job.n] if echoes else None,
            )
            for index in range(len(job.requests))
        ]

    @property
    def tally(self) -> Tally:
        """The token counts so far."""
        return self._tally

    def events(self, choice: int, chunk: GenerateChunk) -> bytes:
        """Return the events for a chunk: echo and delta in one, then the finish chunk."""
        state = self._choices[choice]
        self._tally.add(choice, chunk)
        text = self._take_echo(state, chunk) + chunk.text
        rows = self._take_logprobs(state, chunk)
        events = b""
        if text or rows:
            logprobs = json_bytes(rows) if rows else b"null"
            events = b'%b%b,"logprobs":%b,"finish_reason":null%b' % (
                state.head,
                json_string(text),
                logprobs,
                self._tail,
            )
        if chunk.finish_reason is None:
            return events
        finish = {"finish_reason": chunk.finish_reason, "stop_reason": chunk.stop_reason}
        return b'%b%b"","logprobs":null,%b%b' % (
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
        self._tally.add(choice, chunk)
        state.text.append(self._take_echo(state, chunk) + chunk.text)
        self._note_logprobs(state, chunk)
        if chunk.finish_reason is not None:
            state.finish_reason = chunk.finish_reason
            state.stop_reason = chunk.stop_reason

    def answer(self) -> bytes:
        """Return the Completion."""
        job = self._job
        return json_bytes(
            {
                "id": job.id,
                "object": "text_completion",
                "created": job.created,
                "model": job.card.id,
                "system_fingerprint": job.fingerprint,
                "choices": [
                    {
                        "index": index,
                        "text": "".join(state.text),
                        "logprobs": state.logprobs.take() if state.logprobs else None,
                        "finish_reason": state.finish_reason,
                        "stop_reason": state.stop_reason,
                    }
                    for index, state in enumerate(self._choices)
                ],
                "usage": self._tally.usage().model_dump(),
            }
        )

    def _take_echo(self, state: _Choice, chunk: GenerateChunk) -> str:
        echo, state.echo = state.echo, None
        if echo is None:
            return ""
        if state.logprobs is not None:
            items = chunk.prompt_logprobs or (None,) * len(echo.tokens)
            for token, item in zip(echo.tokens, items, strict=True):
                state.logprobs.add(token, item)
        return echo.text

    def _take_logprobs(self, state: _Choice, chunk: GenerateChunk) -> dict[str, Any] | None:
        self._note_logprobs(state, chunk)
        return state.logprobs.take() if state.logprobs is not None else None

    def _note_logprobs(self, state: _Choice, chunk: GenerateChunk) -> None:
        if state.logprobs is not None:
            for item in chunk.logprobs or ():
                state.logprobs.add(item.token, item)


def _top(item: LogprobItem) -> dict[str, float]:
    best = {token: clamp(logprob) for token, logprob, _ in reversed(item.top)}
    best.setdefault(item.token, clamp(item.logprob))
    return best
