"""The HTTP surface's Backend over Ray Serve handles."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_app.core.errors import EngineError, XeRayError, error_from_info
from serve_app.core.events import EngineCapabilities, EngineInfo
from serve_app.core.requests import (
    GenerateChunk,
    GenerateRequest,
    ModelCard,
    PreparedPrompt,
    PrepareRequest,
    ServiceHealth,
)
from serve_app.deployments.continuation import ContinuationPolicy, ContinuedGeneration
from serve_app.deployments.handles import call_all, call_one
from serve_app.deployments.pools import ModelPools, RoutedCall
from serve_app.deployments.prompt_preparation import PreparedText
from serve_app.deployments.ray_generation import OpenStream, RayGeneration, next_chunk
from serve_app.deployments.ray_private import with_own_request_id
from serve_app.deployments.relay_receiver import Inbox, RelayReceiver
from serve_app.deployments.replica_monitor import MISSED_S, ReplicaMonitor
from serve_app.deployments.replica_silence import SilenceWatch, WatchedCall
from serve_app.deployments.routing import Ticket
from serve_app.observability.activity import ActivityReport
from serve_app.observability.aggregate import RecentExpositions, merge_expositions

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_BACKOFF_S = 0.1
_PREPARE_TIMEOUT_S = 30.0
_INFO_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 2.0
"""With the monitor's period less than what it allows: one that hangs must not hide the others."""
_WAKE_TIMEOUT_S = 600.0
_METRICS_TIMEOUT_S = 2.0
_METRICS_CACHE_S = 1.0
_POLL_S = 1.0
_PROFILE_SPARE_S = 60.0


class RayBackend:
    """Preparation and generation through handles; nothing of it is kept when a request ends."""

    def __init__(
        self,
        preprocessor: DeploymentHandle,
        model: DeploymentHandle | ModelPools,
        ingress: DeploymentHandle | None = None,
    ) -> None:
        self._preprocessor = preprocessor
        self._pools = model if isinstance(model, ModelPools) else ModelPools.single(model)
        self._ingress = ingress
        self._card: ModelCard | None = None
        self._info: EngineInfo | None = None
        self._metrics: tuple[float, str] = (-_METRICS_CACHE_S, "")
        self._metrics_lock = asyncio.Lock()
        self._expositions = RecentExpositions(MISSED_S)
        self._relay = RelayReceiver(self._pools.hear)
        self._tasks: set[asyncio.Future[Any]] = set()
        self.continuation = ContinuationPolicy()
        self.on_retried: Callable[[], None] = lambda: None
        self.on_moved: Callable[[], None] = lambda: None
        self.on_continued: Callable[[], None] = lambda: None
        self.silence = SilenceWatch()
        self.monitor = ReplicaMonitor(lambda: self._pools.ask(_HEALTH_TIMEOUT_S))
        self.monitor.on_refreshed = self._give_up_silent
        self.monitor.can_sleep = self._pools.can_sleep

    async def start(self, relay_host: str) -> None:
        """Begin to ask the replicas, and to listen for their chunks at `relay_host`."""
        self.monitor.start()
        try:
            await self._relay.start(relay_host)
        except OSError as error:
            logger.warning("no token relay at %s, Ray carries all tokens: %s", relay_host, error)

    async def stop(self) -> None:
        """Ask no more and close the relay; what still runs loses it."""
        await self.monitor.stop()
        self._relay.close()

    async def models(self) -> list[ModelCard]:
        """Return the one model; its context as the engine really has it, once that is known."""
        if self._card is None:
            self._card = await call_one(
                lambda: self._preprocessor.card.remote(), "preprocessor", _INFO_TIMEOUT_S
            )
        if self._info is not None and self._info.max_model_len < self._card.max_model_len:
            self._card = replace(self._card, max_model_len=self._info.max_model_len)
        return [self._card]

    async def capabilities(self, model_id: str) -> EngineCapabilities:
        """Return what the engine can do. Raises OverloadedError while no replica is up."""
        if self._info is None:
            await self._require_replica()
            timeout_s = _WAKE_TIMEOUT_S if self._pools.can_sleep else _INFO_TIMEOUT_S
            self._info = await call_one(
                lambda: self._pools.info_handle().info.remote(), "model replica", timeout_s
            )
        return self._info.capabilities

    async def prepare(self, model_id: str, request: PrepareRequest) -> PreparedPrompt:
        """Return the prompt's token ids, or what was wrong with it as `error`."""
        return await call_one(
            lambda: with_own_request_id(lambda: self._preprocessor.prepare.remote(request)),
            "preprocessor",
            _PREPARE_TIMEOUT_S,
        )

    async def detokenize(self, model_id: str, token_ids: tuple[int, ...]) -> str:
        """Return the ids' text. Raises ClientError on an id out of range."""
        return (await self._text("detokenize", token_ids)).text

    async def token_strings(self, model_id: str, token_ids: tuple[int, ...]) -> list[str]:
        """Return each id's own text. Raises ClientError on an id out of range."""
        return list((await self._text("token_strings", token_ids)).parts)

    async def _text(self, method: str, token_ids: tuple[int, ...]) -> PreparedText:
        call = getattr(self._preprocessor, method)
        result: PreparedText = await call_one(
            lambda: call.remote(token_ids), "preprocessor", _PREPARE_TIMEOUT_S
        )
        if result.error is not None:
            raise error_from_info(result.error)
        return result

    def generate(self, model_id: str, request: GenerateRequest) -> ContinuedGeneration:
        """Stream one sequence; another replica is tried as long as no chunk has gone out.

        One that is lost later goes on elsewhere where `continuation` allows it. Raises XeRayError;
        closing the generator cancels the call, which aborts the sequence.
        """
        return ContinuedGeneration(
            lambda wanted: RayGeneration(self, wanted),
            request,
            self.continuation,
            self.on_continued,
        )

    def add_inbox(self) -> Inbox | None:
        """Return an inbox at the relay for one call, None where there is none."""
        return self._relay.add()

    def remove_inbox(self, inbox: Inbox | None) -> None:
        """Forget an inbox."""
        if inbox is not None:
            self._relay.remove(inbox)

    def keep(self, task: asyncio.Future[Any]) -> None:
        """Hold a task until it is done; how it ends is of no interest."""
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def open_stream(self, request: GenerateRequest) -> OpenStream:
        """Return a stream whose first chunk is no error. Raises XeRayError."""
        tried: list[str] = []
        names = _names(request.request_id)
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            await self._require_replica()
            opened = await self._open_once(request, names, tried)
            if isinstance(opened, OpenStream):
                return opened
            if not self._may_try_again(opened, attempt):
                raise opened
            logger.warning("request %s: %s; trying again", request.request_id, opened.message)
            self.on_retried()
            if opened.code != "queue_full":
                await asyncio.sleep(_BACKOFF_S * attempt)
        raise AssertionError("unreachable")

    async def _open_once(
        self, request: GenerateRequest, names: Iterator[str], tried: list[str]
    ) -> OpenStream | XeRayError:
        """Send a request, and again wherever its place moves to before it has begun.

        Each time under the next of `names`. Returns the error where it failed; the replica is then
        among `tried`.
        """
        place: Ticket | None = None
        while True:
            inbox = self.add_inbox()
            relay = request.relay if inbox is None else inbox.target
            sent = replace(request, request_id=next(names), relay=relay)
            call = self._pools.send(sent, place) if place else self._pools.start(sent, tried)
            place = None
            watched = self.silence.add(call.replica_id)
            is_open = False
            try:
                first = await self._first_chunk(call, watched)
                if first is None:
                    place = call.ticket
                elif first.error is None:
                    is_open = True
                    call.note_first_chunk(first)
                    return OpenStream(call.stream, first, inbox, call, watched)
                else:
                    error = error_from_info(first.error)
            except XeRayError as failure:
                error = failure
            except BaseException:  # the client has gone
                call.stream.cancel()
                raise
            finally:
                if not is_open:
                    self.remove_inbox(inbox)
                    self.silence.remove(watched)
                    if place is None:
                        call.close()
            if place is None:
                if call.replica_id is not None:
                    tried.append(call.replica_id)
                return error
            call.stream.cancel()
            self.on_moved()

    def _may_try_again(self, error: XeRayError, attempt: int) -> bool:
        """Whether another try is worth it: of full queues each replica's is asked once, at once."""
        if error.code == "queue_full" and attempt >= len(self.monitor.replicas()):
            return False
        return error.is_retryable and attempt < _MAX_ATTEMPTS

    async def health(self) -> ServiceHealth:
        """Return the replicas' state as last heard, at most a second old."""
        return self.monitor.health()

    async def metrics_text(self) -> str:
        """Return the samples of every replica of every deployment; kept for a second."""
        async with self._metrics_lock:
            if time.monotonic() - self._metrics[0] >= _METRICS_CACHE_S:
                self._metrics = (time.monotonic(), await self._gather_metrics())
        return self._metrics[1]

    async def activity(self) -> list[ActivityReport]:
        """Return what each ingress replica did lately, this one among them."""
        if self._ingress is None:
            return []
        return await call_all(self._ingress, "activity", _METRICS_TIMEOUT_S)

    async def profile(self, num_steps: int, timeout_s: float) -> dict[str, Any]:
        """Trace engine steps of the replica that Serve chooses. Raises OverloadedError if none."""
        await self._require_replica()
        handle = self._pools.info_handle()
        figures: dict[str, Any] = await call_one(
            lambda: handle.profile.remote(num_steps, timeout_s),
            "model replica",
            timeout_s + _PROFILE_SPARE_S,
        )
        return figures

    async def reload(self, model_id: str) -> list[str]:
        """Load the model anew, replica by replica; returns the ids of those that did.

        Raises OverloadedError while no replica is up, EngineError where one did not come back.
        """
        await self._require_replica()
        done: list[str] = []
        for health in self.monitor.replicas():
            answers = await asyncio.gather(
                *(
                    call_all(handle, "reload", _WAKE_TIMEOUT_S, health.replica_id)
                    for handle in self._pools.handles
                )
            )
            if health.replica_id not in [one for group in answers for one in group]:
                raise EngineError(
                    f"replica {health.replica_id} was not loaded anew;"
                    f" {len(done)} before it were: {', '.join(done) or 'none'}"
                )
            done.append(health.replica_id)
        return done

    async def drain(self) -> None:
        """Take nothing new, on any ingress replica; what runs goes on."""
        self.monitor.is_draining = True
        if self._ingress is not None:
            await call_all(self._ingress, "drain", _INFO_TIMEOUT_S)

    async def _gather_metrics(self) -> str:
        handles = [*self._pools.handles, self._preprocessor]
        if self._ingress is not None:
            handles.append(self._ingress)
        answers: list[list[Any]] = await asyncio.gather(
            *(call_all(handle, "metrics_text", _METRICS_TIMEOUT_S) for handle in handles)
        )
        texts = dict(answer for group in answers for answer in group)
        return merge_expositions(self._expositions.update(texts))

    async def _require_replica(self) -> None:
        """Raise OverloadedError where no model replica is up: Serve's queue would wait."""
        if self.monitor.has_live_replica():
            return
        await self.monitor.refresh()
        if not self.monitor.has_live_replica() and not self._pools.can_sleep:
            raise self.monitor.unavailable()

    def _give_up_silent(self) -> None:
        """Tell calls of replicas that do not answer any more, while others do or none is left."""
        self.silence.update({health.replica_id for health in self.monitor.replicas()})

    async def _first_chunk(self, call: RoutedCall, watched: WatchedCall) -> GenerateChunk | None:
        """Wait for the first chunk, but not for ever for a replica that is gone.

        None where the call's place has moved to another replica instead.
        """
        stream = call.stream
        waiting = asyncio.ensure_future(watched.race(asyncio.ensure_future(next_chunk(stream))))
        moved = call.moved()
        awaited = {waiting} if moved is None else {waiting, moved}
        try:
            while True:
                await asyncio.wait(awaited, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    if watched.lost.done():
                        stream.cancel()
                    return waiting.result()
                if moved is not None and moved.done():
                    return None
                if not self.monitor.has_live_replica() and not self._pools.can_sleep:
                    stream.cancel()
                    raise self.monitor.unavailable()
        finally:
            waiting.cancel()


def _names(request_id: str) -> Iterator[str]:
    """Yield a name for each time that a request is sent: a replica may know the last one still."""
    yield request_id
    for number in itertools.count(2):
        yield f"{request_id}~{number}"
