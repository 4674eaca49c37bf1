"""GET /status.json, and the layers around it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from starlette.applications import Starlette

from serve_app.api.app import create_app
from serve_app.api.routes.status import HostWatch
from serve_app.config.schema import AppConfig
from serve_app.core.errors import EngineError
from serve_app.core.requests import ReplicaHealth, ReplicaLoad, ServiceHealth
from serve_app.observability.activity import SLOT_S, Activity

CHAT = {"model": "org/tiny", "messages": [{"role": "user", "content": "Secret words"}]}


@pytest.fixture
def keyed_app(backend: Any, tmp_path: Path) -> Starlette:
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "scopes": [name]}
        for name in ("inference", "metrics", "admin")
    ]
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": entries}))
    sections = {"auth": {"keys_file": str(path)}, "model": {"name": "org/tiny"}}
    return create_app(backend, AppConfig.model_validate(sections))


async def test_tells_replicas_latencies_and_who_answered(client: httpx.AsyncClient, backend: Any):
    load = ReplicaLoad(num_streams=5, max_num_seqs=4, num_blocks=100, num_used_blocks=25)
    replica = ReplicaHealth(
        "r1", "ready", device="Arc B580", load=load, engine="native", engine_reason="it is faster"
    )
    backend.state = ServiceHealth(True, "ready", (replica,))
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    answer = (await client.get("/status.json")).json()
    (shown,) = answer["replicas"]
    assert (shown["num_streams"], shown["max_num_seqs"], shown["kv_usage"]) == (5, 4, 0.25)
    assert (shown["engine"], shown["engine_reason"]) == ("native", "it is faster")
    assert answer["models"] == ["org/tiny"]
    assert answer["served_by"] == {"local": 1}
    assert len(answer["history"]["ttft_p95_s"]) == 60
    assert answer["host"]["memory_total_bytes"] > 0


async def test_errors_are_told_by_kind_and_never_by_text(client: httpx.AsyncClient, backend: Any):
    backend.script = [EngineError("The card /dev/dri/card7 was lost with Secret words.")]
    failed = await client.post("/v1/chat/completions", json=CHAT)
    await client.post("/v1/chat/completions", json={**CHAT, "temperature": "Secret words"})
    response = await client.get("/status.json")
    newest, older = response.json()["errors"]
    assert (newest["status"], newest["code"]) == (400, "invalid_value")
    assert (older["status"], older["type"]) == (500, "server_error")
    assert older["request_id"] == failed.headers["x-request-id"]
    assert older["endpoint"] == "/v1/chat/completions"
    assert "Secret" not in response.text
    assert "card7" not in response.text


async def test_an_error_within_a_stream_is_told_too(
    client: httpx.AsyncClient, backend: Any, fakes: dict[str, Any]
):
    backend.script = [*fakes["chunks"]("One ")[:1], EngineError("Lost.")]
    await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    (error,) = (await client.get("/status.json")).json()["errors"]
    assert (error["status"], error["code"]) == (500, "internal_error")


async def test_adds_up_what_all_ingress_replicas_did(client: httpx.AsyncClient, backend: Any):
    slot_before = (time.time() // SLOT_S - 1) * SLOT_S
    for seconds in (0.1, 0.4):
        activity = Activity(lambda: slot_before)
        activity.note_first_token(seconds)
        activity.note_finish(0.02, 10)
        activity.note_served("local")
        activity.num_in_flight = 2
        backend.reports.append(activity.report())
    answer = (await client.get("/status.json")).json()
    history = answer["history"]
    last = -1 if history["tokens_per_s"][-1] else -2  # a slot may end while the test runs
    assert history["ttft_p95_s"][last] == pytest.approx(0.4, rel=0.05)
    assert history["ttft_p50_s"][last] == pytest.approx(0.1, rel=0.05)
    assert history["tokens_per_s"][last] == 20 / SLOT_S
    assert (answer["in_flight"], answer["served_by"]) == (4, {"local": 2})


async def test_answers_while_the_backend_does_not(client: httpx.AsyncClient, backend: Any):
    backend.failure = EngineError("gone")
    answer = await client.get("/status.json")
    assert answer.status_code == 200
    assert answer.json()["status"] == "unreachable"


async def test_asks_for_a_key_that_may_see_metrics(make_client: Any, keyed_app: Starlette):
    client = make_client(app=keyed_app)
    answers = {
        key: (await client.get("/status.json", headers={"Authorization": f"Bearer {key}"}))
        for key in ("metrics", "admin", "inference", "unknown")
    }
    statuses = {key: answer.status_code for key, answer in answers.items()}
    assert statuses == {"metrics": 200, "admin": 200, "inference": 403, "unknown": 401}
    assert (await client.get("/status")).status_code == 200  # the page holds no data


async def test_page_is_off_where_the_web_is(make_client: Any):
    client = make_client(web=False)
    assert (await client.get("/status")).status_code == 404
    assert (await client.get("/status.json")).status_code == 200


async def test_served_by_is_a_metric(client: httpx.AsyncClient):
    await client.post("/v1/chat/completions", json=CHAT)
    text = (await client.get("/metrics")).text
    assert 'xeray_served_by_total{replica="ingress",served_by="local"} 1.0' in text
    assert 'xeray_replicas{replica="ingress",state="ready"} 1.0' in text
    assert 'xeray_goodput_sequences_total{model_name="org/tiny",replica="ingress"} 1.0' in text


async def test_the_host_is_read_at_most_once_per_period(tmp_path: Path):
    now = [0.0]
    (tmp_path / "proc").mkdir()
    meminfo = tmp_path / "proc/meminfo"
    meminfo.write_text("MemTotal: 1024 kB\nMemAvailable: 512 kB\n")
    watch = HostWatch(tmp_path, lambda: now[0])
    assert (await watch.status()).memory_total_bytes == 1024**2
    meminfo.write_text("MemTotal: 2048 kB\nMemAvailable: 512 kB\n")
    assert (await watch.status()).memory_total_bytes == 1024**2
    now[0] = 2.0
    assert (await watch.status()).memory_total_bytes == 2 * 1024**2
