"""Health, metrics, limits, headers, administration and pages."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app import __version__
from serve_app.core.errors import EngineError
from serve_app.core.requests import ReplicaHealth, ServiceHealth

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


async def test_models_under_each_name(client):
    listed = (await client.get("/v1/models")).json()
    assert [entry["id"] for entry in listed["data"]] == ["org/tiny", "tiny", "gpt-4o"]
    assert listed["data"][0]["max_model_len"] == 64
    assert (await client.get("/v1/models/org/tiny")).json()["id"] == "org/tiny"
    assert (await client.get("/v1/models/tiny")).json()["id"] == "tiny"
    assert (await client.get("/v1/models/")).json() == listed
    missing = await client.get("/v1/models/org/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/readyz"])
@pytest.mark.parametrize(
    ("status", "code"),
    [("loading", "model_loading"), ("draining", "draining"), ("dead", "no_replica")],
)
async def test_not_ready_is_503_with_the_reason(client, backend, path, status, code):
    backend.state = ServiceHealth(False, status, (ReplicaHealth("r0", "stuck", "no progress"),))
    response = await client.get(path)
    assert response.status_code == 503
    assert response.json()["status"] == status
    assert response.json()["replicas"][0]["detail"] == "no progress"
    assert response.json()["error"]["code"] == code
    assert response.headers["retry-after"]
    alive = await client.get("/livez")
    assert alive.status_code == (503 if status == "dead" else 200)


async def test_ready(client):
    for path in ("/health", "/readyz", "/livez"):
        assert (await client.get(path)).status_code == 200
    assert (await client.get("/version")).json() == {"version": __version__}


async def test_backend_that_cannot_tell_is_not_healthy(client, backend):
    backend.failure = EngineError("gone")
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["status"] == "unreachable"


async def test_metrics_hold_the_ingress_and_the_replicas(client, backend):
    backend.replica_metrics = (
        '# TYPE xeray_num_requests_running gauge\nxeray_num_requests_running{replica="r1"} 3.0\n'
    )
    await client.post(CHAT, json=HELLO)
    await client.get("/nope/secret")
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["xeray_num_requests_running", (("replica", "r1"),)] == 3
    own = ("model_name", "org/tiny"), ("replica", "ingress")
    assert samples["inference_latency_seconds_count", own] == 1
    assert samples["xeray_time_to_first_token_seconds_count", own] == 1
    assert samples["xeray_e2e_request_latency_seconds_count", own] == 1
    assert samples["xeray_inter_token_latency_seconds_count", own] == 1
    assert samples["xeray_request_generation_tokens_sum", own] == 2
    assert samples["xeray_request_prompt_tokens_sum", own] == 5
    assert (
        samples[
            "xeray_request_success_total",
            (("finished_reason", "stop"), *own),
        ]
        == 1
    )
    requests = {
        (labels["endpoint"], labels["status"]): value
        for (name, pairs), value in samples.items()
        if name == "xeray_http_requests_total" and (labels := dict(pairs))
    }
    assert requests == {(CHAT, "200"): 1, ("other", "404"): 1}


async def test_metrics_survive_a_backend_that_is_gone(client, backend):
    backend.failure = EngineError("gone")
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert "xeray_http_requests_in_flight" in response.text


async def test_more_than_the_limit_in_flight_is_queue_full(make_app, make_client, backend, fakes):
    app = make_app(max_ongoing_requests=1)
    release = asyncio.Event()
    backend.script = [release, *fakes["chunks"]("a")]
    client = make_client(app=app)
    first = asyncio.create_task(client.post(CHAT, json=HELLO))
    await backend.started.wait()
    second = await client.post(CHAT, json=HELLO)
    assert second.status_code == 503
    assert second.json()["error"]["code"] == "queue_full"
    assert second.headers["retry-after"] == "1"
    assert (await client.get("/health")).status_code == 200
    release.set()
    assert (await first).status_code == 200
    assert (await client.post(CHAT, json=HELLO)).status_code == 200


async def test_drain_refuses_new_requests_and_lets_old_ones_finish(
    make_app, make_client, backend, fakes
):
    app = make_app()
    release = asyncio.Event()
    backend.script = [release, *fakes["chunks"]("a")]
    client = make_client(app=app)
    running = asyncio.create_task(client.post(CHAT, json=HELLO))
    await backend.started.wait()
    assert (await client.post("/admin/drain")).json() == {"status": "draining", "in_flight": 1}
    assert backend.is_draining
    refused = await client.post(CHAT, json=HELLO)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert int(refused.headers["retry-after"]) >= 1
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/livez")).status_code == 200
    stats = (await client.get("/admin/stats")).json()
    assert (stats["is_draining"], stats["in_flight"]) == (True, 1)
    release.set()
    assert (await running).status_code == 200


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        ("192.0.2.7", {}),
        ("127.0.0.1", {"x-forwarded-for": "192.0.2.7"}),
        ("127.0.0.1", {"forwarded": "for=127.0.0.1"}),
        ("127.0.0.1", {"x-real-ip": "192.0.2.7"}),
        ("127.0.0.1", {"via": "1.1 proxy"}),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1, 192.0.2.7"}),
        ("127.0.0.1", {"host": "evil.example"}),
        ("127.0.0.1", {"origin": "http://evil.example"}),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/admin/drain"), ("GET", "/admin/stats")])
async def test_administration_is_local(make_client, backend, peer, headers, method, path):
    response = await make_client(peer=peer).request(method, path, headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "not_allowed"
    assert response.json()["error"]["type"] == "permission_error"
    assert not backend.is_draining


async def test_administration_is_closed_behind_a_proxy_that_hides_clients(make_client, backend):
    from serve_app.api.app import create_app
    from serve_app.config.schema import AppConfig

    app = create_app(backend, AppConfig(), peer_is_client=False)
    assert (await make_client(app=app).post("/admin/drain")).status_code == 403


@pytest.mark.parametrize("sent", ["abc-123", "a" * 128])
async def test_request_id_is_echoed(client, backend, sent):
    response = await client.post(CHAT, json=HELLO, headers={"X-Request-Id": sent})
    assert response.headers["x-request-id"] == sent
    assert backend.requests[0].trace_context == {"x-request-id": sent}
    assert backend.prepared[0].request_id == sent
    assert sent not in backend.requests[0].request_id


@pytest.mark.parametrize("sent", ["a" * 129, "a b", "", "<script>", "é"])
async def test_bad_request_ids_are_replaced(client, sent):
    headers = [(b"x-request-id", sent.encode())]
    response = await client.get("/nope", headers=headers)
    made = response.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)


async def test_a_request_id_that_the_host_echoes_is_not_sent_twice(backend, make_client):
    from serve_app.api.app import create_app
    from serve_app.config.schema import AppConfig

    client = make_client(app=create_app(backend, AppConfig(), host_echoes_id=True))
    echoed = await client.get("/livez", headers={"X-Request-Id": "id-1"})
    assert "x-request-id" not in echoed.headers
    replaced = await client.get("/livez", headers={"X-Request-Id": "not an id"})
    assert re.fullmatch("[0-9a-f]{32}", replaced.headers["x-request-id"])


async def test_request_id_is_in_every_log_line(make_app, make_client, backend, caplog):
    from serve_app.observability.logs import RequestIdFilter

    caplog.handler.addFilter(RequestIdFilter())
    backend.script = [EngineError("gone")]
    with caplog.at_level(logging.INFO, logger="serve_app"):
        await make_client().post(CHAT, json=HELLO, headers={"X-Request-Id": "id-7"})
    assert {
        record.request_id for record in caplog.records if record.name.startswith("serve_app")
    } == {"id-7"}
    assert any("/v1/chat/completions 500" in record.getMessage() for record in caplog.records)
    assert "hello" not in caplog.text


async def test_body_over_the_limit_by_its_announced_length(make_client):
    client = make_client(max_body_bytes=100)
    response = await client.post(CHAT, content=b"x" * 101)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert (await client.post(CHAT, content=b"x" * 100)).status_code == 400


async def test_body_over_the_limit_in_chunks(make_client):
    async def body():
        for _ in range(20):
            yield b"x" * 10

    response = await make_client(max_body_bytes=100).post(CHAT, content=body())
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_cors_is_off_by_default_and_on_by_config(make_client):
    origin = {"origin": "https://app.example"}
    assert (
        "access-control-allow-origin"
        not in (await make_client().get("/version", headers=origin)).headers
    )
    client = make_client(cors_origins=["https://app.example"])
    allowed = await client.post(CHAT, content=b"{", headers=origin)
    assert allowed.status_code == 400
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    preflight = await client.options(
        CHAT, headers={**origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 200
    other = await client.get("/version", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_pages_load_nothing_from_elsewhere(client, path):
    response = await client.get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r'(?:src|href)="(?:https?:)?//', response.text)
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", response.text)
    for link in re.findall(r'(?:src|href)="(static/[^"]+)"', response.text):
        asset = await client.get("/" + link)
        assert asset.status_code == 200
        assert "immutable" in asset.headers["cache-control"]
    revisit = await client.get(path, headers={"if-none-match": response.headers["etag"]})
    assert revisit.status_code == 304
    plain = await client.get("/static/chat.js")
    assert plain.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/index.html"]
)
async def test_only_assets_are_served(client, path):
    assert (await client.get(path)).status_code == 404


async def test_pages_can_be_switched_off(make_client):
    client = make_client(web=False)
    for path in ("/", "/docs", "/static/chat.js"):
        assert (await client.get(path)).status_code == 404
    assert (await client.get("/openapi.json")).status_code == 200


async def test_openapi_describes_every_endpoint_with_resolvable_references(client):
    document = (await client.get("/openapi.json")).json()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for reference in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert reference in schemas
    assert "messages" in schemas["ChatCompletionRequest"]["properties"]
    assert document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    served = {route.path.replace(":path", "") for route in client._transport.app.routes}
    hidden = {"/", "/docs", "/status", "/static/{name}", "/openapi.json"}
    assert set(document["paths"]) == served - hidden


async def test_a_compressed_body_is_told_so(client):
    answer = await client.post(CHAT, content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 400
    assert "send the body uncompressed" in answer.json()["error"]["message"]


async def test_a_byte_order_mark_is_skipped(client):
    content = b"\xef\xbb\xbf" + json.dumps(HELLO).encode()
    assert (await client.post(CHAT, content=content)).status_code == 200
