"""Profiling a replica: POST /admin/profile."""

from __future__ import annotations

from pydantic import Field

from serve_app.api.protocol.base import RequestModel, ResponseModel


class ProfileRequest(RequestModel):
    """How many engine steps to trace, and how long to wait for them."""

    steps: int = Field(20, ge=1, le=500)
    timeout_s: float = Field(30.0, gt=0, le=300)


class OperatorEntry(ResponseModel):
    """An operator by its own time over all traced steps; `share` is of the steps' time."""

    name: str
    calls: int
    seconds: float
    share: float


class ProfileAnswer(ResponseModel):
    """What the trace says, per step where nothing else is told; seconds and bytes.

    `trace` is a file on the replica's host `host`. None: not measurable on this device.
    """

    replica_id: str
    host: str
    trace: str
    device: str
    num_steps: int
    step_s: float
    operators: list[OperatorEntry]
    host_operators: list[OperatorEntry]
    copied_bytes: float
    synchronisations: float
    kernel_launches: float
    operator_calls: float
    idle_s: float | None
    idle_share: float | None
    read_bytes_per_s: float
    bandwidth_share: float | None
    captured_step_s: float | None
    uncaptured_step_s: float | None
    capture_speedup: float | None
