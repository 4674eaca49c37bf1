from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from serve_app.core.events import EngineStats
from serve_app.observability import metrics as module
from serve_app.observability.engine_metrics import EngineMetrics
from serve_app.observability.histogram import WeightedHistogram
from serve_app.observability.metrics import IngressMetrics


def samples(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            bucket = f"|{sample.labels['le']}" if "le" in sample.labels else ""
            found[sample.name + bucket] = sample.value
    return found


def test_weighted_histogram_counts_like_many_observations():
    histogram = WeightedHistogram("wait", "Wait.", (1, 2), {"model_name": "m"})
    histogram.observe(0.5, 3)
    histogram.observe(1.0)  # a bound belongs to its bucket
    histogram.observe(9.0, 2)
    (family,) = histogram.collect()
    values = {(sample.name, sample.labels.get("le")): sample.value for sample in family.samples}
    assert values[("wait_bucket", "1.0")] == 4
    assert values[("wait_bucket", "2.0")] == 4
    assert values[("wait_bucket", "+Inf")] == values[("wait_count", None)] == 6
    assert values[("wait_sum", None)] == 0.5 * 3 + 1 + 18
    assert family.samples[0].labels["model_name"] == "m"


def test_engine_statistics_have_the_fields_names():
    metrics = EngineMetrics("m")
    metrics.update(EngineStats(weight_bytes_read_total=1000), now_s=10.0)
    metrics.update(
        EngineStats(
            num_running=3,
            num_waiting=2,
            num_blocks=10,
            num_used_blocks=4,
            num_steps_total=4,
            num_scheduled_tokens_total=40,
            num_prompt_tokens_total=30,
            num_generation_tokens_total=12,
            num_preemptions_total=1,
            num_prefix_queries_tokens_total=20,
            num_prefix_hit_tokens_total=16,
            num_drafts_total=3,
            num_draft_tokens_total=9,
            num_accepted_tokens_total=7,
            weight_bytes_read_total=5000,
        ),
        now_s=12.0,
    )
    shown = samples(metrics.render())
    expected = {
        "xeray_num_requests_running": 3,
        "xeray_num_requests_waiting": 2,
        "xeray_kv_cache_usage_perc": 0.4,
        "xeray_prompt_tokens_total": 30,
        "xeray_generation_tokens_total": 12,
        "xeray_num_preemptions_total": 1,
        "xeray_prefix_cache_queries_total": 20,
        "xeray_prefix_cache_hits_total": 16,
        "xeray_spec_decode_num_drafts_total": 3,
        "xeray_spec_decode_num_draft_tokens_total": 9,
        "xeray_spec_decode_num_accepted_tokens_total": 7,
        "xeray_iteration_tokens_total_count": 4,
        "xeray_iteration_tokens_total_sum": 40,
        "xeray_iteration_tokens_total_bucket|8.0": 0,
        "xeray_iteration_tokens_total_bucket|16.0": 4,
        "memory_bandwidth_bytes": 2000,
    }
    assert {name: shown[name] for name in expected} == expected


def test_engine_that_was_respawned_starts_again():
    metrics = EngineMetrics("m")
    metrics.update(EngineStats(num_steps_total=9, weight_bytes_read_total=900), now_s=1)
    metrics.update(EngineStats(num_steps_total=2, weight_bytes_read_total=100), now_s=2)
    shown = samples(metrics.render())
    assert shown["xeray_engine_steps_total"] == 2
    assert shown["memory_bandwidth_bytes"] == 0
    assert shown["xeray_iteration_tokens_total_count"] == 9


def test_one_sequence_is_measured(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    metrics = IngressMetrics("m")
    timer = metrics.start_sequence(99.0)
    timer.on_engine_times(0.25, 0.75)
    timer.on_tokens(7, 1)
    timer.on_tokens(7, 1)  # text without a token changes nothing
    now[0] = 101.0
    timer.on_tokens(7, 5)
    now[0] = 102.0
    timer.on_finish("stop", 7)
    shown = samples(metrics.render())
    expected = {
        "xeray_time_to_first_token_seconds_sum": 1.0,
        "xeray_inter_token_latency_seconds_count": 4,
        "xeray_inter_token_latency_seconds_sum": 1.0,
        "xeray_request_time_per_output_token_seconds_sum": 0.25,
        "xeray_e2e_request_latency_seconds_sum": 3.0,
        "xeray_request_queue_time_seconds_sum": 0.25,
        "xeray_request_prefill_time_seconds_sum": 0.5,
        "xeray_request_decode_time_seconds_sum": 1.0,
        "xeray_request_prompt_tokens_sum": 7,
        "xeray_request_generation_tokens_sum": 5,
        "xeray_request_success_total": 1,
    }
    assert {name: shown[name] for name in expected} == expected


def test_sequence_without_a_token_has_no_token_times():
    metrics = IngressMetrics("m")
    metrics.start_sequence(0.0).on_finish("error", 7)
    shown = samples(metrics.render())
    assert shown["xeray_time_to_first_token_seconds_count"] == 0
    assert shown["xeray_request_decode_time_seconds_count"] == 0
    assert shown["xeray_e2e_request_latency_seconds_count"] == 1


def test_operators_of_the_last_profile_are_samples():
    metrics = EngineMetrics("m")
    assert "xeray_operator_seconds_total" not in metrics.render()
    metrics.set_operator_seconds({"aten::mm": 0.5, "aten::add": 0.1})
    assert 'xeray_operator_seconds_total{model_name="m",op="aten::mm"} 0.5' in metrics.render()
    metrics.set_operator_seconds({"aten::bmm": 0.2})
    assert "aten::mm" not in metrics.render()
