"""The answer of GET /status.json: what the status page shows. No text, no keys."""

from __future__ import annotations

from serve_app.api.protocol.base import ResponseModel


class ReplicaStatus(ResponseModel):
    """One model replica. kv_usage is 0 to 1, None where its engine has no KV blocks.

    engine_reason says why it is this engine: the config's word, or what `engine.kind: auto` found.
    """

    replica_id: str
    state: str
    detail: str
    device: str
    engine: str
    engine_reason: str
    last_progress_age_s: float
    num_streams: int
    max_num_seqs: int
    num_waiting_tokens: int
    kv_usage: float | None
    ttft_p95_s: float


class CardStatus(ResponseModel):
    """One Intel GPU of the host that answered; None where its driver does not tell."""

    name: str
    label: str
    utilization: float | None
    power_w: float | None
    temperature_c: float | None
    memory_used_bytes: int
    memory_total_bytes: int
    throttled_by: list[str]


class HostStatus(ResponseModel):
    """The host that answered."""

    name: str
    cpu_utilization: float | None
    memory_total_bytes: int
    memory_available_bytes: int
    cards: list[CardStatus]


class ErrorStatus(ResponseModel):
    """A recent error: when (Unix seconds) and of what kind; never its text."""

    at_s: float
    status: int
    type: str
    code: str
    endpoint: str
    request_id: str


class HistoryStatus(ResponseModel):
    """The last minutes, oldest first, one value per slot of `slot_s`; None where nothing was."""

    slot_s: int
    ttft_p50_s: list[float | None]
    ttft_p95_s: list[float | None]
    tpot_p50_s: list[float | None]
    tpot_p95_s: list[float | None]
    requests_per_s: list[float]
    tokens_per_s: list[float]


class StatusAnswer(ResponseModel):
    """Answer of GET /status.json."""

    version: str
    status: str
    models: list[str]
    now_s: float
    uptime_s: float
    in_flight: int
    max_ongoing_requests: int
    replicas: list[ReplicaStatus]
    host: HostStatus
    history: HistoryStatus
    errors: list[ErrorStatus]
    served_by: dict[str, int]
