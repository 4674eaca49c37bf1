"""The protocol that every engine offers, native or adapter. Owned by one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from serve_app.core.events import BatchingOptions, EngineInfo, EngineStats, TokenEvent
from serve_app.core.sampling import SamplingParams
from serve_app.engine.constraint import Constraints


@runtime_checkable
class Constrainable(Protocol):
    """An engine that can make its sequences follow constraints."""

    def use_constraints(self, constraints: Constraints) -> None:
        """Follow constraints from now on, and say so in `info.capabilities`."""
        ...


class Engine(Protocol):
    """A generator of token ids for many sequences at once.

    Contract: `submit` never blocks and never raises for load; a request it can never serve raises
    `ClientError`. Every submitted id gets events from `step()`, of which exactly one, the last, is
    terminal (stop, length, aborted, error), also after `abort` and after an internal failure.
    `abort` of an unknown id is no error. All calls come from one thread.
    """

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine: limits, capabilities, device."""
        ...

    def submit(
        self, request_id: str, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """Queue a sequence. Raises ClientError on an empty or over-long prompt or a bad id."""
        ...

    def abort(self, request_id: str) -> None:
        """End a sequence; its blocks are free by the end of the step in flight."""
        ...

    def configure(self, batching: BatchingOptions) -> None:
        """Change the batching toggles; running sequences go on."""
        ...

    def pause(self) -> None:
        """Stop admitting and stepping; sequences keep their place."""
        ...

    def resume(self) -> None:
        """Go on after `pause`."""
        ...

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        ...

    def step(self) -> list[TokenEvent]:
        """Run one step: schedule, run, postprocess. Returns this step's events (possibly none)."""
        ...

    def stats(self) -> EngineStats:
        """Return counters and gauges."""
        ...

    def close(self) -> None:
        """Free the device. Nothing may be called afterwards."""
        ...
