"""A client of the chat endpoint: one conversation turn as a stream of pieces. httpx only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve_app.core.errors import XeRayError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 120.0  # the server sends a comment every 15 s, so silence means it is gone


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer: what to show, and whether it is reasoning."""

    text: str
    is_reasoning: bool = False


@dataclass(slots=True)
class TurnStats:
    """What one answer took. Times in seconds, counts in tokens as the server reports them."""

    ttft_s: float | None = None
    total_s: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_reasoning_tokens: int = 0
    finish_reason: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate: the tokens after the first over the time after the first."""
        if self.ttft_s is None or self.num_completion_tokens < 2 or self.total_s <= self.ttft_s:
            return None
        return (self.num_completion_tokens - 1) / (self.total_s - self.ttft_s)

    def line(self) -> str:
        """The statistics as one line."""
        ttft = "-" if self.ttft_s is None else f"{1000 * self.ttft_s:.0f} ms"
        rate = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} tokens/s"
        return (
            f"TTFT {ttft} · {rate} · {self.num_completion_tokens} tokens"
            f" ({self.num_reasoning_tokens} reasoning) · prompt {self.num_prompt_tokens}"
            f" ({self.num_cached_tokens} cached) · {self.total_s:.2f} s"
            f" · {self.finish_reason or 'stopped'}"
        )


@dataclass(slots=True)
class ChatClient:
    """Talks to one server. `parameters` go into every request (temperature, max_tokens, …)."""

    http: httpx.Client
    model: str
    parameters: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    def stream(
        self, messages: list[dict[str, str]], stats: TurnStats
    ) -> Generator[Piece, None, None]:
        """Yield the answer to `messages` piece by piece, filling `stats` on the way.

        Closing the iterator closes the connection, which aborts the generation. Raises XeRayError
        with the server's message.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.parameters,
        }
        started_s = self.clock()
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise XeRayError(error_message(response))
                for event in sse_events(response.iter_lines()):
                    for piece in _pieces(event, stats):
                        if stats.ttft_s is None:
                            stats.ttft_s = self.clock() - started_s
                        yield piece
        except httpx.HTTPError as error:
            raise XeRayError(connection_message(self.http, error)) from None
        finally:
            stats.total_s = self.clock() - started_s


def connect(
    url: str, api_key: str | None, transport: httpx.BaseTransport | None = None
) -> httpx.Client:
    """Return an HTTP client for the server at `url`."""
    base_url = url.rstrip("/").removesuffix("/v1")
    if not base_url.startswith(("http://", "https://")):
        base_url = f"http://{base_url}"
    return httpx.Client(
        base_url=base_url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        transport=transport,
    )


def default_model(http: httpx.Client) -> str:
    """Return the id of the server's first model. Raises XeRayError when there is no server."""
    try:
        response = http.get("/v1/models")
    except httpx.HTTPError as error:
        raise XeRayError(connection_message(http, error)) from None
    if response.status_code != 200:
        raise XeRayError(error_message(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise XeRayError(f"{http.base_url} is no OpenAI-compatible server; check --url") from None


def sse_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON of each `data:` line until `[DONE]`; comments and blank lines are skipped.

    Raises XeRayError if the stream ends without `[DONE]`, or an event is no JSON object.
    """
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise XeRayError("the server sent an event that is no JSON object")
        yield event
    raise XeRayError("the server closed the stream before the answer was complete")


def error_message(response: httpx.Response) -> str:
    """Return the message of an error response, in the OpenAI shape or not."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = response.text.strip()[:200] or "no message"
    return f"the server answered {response.status_code}: {message}"


def connection_message(http: httpx.Client, error: httpx.HTTPError) -> str:
    """Return one line for a connection that failed or broke."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"no server answers at {http.base_url}; start one with: xeray serve"
    return f"the connection to {http.base_url} broke: {type(error).__name__}"


def _pieces(event: dict[str, Any], stats: TurnStats) -> Iterator[Piece]:
    if error := event.get("error"):
        raise XeRayError(f"the answer broke off: {error.get('message', 'unknown error')}")
    if usage := event.get("usage"):
        _read_usage(usage, stats)
    for choice in event.get("choices", ()):
        stats.finish_reason = choice.get("finish_reason") or stats.finish_reason
        delta = choice.get("delta") or {}
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            yield Piece(reasoning, is_reasoning=True)
        if content := delta.get("content"):
            yield Piece(content)


def _read_usage(usage: dict[str, Any], stats: TurnStats) -> None:
    stats.num_prompt_tokens = usage.get("prompt_tokens", 0)
    stats.num_completion_tokens = usage.get("completion_tokens", 0)
    prompt_details = usage.get("prompt_tokens_details") or {}
    completion_details = usage.get("completion_tokens_details") or {}
    stats.num_cached_tokens = prompt_details.get("cached_tokens") or 0
    stats.num_reasoning_tokens = completion_details.get("reasoning_tokens") or 0
