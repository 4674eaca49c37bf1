"""Two versions of a model behind one HTTP surface: a share of the requests goes to the new one.

The split is by a stable hash of the request's id (X-Request-Id, where the client gives one), so all
calls of a request meet the same version. Whoever asks for the new version by a name that the old
one does not have gets it, whatever the share.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from serve_app.api.backend import Backend
from serve_app.core.errors import XeRayError
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

Version = Literal["stable", "canary"]
_MAX_SAMPLES = 2000
_MAX_PREPARED = 2000
_CARD_PATIENCE_S, _CARD_PATIENCE_UNUSED_S = 1.0, 0.01
_SERVER_ERROR = 500


@dataclass(slots=True)
class VersionStats:
    """What one version did since the share last changed; samples in seconds, the newest ones."""

    num_requests: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    ttfts_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_SAMPLES))
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_SAMPLES))


def takes_canary(request_id: str, percent: float) -> bool:
    """Whether a request belongs to the canary's share; with a larger share it still does."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 * 100 < percent


class SplitBackend:
    """A Backend over a stable one and, at times, a canary."""

    def __init__(self, stable: Backend, now: Callable[[], float] = time.monotonic) -> None:
        self._stable = stable
        self._canary: Backend | None = None
        self._canary_names: frozenset[str] = frozenset()  # ids that only the new version has
        self._asking: asyncio.Future[list[ModelCard]] | None = None  # for the canary's card
        self._now = now
        self._prepared: OrderedDict[str, tuple[Version, Backend]] = OrderedDict()
        self._num_open: dict[int, int] = {}
        self.percent = 0.0
        self.stats: dict[Version, VersionStats] = {}

    @property
    def canary(self) -> Backend | None:
        """The new version's backend, None while there is none."""
        return self._canary

    def split(self, canary: Backend | None, percent: float) -> None:
        """Send `percent` of the requests to `canary` from now on; counts begin anew."""
        if canary is not self._canary:
            self._asking = None
        self._canary = canary
        self._canary_names = frozenset()
        self.percent = percent if canary is not None else 0.0
        self.stats = {"stable": VersionStats(), "canary": VersionStats()} if canary else {}

    def num_open(self, backend: Backend) -> int:
        """Return how many sequences of a backend still run here."""
        return self._num_open.get(id(backend), 0)

    async def models(self) -> list[ModelCard]:
        """Return the model's card with limits that both versions keep, then the new version's."""
        canary = self._canary
        if canary is None:
            return await self._stable.models()
        if self.percent >= 100:
            return await canary.models()
        cards = await self._stable.models()
        new = await self._canary_card(canary)
        if new is None:
            return cards
        if self.percent > 0:
            cards = [_both(cards[0], new), *cards[1:]]
        if new.id != cards[0].id:
            self._canary_names = frozenset({new.id})
            cards.append(replace(new, aliases=()))
        return cards

    async def _canary_card(self, canary: Backend) -> ModelCard | None:
        """Return the new version's card; None while it cannot tell.

        It may be starting, failing or ending: the old version's requests must not notice.
        """
        if self._asking is None:
            self._asking = asyncio.ensure_future(canary.models())
        asked = self._asking
        if not asked.done():
            patience_s = _CARD_PATIENCE_S if self.percent > 0 else _CARD_PATIENCE_UNUSED_S
            await asyncio.wait({asked}, timeout=patience_s)
        if not asked.done():
            return None
        if asked.cancelled() or asked.exception() is not None:
            self._asking = None  # asked anew by the next request
            return None
        return asked.result()[0]

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        """Return what each version can do that may get the request."""
        canary = self._canary
        if canary is None or self.percent == 0:
            return await self._named(model_id).capabilities(model_id)
        if self.percent >= 100:
            return await canary.capabilities(model_id)
        stable = await self._stable.capabilities(model_id)
        try:
            return _common(stable, await canary.capabilities(model_id))
        except XeRayError:
            return stable

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        """Turn messages or text into token ids, as the request's version does."""
        version, backend = self._choose(model_id, request.request_id)
        try:
            prompt = await backend.prepare(model_id, request)
        except XeRayError:
            if version == "stable" or self.percent >= 100 or self._is_of_canary_alone(model_id):
                raise
            self._count_unprepared()
            version, backend = "stable", self._stable
            prompt = await backend.prepare(model_id, request)
        if self.stats:
            self._prepared[request.request_id] = (version, backend)
            if len(self._prepared) > _MAX_PREPARED:
                self._prepared.popitem(last=False)
        return prompt

    def _count_unprepared(self) -> None:
        """Count a request that the new version could not take; the old one does."""
        if (stats := self.stats.get("canary")) is not None:
            stats.num_requests += 1
            stats.num_failed += 1

    async def detokenize(self, model_id: str, token_ids: tuple[int, ...]) -> str:
        """Turn token ids into text."""
        return await self._named(model_id).detokenize(model_id, token_ids)

    async def token_strings(self, model_id: str, token_ids: tuple[int, ...]) -> list[str]:
        """Return each id's own text."""
        return await self._named(model_id).token_strings(model_id, token_ids)

    def generate(
        self, model_id: str, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Stream one sequence of the request's version."""
        key = request.trace_context.get("x-request-id", request.request_id)
        # The share may have changed since the ids were made, and versions may differ in their ids.
        version, backend = self._prepared.get(key) or self._choose(model_id, key)
        chunks = backend.generate(model_id, request)
        if not self.stats:
            return chunks
        return self._measured(chunks, backend, self.stats[version])

    async def activity(self) -> list[ActivityReport]:
        """Return what the other ingress replicas did lately."""
        return await self._stable.activity()

    async def health(self) -> ServiceHealth:
        """Return the state of the version that has the larger share."""
        if self._canary is not None and self.percent >= 100:
            return await self._canary.health()
        return await self._stable.health()

    async def metrics_text(self) -> str:
        """Return the application's own metrics; the new version's come from its own service."""
        return await self._stable.metrics_text()

    async def profile(self, num_steps: int, timeout_s: float) -> dict[str, Any]:
        """Trace engine steps of the version that has the larger share."""
        backend = self._canary if self._canary is not None and self.percent >= 100 else self._stable
        return await backend.profile(num_steps, timeout_s)

    async def reload(self, model_id: str) -> list[str]:
        """Load a version's model anew."""
        return await self._named(model_id).reload(model_id)

    async def drain(self) -> None:
        """Admit nothing new."""
        await self._stable.drain()

    def _choose(self, model_id: str, key: str) -> tuple[Version, Backend]:
        canary = self._canary
        if canary is None:
            return "stable", self._stable
        if takes_canary(key, self.percent) or self._is_of_canary_alone(model_id):
            return "canary", canary
        return "stable", self._stable

    def _named(self, model_id: str) -> Backend:
        canary = self._canary
        if canary is not None and (self.percent >= 100 or self._is_of_canary_alone(model_id)):
            return canary
        return self._stable

    def _is_of_canary_alone(self, model_id: str) -> bool:
        return model_id in self._canary_names

    async def _measured(
        self,
        chunks: AsyncGenerator[GenerateChunk, None],
        backend: Backend,
        stats: VersionStats,
    ) -> AsyncGenerator[GenerateChunk, None]:
        started_s = self._now()
        stats.num_requests += 1
        self._num_open[id(backend)] = self.num_open(backend) + 1
        is_first = True
        try:
            async for chunk in chunks:
                if chunk.error is not None:
                    stats.num_failed += chunk.error.status >= _SERVER_ERROR
                elif is_first:
                    stats.ttfts_s.append(self._now() - started_s)
                    is_first = False
                if chunk.finish_reason is not None:
                    stats.num_tokens += chunk.num_generated
                    stats.latencies_s.append(self._now() - started_s)
                yield chunk
        except XeRayError as error:
            stats.num_failed += error.info().status >= _SERVER_ERROR
            raise
        finally:
            await chunks.aclose()
            self._num_open[id(backend)] -= 1


def _both(stable: ModelCard, new: ModelCard) -> ModelCard:
    return replace(
        stable,
        max_model_len=min(stable.max_model_len, new.max_model_len),
        vocab_size=min(stable.vocab_size, new.vocab_size),
    )


def _common(stable: EngineCapabilities, new: EngineCapabilities) -> EngineCapabilities:
    flags = {
        item.name: getattr(stable, item.name) and getattr(new, item.name)
        for item in fields(EngineCapabilities)
        if item.name != "batching_modes"
    }
    modes = tuple(mode for mode in stable.batching_modes if mode in new.batching_modes)
    return EngineCapabilities(batching_modes=modes, **flags)
