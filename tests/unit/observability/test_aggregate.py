from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.observability.aggregate import RecentExpositions, merge_expositions

LABEL_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def replica_text(values: dict[str, float]) -> str:
    registry = CollectorRegistry()
    gauge = Gauge("load", "Load.", ("kind",), registry=registry)
    counter = Counter("tokens_total", "Tokens.", ("kind",), registry=registry)
    histogram = Histogram("wait_seconds", "Wait.", ("kind",), registry=registry, buckets=(1, 2))
    for kind, value in values.items():
        gauge.labels(kind).set(value)
        counter.labels(kind).inc(abs(value))
        histogram.labels(kind).observe(value)
    return generate_latest(registry).decode()


@given(
    st.dictionaries(
        st.sampled_from(["replica#a", "replica#b", "c"]),
        st.dictionaries(LABEL_TEXT, st.floats(-1e6, 1e6), max_size=4),
        min_size=1,
    )
)
def test_every_sample_survives_under_its_replica(replicas):
    texts = {replica: replica_text(values) for replica, values in replicas.items()}
    merged = samples(merge_expositions(texts))
    expected = {
        (name, tuple(sorted([*labels, ("replica", replica)]))): value
        for replica, text in texts.items()
        for (name, labels), value in samples(text).items()
    }
    assert merged == expected


def test_each_family_is_declared_once_with_its_type():
    text = merge_expositions({"a": replica_text({"x": 1}), "b": replica_text({"x": 2})})
    assert text.count("# TYPE tokens_total counter") == 1
    assert text.count("# TYPE wait_seconds histogram") == 1
    assert text.count("# TYPE load gauge") == 1


def test_merging_a_merged_text_changes_nothing():
    merged = merge_expositions({"a": replica_text({"x": 1}), "b": replica_text({"x": 2})})
    assert samples(merge_expositions({"outer": merged})) == samples(merged)


def test_equal_samples_are_kept_once():
    own = replica_text({"x": 1})
    labelled = merge_expositions({"a": own})
    assert samples(merge_expositions({"a": own, "backend": labelled})) == samples(labelled)


def test_empty_texts_and_nonsense():
    assert merge_expositions({"a": "", "b": "\n"}) == ""
    with pytest.raises(ValueError, match=r"."):
        merge_expositions({"a": "{{{ nonsense"})


def test_a_silent_replica_keeps_its_last_text_for_a_while():
    now_s = 0.0
    recent = RecentExpositions(4.0, now=lambda: now_s)
    assert recent.update({"a": "a 1\n", "b": "b 1\n"}) == {"a": "a 1\n", "b": "b 1\n"}

    now_s = 3.0
    assert recent.update({"b": "b 2\n"}) == {"a": "a 1\n", "b": "b 2\n"}

    now_s = 4.0
    assert recent.update({}) == {"b": "b 2\n"}
