"""How the chunks of a job become an answer or a stream; one implementation per endpoint."""

from __future__ import annotations

from typing import Any, Protocol

from serve_app.api.protocol.usage import Usage
from serve_app.core.requests import GenerateChunk, LogprobItem

MIN_LOGPROB = -9999.0
"""JSON has no -inf; the field's convention for an impossible token."""


class TokenCounts(Protocol):
    """Tells an answer's token counts."""

    def usage(self) -> Usage:
        """Return the counts so far."""
        ...


class Output(Protocol):
    """Turns chunks into bytes of a stream, or gathers them into one answer. Never both."""

    def events(self, choice: int, chunk: GenerateChunk) -> bytes:
        """Return the events for a chunk of a stream; b"" where there is nothing to say yet."""
        ...

    def closing_events(self) -> bytes:
        """Return what follows the last finish chunk, before [DONE]."""
        ...

    def add(self, choice: int, chunk: GenerateChunk) -> None:
        """Gather a chunk of an answer that is not streamed."""
        ...

    def answer(self) -> bytes:
        """Return the whole answer as JSON."""
        ...

    @property
    def tally(self) -> TokenCounts:
        """The token counts so far."""
        ...


def chat_logprobs(items: tuple[LogprobItem, ...]) -> list[dict[str, Any]]:
    """Return log-probabilities in the chat form."""
    return [
        {
            "token": item.token,
            "logprob": clamp(item.logprob),
            "bytes": list(item.bytes),
            "top_logprobs": [
                {"token": token, "logprob": clamp(logprob), "bytes": list(raw)}
                for token, logprob, raw in item.top
            ],
        }
        for item in items
    ]


def clamp(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    # Written so that NaN, too, becomes the least value.
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
