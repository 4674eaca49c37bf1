"""What the HTTP surface needs from whatever runs the models: the seam to the deployments."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import (
    GenerateChunk,
    GenerateRequest,
    ModelCard,
    PreparedPrompt,
    PrepareRequest,
    ServiceHealth,
)
from serve_app.observability.activity import ActivityReport


class Backend(Protocol):
    """Preparation, generation, health and metrics; in production Ray handles, in tests a fake.

    Any method may raise `XeRayError`; anything else is a bug and becomes a 500 without details.
    """

    async def models(self) -> list[ModelCard]:
        """Return the served models, the default first."""
        ...

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        """Return what the model's engine can do (cached; raises OverloadedError while loading)."""
        ...

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        """Turn messages or text into token ids."""
        ...

    async def detokenize(self, model_id: str, token_ids: tuple[int, ...]) -> str:
        """Turn token ids into text, special tokens included."""
        ...

    async def token_strings(self, model_id: str, token_ids: tuple[int, ...]) -> list[str]:
        """Return each id's own text (for /tokenize with return_token_strs and echo)."""
        ...

    def generate(
        self, model_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Stream one sequence; closing it aborts. An error is raised or is the last chunk."""
        ...

    async def health(self) -> ServiceHealth:
        """Return the state of the replicas."""
        ...

    async def metrics_text(self) -> str:
        """Return Prometheus text: every replica's samples with a `replica` label."""
        ...

    async def activity(self) -> list[ActivityReport]:
        """Return what the other ingress replicas did lately; empty where there are none."""
        ...

    async def profile(self, num_steps: int, timeout_s: float) -> dict[str, Any]:
        """Trace the next engine steps of one replica; figures as `ProfileAnswer` has them."""
        ...

    async def reload(self, model_id: str) -> list[str]:
        """Load the model's files anew, replica by replica; return the replicas' ids."""
        ...

    async def drain(self) -> None:
        """Stop admitting: readyz turns 503, running requests finish."""
        ...
