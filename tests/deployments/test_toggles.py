"""Batching toggles change on the running process, through `user_config`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

NUM_STREAMS = 16
CALL_S = 0.05


def samples(app: Any) -> dict[str, float]:
    """Sample name → sum over its labels, as a client reads it over HTTP."""
    totals: dict[str, float] = {}
    text = httpx.get(f"{app.url}/metrics", timeout=10).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def wait_for_tokens(app: Any, at_least: float) -> dict[str, float]:
    """Return the counters once that many tokens are counted and nothing runs any more."""
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        now = samples(app)
        is_idle = now["xeray_num_requests_running"] + now["xeray_num_requests_waiting"] == 0
        if is_idle and now["xeray_generation_tokens_total"] >= at_least:
            return now
        time.sleep(0.2)
    raise AssertionError(f"{at_least} tokens were not counted: {now}")


def set_mode(app: Any, mode: str, max_num_seqs: int) -> dict[str, Any]:
    """Change the toggles on the running replica; returns its state then."""
    # A bare `off` in YAML is False.
    batching = {"mode": False if mode == "off" else mode, "max_num_seqs": max_num_seqs}
    app.reconfigure("ModelReplica", {"batching": batching})
    (state,) = app.wait_states(
        "ModelReplica",
        lambda s: (
            s
            and s[0]["toggles"]["batching"]["mode"] == mode
            and s[0]["toggles"]["batching"]["max_num_seqs"] == max_num_seqs
        ),
    )
    return dict(state)


def test_batching_modes_under_sixteen_streams(shared_app: Any) -> None:
    app = shared_app
    before = app.one("ModelReplica")
    running = app.start_streams(NUM_STREAMS, max_tokens=800)

    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == NUM_STREAMS)
    for mode in ("static", "off", "continuous"):
        after = set_mode(app, mode, max_num_seqs=64)
        assert app.one("ModelReplica", "stats").mode == mode
        assert (after["pid"], after["engine_pid"]) == (before["pid"], before["engine_pid"])

    assert running.result(timeout=120) == ["done"] * NUM_STREAMS


def test_what_each_mode_does_to_sixteen_streams(shared_app: Any) -> None:
    """Each phase starts while the streams of the one before still run; none of them breaks."""
    app = shared_app
    before = app.one("ModelReplica")
    joins, peaks = {}, {}
    last = app.start_streams(NUM_STREAMS, max_tokens=200)
    app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] == NUM_STREAMS)

    for mode in ("off", "static", "continuous"):
        set_mode(app, mode, max_num_seqs=64)
        assert last.result(timeout=60) == ["done"] * NUM_STREAMS
        tokens = wait_for_tokens(app, 0)["xeray_generation_tokens_total"]
        state = set_mode(app, mode, max_num_seqs=32)  # idle: the peak counts from here
        started = wait_for_tokens(app, tokens)
        first = app.start_streams(NUM_STREAMS // 2, max_tokens=20)
        app.wait_states("ModelReplica", lambda s: s and s[0]["num_streams"] > 0)
        second = app.start_streams(NUM_STREAMS // 2, max_tokens=20)
        ends = first.result(timeout=60) + second.result(timeout=60)
        ended = wait_for_tokens(app, tokens + 20 * NUM_STREAMS)

        assert ends == ["done"] * NUM_STREAMS
        assert (state["pid"], state["engine_pid"]) == (before["pid"], before["engine_pid"])
        joins[mode] = ended["xeray_num_joins_total"] - started["xeray_num_joins_total"]
        peaks[mode] = ended["xeray_max_num_requests_running"]
        last = app.start_streams(NUM_STREAMS, max_tokens=30)

    assert last.result(timeout=60) == ["done"] * NUM_STREAMS
    assert peaks["off"] == 1
    assert (joins["off"], joins["static"]) == (0, 0)
    assert joins["continuous"] > 0
    assert peaks["static"] > 1
    assert peaks["continuous"] > 1


def test_toggles_that_cannot_be_leave_everything_as_it_was(shared_app: Any) -> None:
    app = shared_app
    before = app.one("ModelReplica")

    app.reconfigure("ModelReplica", {"batching": {"max_num_seqs": 10_000}})

    app.wait_states(
        "ModelReplica", lambda s: s and "user_config refused" in s[0].detail, method="health"
    )
    after = app.one("ModelReplica")
    assert (after["pid"], after["toggles"]) == (before["pid"], before["toggles"])
    assert app.chat().status_code == 200


def test_sequences_of_one_request_run_side_by_side(shared_app: Any) -> None:
    """Serve gives all calls of an HTTP request one id; ours have their own, or one would hang."""
    body = {"model": "any", "prompt": ["One", "Two"], "n": 3, "max_tokens": 5}

    answer = httpx.post(f"{shared_app.url}/v1/completions", json=body, timeout=30).json()

    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("enabled", [False, True])
def test_micro_batching(shared_app: Any, enabled: bool) -> None:
    from serve_app.core.requests import PrepareRequest

    app = shared_app
    before = app.one("Preprocessor")
    toggles = {"enabled": enabled, "max_batch_size": 16, "batch_wait_timeout_s": 0.2}
    app.reconfigure("Preprocessor", {"micro_batching": toggles})
    app.wait_states("Preprocessor", lambda s: s and s[0]["micro_batching"] == toggles)
    prepare = app.handle("Preprocessor").prepare

    calls = [prepare.remote(PrepareRequest(str(i), text=f"text {i}")) for i in range(16)]
    answers = [call.result(timeout_s=30) for call in calls]

    assert len({answer.token_ids for answer in answers}) == 16, "each got its own"
    after = app.one("Preprocessor")
    assert after["pid"] == before["pid"]
    sizes = Counter(after["batch_sizes"]) - Counter(before["batch_sizes"])
    assert sum(size * count for size, count in sizes.items()) == 16
    mean = 16 / sum(sizes.values())
    assert mean > 1 if enabled else mean == 1


def slow_preprocessor() -> type:
    """A Preprocessor whose preparation sleeps 50 ms, however many prompts it gets."""
    from serve_app.deployments.preprocessor import Preprocessor

    class SlowPreparer:
        def prepare_batch(self, requests: Any) -> list[Any]:
            from serve_app.core.requests import PreparedPrompt

            time.sleep(CALL_S)
            return [PreparedPrompt(token_ids=(int(request.request_id),)) for request in requests]

    class SlowPreprocessor(Preprocessor):
        async def __init__(self, config: Any) -> None:  # type: ignore[misc]
            await Preprocessor.__init__(self, config)
            self._preparer = SlowPreparer()  # type: ignore[assignment]

    return SlowPreprocessor


def test_off_is_not_serialised(shared_serve: Any, shared_app: Any) -> None:
    """16 calls of 50 ms through Serve: 0.8 s one after the other, 0.05 s side by side."""
    from ray import serve

    from serve_app.config.schema import AppConfig
    from serve_app.core.requests import PrepareRequest
    from serve_app.deployments.options import preprocessor_options

    del shared_app  # its application has the route
    config = AppConfig.model_validate({"preprocessor": {"reserve_xeon_cores": False}})
    options = {
        **preprocessor_options(config),
        "user_config": {"micro_batching": {"enabled": False}},
    }
    bound = serve.deployment(**options)(slow_preprocessor()).bind(config)
    handle = serve.run(bound, name="slow", route_prefix=None)
    try:
        elapsed_s = []
        for _ in range(5):
            started_s = time.monotonic()
            calls = [handle.prepare.remote(PrepareRequest(str(i), text="x")) for i in range(16)]
            answers = [call.result(timeout_s=30).token_ids for call in calls]
            elapsed_s.append(time.monotonic() - started_s)
            assert answers == [(i,) for i in range(16)]
        sizes = handle.state.remote().result(timeout_s=30)["batch_sizes"]
    finally:
        serve.delete("slow")

    assert sizes == {1: 80}, "each alone"
    assert min(elapsed_s) < 0.3, elapsed_s


def test_off_runs_one_at_a_time(deployed: Callable[..., Any]) -> None:
    app = deployed({"model_replica": {"batching": {"mode": "off"}}})

    assert app.run_streams(4, max_tokens=20) == ["done"] * 4

    stats = app.one("ModelReplica", "stats")
    assert stats.max_num_running == 1
