"""One request to an OpenAI-compatible upstream, its answer passed on as it comes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve_app.config.schema import FallbackSection
from serve_app.core.errors import OverloadedError

_logger = logging.getLogger(__name__)

NO_ANSWER = "Neither this service nor its fallback can answer now."
_DATA = b"data:"


class UpstreamError(OverloadedError):
    """The upstream gave no answer that could be passed on."""


@dataclass(slots=True)
class UpstreamAnswer:
    """A successful answer, whose body has not been read yet. Close it by leaving `stack`."""

    status: int
    content_type: str
    body: AsyncIterator[bytes]
    stack: AsyncExitStack
    counter: TokenCounter = field(default_factory=lambda: TokenCounter())


class TokenCounter:
    """Counts the tokens of a passing answer: its `usage`, else one for each delta of a stream."""

    def __init__(self) -> None:
        self._buffer = b""
        self._num_deltas = 0
        self._usage = 0

    @property
    def num_tokens(self) -> int:
        """Tokens so far, prompt included where the upstream told."""
        return self._usage or self._num_deltas

    def feed(self, data: bytes, *, is_stream: bool) -> None:
        """Look at a piece of the body."""
        self._buffer += data
        if not is_stream:
            return
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._take(line[len(_DATA) :])

    def finish(self, *, is_stream: bool) -> None:
        """Look at a whole answer, once it is complete."""
        if not is_stream:
            self._take(self._buffer)

    def _take(self, text: bytes) -> None:
        try:
            value: Any = json.loads(text)
        except ValueError:  # [DONE]
            return
        if isinstance(value, dict):
            self._num_deltas += bool(value.get("choices"))
            usage = value.get("usage")
            if isinstance(usage, dict) and isinstance(usage.get("total_tokens"), int):
                self._usage = usage["total_tokens"]


class Upstream:
    """The upstream of one ingress replica; the connections are opened with the first request.

    `model`: what it is asked for, None for the client's.
    """

    def __init__(
        self, section: FallbackSection, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        assert section.url is not None, "made only where a fallback is configured"
        self._url = section.url.rstrip("/")
        self.model = section.model
        self._key_variable = section.api_key_env
        self._timeout = httpx.Timeout(section.timeout_s, connect=section.connect_timeout_s)
        self._transport = transport
        self._client: httpx.AsyncClient | None = None

    async def send(self, path: str, body: dict[str, Any], request_id: str) -> UpstreamAnswer:
        """Ask the upstream. Raises UpstreamError where it cannot be reached or says 4xx or 5xx.

        `path` is ours (/v1/chat/completions); the configured URL ends before it.
        """
        headers = {"X-Request-Id": request_id}
        key = os.environ.get(self._key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        sent = {**body, "model": self.model or body.get("model")}
        stack = AsyncExitStack()
        try:
            request = self._open().stream(
                "POST", self._url + path.removeprefix("/v1"), json=sent, headers=headers
            )
            response = await stack.enter_async_context(request)
        except (httpx.HTTPError, OSError) as error:
            await stack.aclose()
            _logger.warning("fallback: %s: %s", type(error).__name__, error)
            raise UpstreamError(NO_ANSWER) from error
        except BaseException:
            await stack.aclose()
            raise
        if response.status_code >= 400:
            await stack.aclose()
            _logger.warning("fallback: the upstream answered %d", response.status_code)
            raise UpstreamError(NO_ANSWER)
        content_type = response.headers.get("content-type", "application/json")
        return UpstreamAnswer(response.status_code, content_type, response.aiter_bytes(), stack)

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=self._timeout, transport=self._transport)
        return self._client
