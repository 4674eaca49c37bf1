"""Models, health, version, administration and errors."""

from __future__ import annotations

from typing import Literal

from serve_app.api.protocol.base import ResponseModel


class ModelEntry(ResponseModel):
    """A served model under one of its names.

    `capabilities`: chat, completions, tools, reasoning, embeddings.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "xeray"
    root: str
    parent: str | None = None
    max_model_len: int
    capabilities: list[str]


class ModelList(ResponseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ReplicaEntry(ResponseModel):
    """State of one model replica."""

    replica_id: str
    state: str
    detail: str
    device: str
    last_progress_age_s: float


class HealthAnswer(ResponseModel):
    """Answer of GET /health and /readyz when all is well."""

    status: str
    replicas: list[ReplicaEntry]


class VersionAnswer(ResponseModel):
    """Answer of GET /version."""

    version: str


class ErrorBody(ResponseModel):
    """What went wrong; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(ResponseModel):
    """Body of every answer that is no success."""

    error: ErrorBody


class DrainAnswer(ResponseModel):
    """Answer of POST /admin/drain."""

    status: Literal["draining"] = "draining"
    in_flight: int


class ReloadAnswer(ResponseModel):
    """Answer of POST /admin/models/{id}/reload: the replicas that loaded the model anew."""

    model: str
    replicas: list[str]


class AdminStats(ResponseModel):
    """Answer of GET /admin/stats: this ingress replica, and the model replicas as it sees them."""

    version: str
    is_draining: bool
    in_flight: int
    max_ongoing_requests: int
    uptime_s: float
    health: HealthAnswer


class KeyUsageEntry(ResponseModel):
    """What one API key did on an ingress replica since it started; tokens are prompt and output."""

    name: str
    requests: int
    tokens: int
    refused: int
    in_flight: int


class KeyUsageReport(ResponseModel):
    """Answer of GET /admin/usage."""

    data: list[KeyUsageEntry]


class LiveAnswer(ResponseModel):
    """Answer of GET /livez."""

    status: Literal["alive"] = "alive"
