"""The parent's side of an engine: spawns its process, streams events, watches it, brings it back.

No torch here. One event loop owns a client; one of its wake-ups handles one step of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import EngineError, ErrorInfo, OverloadedError, XeRayError
from serve_app.core.events import BatchingOptions, EngineInfo, EngineStats, FinishReason, TokenEvent
from serve_app.core.sampling import SamplingParams, TokenVocabulary
from serve_app.engine.engine_calls import EngineCalls
from serve_app.engine.engine_process import EngineProcess
from serve_app.engine.profile_calls import ProfileCalls
from serve_app.engine.token_stream import TokenStream
from serve_app.engine.validation import check_request
from serve_app.engine.watchdog import EngineState, StepWatch
from serve_app.engine.wire import (
    pack_sampling,
    unpack_error,
    unpack_event,
    unpack_info,
    unpack_stats,
)

_LOG = logging.getLogger(__name__)
FAULT_INJECTION_ENV = "XERAY_FAULT_INJECTION"
_RESPAWN_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

StateChange = Callable[[EngineState, str], None]
Progress = Callable[[str, float], None]


class EngineClient:
    """An engine in a process of its own.

    Args:
        model, engine: what to load and how.
        env: laid over this process's environment for the child (device masks, thread counts).
        pass_fds: file descriptors that the child keeps open, such as a card's lock.
        cpu_ids: CPUs that the child keeps to; None leaves it this process's.
        vocabulary: what the engine needs to follow constraints; None: it follows none.
        on_state_change: told each new state, with a word on why.
        on_progress: told (stage, seconds) while loading.
    """

    def __init__(
        self,
        model: ModelSection,
        engine: EngineSection,
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
        cpu_ids: tuple[int, ...] | None = None,
        vocabulary: TokenVocabulary | None = None,
        on_state_change: StateChange | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._env = dict(env or {})
        self._pass_fds = pass_fds
        self._cpu_ids = cpu_ids
        self._vocabulary = vocabulary
        self._on_state_change = on_state_change or (lambda state, detail: None)
        self._on_progress = on_progress or (lambda stage, seconds: None)
        self._state: EngineState = "loading"
        self._process: EngineProcess | None = None
        self._generation = 0
        self._info: EngineInfo | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._streams: dict[str, TokenStream] = {}
        self._calls = EngineCalls()
        self._profiles = ProfileCalls()
        self._numbers = itertools.count()
        self._watch = StepWatch(engine.watchdog_min_s)
        self._last_stats = EngineStats()
        self._batching: BatchingOptions | None = None
        self._is_paused = False
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> EngineState:
        """loading | ready | stuck | dead."""
        return self._state

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine. Raises OverloadedError (model_loading) before the first start."""
        if self._info is None:
            raise OverloadedError("the model is loading", code="model_loading")
        return self._info

    @property
    def pid(self) -> int | None:
        """The engine process's id, None while there is none."""
        return self._process.pid if self._process else None

    @property
    def last_stats(self) -> EngineStats:
        """The newest statistics that came with a step; at most about 100 ms behind while busy."""
        return self._last_stats

    @property
    def last_progress_age_s(self) -> float:
        """Seconds since the engine last gave a sign of life, 0 while it has nothing to do."""
        return self._watch.age_s(time.monotonic()) if self._is_busy else 0.0

    @property
    def _is_busy(self) -> bool:
        return bool(self._calls) or (bool(self._streams) and not self._is_paused)

    async def start(self) -> EngineInfo:
        """Spawn the process and wait until it is ready.

        Raises what the engine raised (ConfigError, EngineError), by type.
        """
        info = await self._spawn()
        self._start_task(self._run_watchdog())
        return info

    def submit(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> TokenStream:
        """Send a request to the engine; never blocks.

        Raises OverloadedError (model_loading) unless ready, ClientError as `check_request` does.
        """
        process = self._ready_process()
        check_request(self.info, prompt_token_ids, sampling)
        assert request_id not in self._streams, f"request {request_id} runs already"
        if not self._is_busy:
            self._watch.touch(time.monotonic())
        stream = TokenStream(request_id, self.abort)
        self._streams[request_id] = stream
        ids = list(prompt_token_ids)
        process.send("submit", request_id, ids, pack_sampling(sampling))
        return stream

    def abort(self, request_id: str) -> None:
        """Tell the engine to end a request; its stream still gets its terminal event."""
        if request_id in self._streams and self._process is not None:
            self._process.send("abort", request_id)

    async def configure(self, batching: BatchingOptions) -> EngineStats:
        """Change the batching toggles. Raises ConfigError beyond the engine's limits."""
        stats = await self._call(
            "configure",
            batching.mode.value,
            batching.max_num_seqs,
            batching.max_num_batched_tokens,
        )
        # A respawned engine gets the same toggles.
        self._batching = batching
        return stats

    async def pause(self) -> EngineStats:
        """Stop stepping; sequences keep their place, and the watchdog rests."""
        stats = await self._call("pause")
        self._is_paused = True
        return stats

    async def resume(self) -> EngineStats:
        """Go on after `pause`."""
        self._is_paused = False
        self._watch.touch(time.monotonic())
        return await self._call("resume")

    async def stats(self) -> EngineStats:
        """Ask the engine for its statistics; answered after the step in flight."""
        return await self._call("stats")

    async def profile(self, num_steps: int, path: str, timeout_s: float) -> dict[str, Any]:
        """Trace the next `num_steps` steps into the file `path`; figures as `summarise` gives them.

        After `timeout_s` the steps so far must do. The watchdog rests meanwhile. Raises EngineError
        where none ran or the engine was lost, OverloadedError while another profile is taken.
        """
        process = self._ready_process()
        try:
            return await self._profiles.take(
                process, next(self._numbers), num_steps, path, timeout_s
            )
        finally:
            self._watch.touch(time.monotonic())

    async def canary(self, timeout_s: float) -> bool:
        """Whether one token comes through the model in time. True at once while steps come in."""
        if self._state != "ready":
            return False
        if self._is_paused or (self._streams and self.last_progress_age_s < timeout_s):
            return True
        params = SamplingParams(temperature=0.0, max_tokens=1)
        if not self.info.capabilities.generation:
            params = SamplingParams(max_tokens=0, embeds=True)
        stream = self.submit(f"canary-{next(self._numbers)}", (0,), params)
        try:
            async with asyncio.timeout(timeout_s):
                async for events in stream:
                    if events[-1].finish_reason is FinishReason.LENGTH:
                        return True
        except TimeoutError:
            return False
        finally:
            stream.close()
        return False

    def inject_fault(self, kind: str) -> None:
        """Break the next step: hang, crash, device_lost or bug; needs XERAY_FAULT_INJECTION=1."""
        if self._process is not None:
            self._process.send("inject_fault", kind)

    async def reload(self) -> EngineInfo:
        """End the process and start another, which reads the model's files anew.

        Open streams get an error event. Raises what the engine raised; the client is dead then.
        """
        process, self._process = self._process, None
        self._generation += 1  # the old process's end is no accident
        self._set_state("loading", "reload")
        self._terminate_streams(
            FinishReason.ERROR, EngineError("the model is being loaded anew").info()
        )
        if process is not None:
            process.send("close")
            await process.end()
        return await self._spawn()

    async def close(self) -> None:
        """End the process; open streams get an aborted event."""
        self._is_closing = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._terminate_streams(FinishReason.ABORTED, None)
        if self._process is not None:
            self._process.send("close")
            await self._process.end()
            self._process = None
        self._set_state("dead", "closed")

    async def _spawn(self) -> EngineInfo:
        self._set_state("loading", "")
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._generation = generation = self._generation + 1
        process = await EngineProcess.spawn(
            self._env, self._pass_fds, self._on_frames, lambda: self._on_lost(generation)
        )
        self._process = process
        process.send("config", self._config())
        try:
            async with asyncio.timeout(self._engine.startup_timeout_s):
                info = await self._ready
        except BaseException as error:
            process.kill()
            await process.end()
            self._process = None
            self._set_state("dead", "did not start")
            if isinstance(error, TimeoutError):
                raise EngineError(
                    f"the engine was not ready within {self._engine.startup_timeout_s:g} s;"
                    " raise engine.startup_timeout_s"
                ) from error
            raise
        self._info = info
        self._watch.touch(time.monotonic())
        self._set_state("ready", "")
        if self._batching is not None:
            await self.configure(self._batching)
        if self._is_paused:
            await self.pause()
        return info

    def _config(self) -> dict[str, Any]:
        return {
            "model": self._model.model_dump(mode="json"),
            "engine": self._engine.model_dump(mode="json"),
            "cpu_ids": self._cpu_ids,
            "vocabulary": None if self._vocabulary is None else asdict(self._vocabulary),
            "allow_faults": os.environ.get(FAULT_INJECTION_ENV) == "1",
        }

    async def _call(self, kind: str, *args: Any) -> EngineStats:
        process = self._ready_process()
        if not self._is_busy:
            self._watch.touch(time.monotonic())
        return await self._calls.ask(process, next(self._numbers), kind, args)

    def _ready_process(self) -> EngineProcess:
        """Raises OverloadedError (model_loading) while there is none that takes requests."""
        if self._state != "ready" or self._process is None:
            raise OverloadedError(
                f"the model is loading (engine {self._state})", code="model_loading"
            )
        return self._process

    def _on_frames(self, frames: list[list[Any]]) -> None:
        self._watch.touch(time.monotonic())
        for kind, *args in frames:
            if kind == "step":
                self._on_step(*args)
            elif kind == "reply":
                self._on_reply(*args)
            elif kind == "progress":
                self._on_progress(*args)
            elif kind == "profile":
                self._profiles.on_reply(*args)
            elif self._ready is not None and not self._ready.done():
                if kind == "info":
                    self._ready.set_result(unpack_info(args[0]))
                elif kind == "failed":
                    self._ready.set_exception(unpack_error(args[0]))

    def _on_step(self, seconds: float, events: list[list[Any]], stats: list[Any] | None) -> None:
        self._watch.add_step(seconds)
        if stats is not None:
            self._last_stats = unpack_stats(stats)
        for values in events:
            event = unpack_event(values)
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            if event.finish_reason is not None:
                del self._streams[event.request_id]
            stream.put(event)

    def _on_reply(self, number: int, stats: list[Any], error: list[Any] | None) -> None:
        self._last_stats = unpack_stats(stats)
        self._calls.on_reply(number, self._last_stats, error)

    def _on_lost(self, generation: int) -> None:
        if self._is_closing or generation != self._generation:
            return
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineError("the engine's process died while loading"))
        elif self._state == "ready" and self._process is not None:
            why = "the engine's process died"
            self._start_task(self._recover(self._process, "dead", why))

    async def _recover(self, process: EngineProcess, state: EngineState, why: str) -> None:
        """End every stream with a typed error, then start the engine again until it comes back."""
        _LOG.error("%s (pid %d); starting it again", why, process.pid)
        self._process = None
        self._set_state(state, why)
        process.kill()
        error = EngineError(why)
        self._terminate_streams(FinishReason.ERROR, error.info())
        self._profiles.fail(error)
        self._calls.fail(error)
        await process.end()
        for attempt in itertools.count():
            await asyncio.sleep(_RESPAWN_DELAYS_S[min(attempt, len(_RESPAWN_DELAYS_S) - 1)])
            try:
                await self._spawn()
            except XeRayError as failure:
                _LOG.error("the engine did not come back: %s", failure.message)
                continue
            return

    async def _run_watchdog(self) -> None:
        while True:
            await asyncio.sleep(self._watch.interval_s)
            process = self._process
            if self._state != "ready" or process is None or not self._is_busy:
                continue
            silent_s = self._watch.silent_s(time.monotonic(), process.pid)
            if silent_s > self._watch.limit_s and not self._profiles.is_active:
                why = f"the engine made no progress for {silent_s:.1f} s"
                self._start_task(self._recover(process, "stuck", why))

    def _terminate_streams(self, reason: FinishReason, error: ErrorInfo | None) -> None:
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.put(TokenEvent(request_id, finish_reason=reason, error=error))

    def _set_state(self, state: EngineState, detail: str) -> None:
        if state != self._state:
            self._state = state
            with contextlib.suppress(Exception):
                self._on_state_change(state, detail)

    def _start_task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
