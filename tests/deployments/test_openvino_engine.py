"""The embedded model on OpenVINO, over HTTP: the same API, less what the engine lacks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino_genai") is None, reason="openvino-genai is not installed"
)


def test_openvino_streams_stops_and_is_cancelled_over_http(
    deployed: Callable[..., Any],
) -> None:
    app = deployed(
        {
            "model": {"path": "embedded", "aliases": ["*"]},
            "engine": {
                "kind": "openvino",
                "fixed_rate_tokens_per_s": None,
                "kv_cache_tokens": 8192,
                "batch_invariant": False,
                "watchdog_min_s": 20.0,  # not what is tested, and other tests run beside
            },
        }
    )
    assert app.one("ModelReplica", "info").engine == "openvino"
    url = f"{app.url}/v1/completions"
    body = {
        "model": "any",
        "prompt": "The capital of France is",
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": True,
    }

    whole = httpx.post(url, json=body, timeout=60).json()
    text = whole["choices"][0]["text"]
    assert "Paris" in text
    assert whole["usage"]["completion_tokens"] == 24
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"] for event in events[:-1]]
    assert "".join(choices[0]["text"] for choices in chunks if choices) == text

    stopped = httpx.post(url, json={**body, "stop": ["Paris"]}, timeout=60).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text[: text.index("Paris")]

    for name, value in (("seed", 1), ("logit_bias", {"5": 1}), ("min_tokens", 4)):
        refused = httpx.post(url, json={**body, "temperature": 1, name: value}, timeout=60)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "unsupported_parameter"
        assert refused.json()["error"]["param"] == name

    long = {**body, "max_tokens": 3000, "stream": True}
    with httpx.stream("POST", url, json=long, timeout=60) as response:
        pieces = response.iter_text()  # kept: a collected iterator closes the response
        next(pieces)
        app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 1)
    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == 0, timeout_s=10)
    app.wait_states(
        "ModelReplica",
        lambda s: s and (s[0].num_running, s[0].num_used_blocks) == (0, 0),
        method="stats",
    )
