"""Keys over HTTP: who may do what, limits, reload."""

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve_app.api.app import create_app
from serve_app.api.keys import KeyRing
from serve_app.config.schema import AppConfig
from serve_app.core.errors import AuthenticationError, ConfigError, RateLimitError

from .conftest import chunks

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def entry(key: str, **more: object) -> dict[str, object]:
    return {"name": key, "sha256": hashlib.sha256(key.encode()).hexdigest(), **more}


def write_keys(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return path


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return write_keys(
        tmp_path / "keys.yaml",
        entry("user"),
        entry("boss", scopes=["inference", "admin", "metrics"]),
        entry("other", models=["org/huge"]),
        entry("slow", requests_per_minute=1),
        entry("thrifty", tokens_per_minute=3),
    )


@pytest.fixture
def client(backend, keys_file: Path):
    config = AppConfig.model_validate(
        {
            "auth": {"keys_file": str(keys_file), "protect_metrics": True},
            "ingress": {"num_replicas": 1},
        }
    )
    transport = httpx.ASGITransport(create_app(backend, config), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("nobody"), {"Authorization": "Basic eA=="}])
async def test_without_a_known_key_it_is_401(client, headers) -> None:
    answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


async def test_a_known_key_is_served_under_either_header(client) -> None:
    for headers in (bearer("user"), {"X-API-Key": "user"}):
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/version", "/", "/docs"])
async def test_probes_and_pages_ask_for_no_key(client, path: str) -> None:
    assert (await client.get(path)).status_code == 200


async def test_scopes(client) -> None:
    for path in ("/admin/stats", "/admin/usage", "/metrics"):
        assert (await client.get(path)).status_code == 401
        denied = await client.get(path, headers=bearer("user"))
        assert (denied.status_code, denied.json()["error"]["code"]) == (403, "not_allowed")
        assert (await client.get(path, headers=bearer("boss"))).status_code == 200


async def test_a_key_sees_and_uses_only_its_models(client) -> None:
    denied = await client.post("/v1/chat/completions", json=CHAT, headers=bearer("other"))
    assert (denied.status_code, denied.json()["error"]["param"]) == (403, "model")
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        denied = await client.post(path, json=body, headers=bearer("other"))
        assert (denied.status_code, denied.json()["error"]["param"]) == (403, "model")
    listed = await client.get("/v1/models", headers=bearer("other"))
    assert listed.json()["data"] == []
    assert (await client.get("/v1/models/tiny", headers=bearer("other"))).status_code == 403


async def test_requests_per_minute(client, backend) -> None:
    first = await client.post("/v1/chat/completions", json=CHAT, headers=bearer("slow"))
    second = await client.post("/v1/chat/completions", json=CHAT, headers=bearer("slow"))
    assert (first.status_code, second.status_code) == (200, 429)
    assert second.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(second.headers["Retry-After"]) <= 60
    assert len(backend.requests) == 1  # a refusal makes no engine call


async def test_tokens_are_counted_and_reported(client) -> None:
    headers = bearer("thrifty")
    first = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    total = first.json()["usage"]["total_tokens"]
    assert total >= 3
    second = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert second.status_code == 429
    report = (await client.get("/admin/usage", headers=bearer("boss"))).json()["data"]
    row = next(row for row in report if row["name"] == "thrifty")
    assert (row["requests"], row["refused"], row["in_flight"]) == (1, 1, 0)
    metrics = (await client.get("/metrics", headers=bearer("boss"))).text
    assert 'xeray_key_sequences_total{key="thrifty"' in metrics
    assert 'xeray_key_tokens_total{key="thrifty",kind="generation"' in metrics


async def test_tokens_of_a_stream_count_while_it_runs(client, backend) -> None:
    headers = bearer("thrifty")
    first, *rest = chunks("Hel", "lo")
    go_on = asyncio.Event()
    body = {**CHAT, "messages": [{"role": "user", "content": "hello"}], "stream": True}
    backend.scripts = [[first, go_on, *rest]]
    held = asyncio.create_task(client.post("/v1/chat/completions", json=body, headers=headers))
    async with asyncio.timeout(10):
        while (await usage_of(client, "thrifty"))["tokens"] < 3:
            await asyncio.sleep(0.01)
    so_far = (await usage_of(client, "thrifty"))["tokens"]
    refused = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert refused.status_code == 429
    assert not held.done()

    go_on.set()
    assert "[DONE]" in (await held).text
    assert (await usage_of(client, "thrifty"))["tokens"] == so_far + 1


async def usage_of(client, name: str) -> dict[str, Any]:
    report = (await client.get("/admin/usage", headers=bearer("boss"))).json()["data"]
    return next((row for row in report if row["name"] == name), {"tokens": 0})


def test_tokens_of_a_minute_leave_the_window_by_the_second(tmp_path: Path) -> None:
    clock = Clock()
    path = write_keys(tmp_path / "k.yaml", entry("a", tokens_per_minute=100))
    ring = KeyRing(path, env={}, clock=clock)
    lease = ring.admit(ring.authenticate("a"))
    for _ in range(40):  # four seconds of a stream
        lease.add_tokens(5)
        clock.now_s += 0.1
    usage = ring.usage()["a"]
    assert len(usage.tokens) <= 5
    assert (usage.num_tokens, usage.window_tokens) == (200, 200)

    clock.now_s += 57.0
    usage.forget_old(clock.now_s)
    assert 100 <= usage.window_tokens <= 150
    clock.now_s += 5.0
    usage.forget_old(clock.now_s)
    assert usage.window_tokens == 0


def test_limits_over_time_and_at_a_time(tmp_path: Path) -> None:
    clock = Clock()
    path = write_keys(
        tmp_path / "k.yaml", entry("a", requests_per_minute=2, max_concurrent_requests=1)
    )
    ring = KeyRing(path, env={}, clock=clock)
    found = ring.authenticate("a")
    lease = ring.admit(found)
    with pytest.raises(RateLimitError, match="at a time"):
        ring.admit(found)
    lease.close()
    lease.close()
    ring.admit(found).close()
    with pytest.raises(RateLimitError, match="requests per minute") as refused:
        ring.admit(found)
    assert refused.value.retry_after_s == pytest.approx(60.0)
    clock.now_s += 60.0
    ring.admit(found).close()


def test_replicas_share_the_limits(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "k.yaml", entry("a", requests_per_minute=4))
    ring = KeyRing(path, env={}, num_shares=2, clock=Clock())
    for _ in range(2):
        ring.admit(ring.authenticate("a")).close()
    with pytest.raises(RateLimitError, match="limit of 4"):
        ring.admit(ring.authenticate("a"))


def test_a_changed_file_is_read_without_a_restart(tmp_path: Path, caplog) -> None:
    clock = Clock()
    path = write_keys(tmp_path / "k.yaml", entry("old"))
    ring = KeyRing(path, env={}, clock=clock)
    write_keys(path, entry("new-one"))
    clock.now_s += 2
    assert ring.authenticate("new-one").name == "new-one"
    with pytest.raises(AuthenticationError):
        ring.authenticate("old")
    path.write_text("keys: [broken")
    os.utime(path, (1, 1))
    clock.now_s += 2
    assert ring.authenticate("new-one").name == "new-one"
    assert "not reloaded" in caplog.text


def test_keys_of_the_environment(tmp_path: Path) -> None:
    assert not KeyRing(None, env={}).is_required
    ring = KeyRing(None, env={"XERAY_API_KEYS": "one, two,"})
    assert ring.is_required
    assert ring.authenticate("two").scopes == ("inference",)
    with pytest.raises(AuthenticationError):
        ring.authenticate("")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [{name: a, sha256: xyz}]", "keys.0.sha256.*64 hexadecimal"),
        ("keys: [{name: a, sha256: '" + "0" * 64 + "', extra: 1}]", "keys.0.extra"),
        ("{", "is not YAML"),
        ("[]", "valid"),
        ("keys: [" + f"{{name: a, sha256: '{'0' * 64}'}}," * 2 + "]", "two keys are named a"),
    ],
)
def test_a_bad_file_names_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "k.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        KeyRing(path, env={})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auth\.keys_file.*No such file"):
        KeyRing(tmp_path / "none.yaml", env={})
