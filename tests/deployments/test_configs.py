"""Every config that is shipped starts, on simulated cards, and answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.config.load import SERVE_KEYS, load_serve_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def test_the_shipped_configs_are_these() -> None:
    assert NAMES == ["arc", "arc2", "cluster", "cpu", "igpu", "local"]
    readme = (CONFIGS / "README.md").read_text()
    for name in NAMES:
        assert f"`{name}.yaml`" in readme
        assert (CONFIGS / f"{name}.yaml").read_text().startswith("# For "), "it says for whom"


@pytest.mark.parametrize("name", NAMES)
def test_each_is_whole_and_right(name: str) -> None:
    file = load_serve_file(CONFIGS / f"{name}.yaml", env={})

    assert file.document["http_options"]["request_timeout_s"] is None, "streams may be long"
    if name == "local":
        assert file.host == "127.0.0.1"
        assert file.app.engine.batch_invariant
        assert file.app.model.aliases == ("*",)
    else:
        assert file.app.ingress.num_replicas >= 2


@pytest.mark.parametrize("name", NAMES)
def test_each_answers_one_request(deployed: Callable[..., Any], name: str) -> None:
    document = load_serve_file(CONFIGS / f"{name}.yaml", env={}).document
    args = document["applications"][0]["args"]
    # The model itself is loaded once, by the config that everybody starts with.
    quick = {} if name == "local" else {"engine": {"fixed_rate_tokens_per_s": 100}}

    app = deployed(quick, base=args, wait=False)
    app.wait_ready(timeout_s=120)
    response = app.chat(temperature=0, max_tokens=24)

    assert response.status_code == 200, response.text
    body = response.json()
    assert body["usage"]["completion_tokens"] > 0
    state = app.any("ModelReplica")
    assert len(state["card_indices"]) == {"arc": 1, "arc2": 1, "cluster": 1, "igpu": 1}.get(name, 0)
    assert len(app.states("Ingress")) == args["ingress"]["num_replicas"]
    metrics = httpx.get(f"{app.url}/metrics", timeout=10).text
    assert f'replica="{state["replica_id"]}"' in metrics
    assert "xeray_preprocessor_batch_size_count{" in metrics
    stats = app.any("ModelReplica", "stats")
    assert (
        stats.num_free_blocks + stats.num_cached_blocks + stats.num_used_blocks == stats.num_blocks
    )
    assert stats.num_used_blocks == 0


def test_the_table_of_serves_keys_is_that_of_the_installed_ray() -> None:
    from ray.serve import schema

    for level, model in (
        ("file", schema.ServeDeploySchema),
        ("http_options", schema.HTTPOptionsSchema),
        ("application", schema.ServeApplicationSchema),
        ("deployment", schema.DeploymentSchema),
    ):
        assert SERVE_KEYS[level] == set(model.model_fields), level
