"""The engine's process: ``python -m serve_app.engine.worker FD``.

It talks to one `EngineClient` over the socket FD (frames: see `wire`) and dies with it. Nothing
heavy is imported before the config frame has set affinity and environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import EngineError, OverloadedError, XeRayError
from serve_app.core.events import BatchingMode, BatchingOptions, FinishReason, TokenEvent
from serve_app.core.garbage import freeze_started_objects
from serve_app.core.scheduling import compute_first
from serve_app.engine.protocol import Constrainable, Engine
from serve_app.engine.step_profiler import StepProfiler
from serve_app.engine.wire import (
    FrameReader,
    pack_error,
    pack_event,
    pack_frame,
    pack_stats,
    unpack_sampling,
    unpack_vocabulary,
)

_LOG = logging.getLogger(__name__)
_STATS_INTERVAL_S = 0.1
_PROFILE_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1


class ClientGone(Exception):
    """The client closed the socket: there is nobody to work for."""


class Connection:
    """The worker's end of the socket: whole frames in, whole frames out."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = FrameReader()
        # Not select(): its file descriptors end at 1024.
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, *parts: Any) -> None:
        """Send one frame; waits while the client is slow to read."""
        try:
            self._sock.sendall(pack_frame(*parts))
        except OSError as error:
            raise ClientGone from error

    def receive(self, timeout_s: float | None) -> list[list[Any]]:
        """Frames that have come; waits at most `timeout_s` for the first (None: for ever)."""
        if not self._poll.poll(None if timeout_s is None else timeout_s * 1000):
            return []
        try:
            data = self._sock.recv(1 << 20)
        except OSError as error:
            raise ClientGone from error
        if not data:
            raise ClientGone
        return list(self._reader.feed(data))


class Worker:
    """Drains commands, steps the engine, sends one frame per step."""

    def __init__(self, engine: Engine, connection: Connection, *, allow_faults: bool) -> None:
        self._engine = engine
        self._connection = connection
        self._allow_faults = allow_faults
        self._rejected: list[TokenEvent] = []
        self._profile: tuple[int, StepProfiler] | None = None
        self._fault: str | None = None
        self._next_stats_s = 0.0
        self._last_sent_s = 0.0
        self._is_closing = False

    def run(self) -> None:
        """Serve until the client closes. Raises ClientGone when it has died."""
        while not self._is_closing:
            is_busy = self._engine.has_work() or bool(self._rejected)
            idle_s = None if self._profile is None else _PROFILE_POLL_S
            for command in self._connection.receive(0.0 if is_busy else idle_s):
                self._handle(command)
            self._tell_profile()
            if self._engine.has_work() or self._rejected:
                self._step()

    def _step(self) -> None:
        self._apply_fault()
        profiler = None if self._profile is None else self._profile[1]
        if profiler is not None:
            profiler.before_step()
        started = time.monotonic()
        events = self._engine.step()
        now = time.monotonic()
        if profiler is not None:
            profiler.after_step()
        events, self._rejected = self._rejected + events, []
        stats = None
        if now >= self._next_stats_s or not self._engine.has_work():
            self._next_stats_s = now + _STATS_INTERVAL_S
            stats = pack_stats(self._engine.stats())
        # Steps that yield nothing are told only now and then: they prove progress.
        if events or stats is not None or now - self._last_sent_s >= _STATS_INTERVAL_S:
            self._last_sent_s = now
            packed = [pack_event(event) for event in events]
            self._connection.send("step", now - started, packed, stats)

    def _handle(self, command: list[Any]) -> None:
        kind, *args = command
        if kind == "submit":
            self._submit(*args)
        elif kind == "abort":
            self._engine.abort(args[0])
        elif kind == "close":
            self._is_closing = True
        elif kind == "inject_fault":
            if self._allow_faults:
                self._fault = args[0]
        elif kind == "profile":
            self._begin_profile(*args)
        elif kind == "profile_end":
            if self._profile is not None and self._profile[0] == args[0]:
                self._profile[1].finish()
        else:
            self._call(kind, *args)

    def _submit(self, request_id: str, prompt_ids: list[int], sampling: dict[str, Any]) -> None:
        try:
            self._engine.submit(request_id, prompt_ids, unpack_sampling(sampling))
        except XeRayError as error:
            self._rejected.append(
                TokenEvent(request_id, finish_reason=FinishReason.ERROR, error=error.info())
            )

    def _begin_profile(self, number: int, num_steps: int, path: str) -> None:
        if self._profile is not None:
            error = OverloadedError("a profile is being taken already", code="profile_running")
            self._connection.send("profile", number, None, pack_error(error))
            return
        self._profile = (number, StepProfiler(self._engine, num_steps, Path(path)))

    def _tell_profile(self) -> None:
        if self._profile is None or not self._profile[1].is_done:
            return
        number, profiler = self._profile
        self._profile = None
        result = profiler.result
        if isinstance(result, XeRayError):
            self._connection.send("profile", number, None, pack_error(result))
        else:
            self._connection.send("profile", number, result, None)

    def _call(self, kind: str, number: int, *args: Any) -> None:
        error = None
        try:
            if kind == "configure":
                mode, max_num_seqs, max_num_batched_tokens = args
                options = BatchingOptions(BatchingMode(mode), max_num_seqs, max_num_batched_tokens)
                self._engine.configure(options)
            elif kind == "pause":
                self._engine.pause()
            elif kind == "resume":
                self._engine.resume()
        except XeRayError as caught:
            error = pack_error(caught)
        self._connection.send("reply", number, pack_stats(self._engine.stats()), error)

    def _apply_fault(self) -> None:
        if self._fault == "hang":
            while True:
                time.sleep(3600)
        if self._fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "device_lost":
            raise EngineError("the device no longer answers (injected)")
        if self._fault == "bug":
            raise RuntimeError("injected")


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies; the socket's end tells it later."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> NoReturn:
    """Entry point of the process; exits 0 after close, 1 when the engine failed."""
    die_with_parent()
    compute_first()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    try:
        code = _serve(connection)
    except ClientGone:
        code = 0
    # The interpreter's own shutdown may wait for threads of a library or for a wedged device.
    with contextlib.suppress(OSError):  # a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _serve(connection: Connection) -> int:
    config = _receive_config(connection)
    reasons: list[str] = []
    try:
        engine = _start(config, connection, reasons.append)
    except XeRayError as error:
        connection.send("failed", pack_error(error))
        return 1
    except ClientGone:
        raise
    except Exception as error:
        _LOG.exception("the engine could not start")
        message = f"the engine could not start ({type(error).__name__}: {error})".splitlines()[0]
        connection.send("failed", pack_error(EngineError(message)))
        return 1
    freeze_started_objects()
    connection.send("info", asdict(replace(engine.info, engine_reason=reasons[-1])))
    try:
        Worker(engine, connection, allow_faults=config["allow_faults"]).run()
    except EngineError as error:
        _LOG.error("the engine ends: %s", error.message)
        return 1
    engine.close()
    return 0


def _receive_config(connection: Connection) -> dict[str, Any]:
    frames: list[list[Any]] = []
    while not frames:
        frames = connection.receive(None)
    # The client sends nothing else before it has heard that the engine is ready.
    ((kind, config),) = frames
    assert kind == "config", f"the first frame must be the config, got {kind!r}"
    settings: dict[str, Any] = config
    return settings


def _start(
    config: dict[str, Any], connection: Connection, on_choice: Callable[[str], None]
) -> Engine:
    started = time.perf_counter()
    model = ModelSection.model_validate(config["model"])
    section = EngineSection.model_validate(config["engine"])
    constraints = None
    if config.get("vocabulary") is not None:
        from serve_app.engine.constraint import Constraints

        constraints = Constraints(unpack_vocabulary(config["vocabulary"]))
    resolve_model(model)  # a wrong path is told before torch takes its seconds
    if section.fixed_rate_tokens_per_s is None:
        connection.send("progress", "starting torch", 0.0)
        from serve_app.engine.devices import pin_threads

        cpu_ids = config["cpu_ids"]
        pin_threads(section.num_threads, None if cpu_ids is None else tuple(cpu_ids))
    from serve_app.engine.factory import create_engine

    offset = time.perf_counter() - started
    engine = create_engine(
        model,
        section,
        lambda stage, seconds: connection.send("progress", stage, offset + seconds),
        on_choice,
    )
    if constraints is not None and isinstance(engine, Constrainable):
        engine.use_constraints(constraints)
    return engine


if __name__ == "__main__":
    main()
