"""The HTTP surface over a clock, as a program of its own that can be killed: PORT NAME RATE."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator

import uvicorn

from serve_app.api.app import create_app
from serve_app.config.schema import AppConfig
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import (
    GenerateChunk,
    GenerateRequest,
    ModelCard,
    PreparedPrompt,
    PrepareRequest,
    ReplicaHealth,
    ServiceHealth,
)


class PacedBackend:
    """Says its own name, a token at a time, `rate` tokens a second per stream."""

    def __init__(self, name: str, rate: float) -> None:
        self._name = name
        self._period_s = 1.0 / rate

    async def models(self) -> list[ModelCard]:
        return [ModelCard("paced", ("*",), 4096, 300, 1_700_000_000, "paced", (299,))]

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        return EngineCapabilities()

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        return PreparedPrompt(tuple((request.text or "chat").encode()))

    async def detokenize(self, model_id: str, token_ids: tuple[int, ...]) -> str:
        return bytes(token_ids).decode()

    async def token_strings(self, model_id: str, token_ids: tuple[int, ...]) -> list[str]:
        return [chr(token_id) for token_id in token_ids]

    async def generate(
        self, model_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        num_prompt = len(request.prompt_token_ids)
        for place in range(request.sampling.max_tokens):
            await asyncio.sleep(self._period_s)
            yield GenerateChunk(
                self._name, (place % 256,), num_prompt=num_prompt, num_generated=place + 1
            )
        yield GenerateChunk(
            finish_reason="length", num_prompt=num_prompt, num_generated=request.sampling.max_tokens
        )

    async def health(self) -> ServiceHealth:
        return ServiceHealth(True, "ready", (ReplicaHealth(self._name, "ready"),))

    async def metrics_text(self) -> str:
        return ""

    async def drain(self) -> None:
        return


def main() -> None:
    port, name, rate = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    app = create_app(PacedBackend(name, rate), AppConfig())
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
