from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.observability.activity import (
    MAX_ERRORS,
    NUM_SLOTS,
    SLOT_S,
    Activity,
    Slot,
    last_slots,
    merge_reports,
    quantile,
)
from serve_app.observability.metrics import IngressMetrics


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(min_value=0.001, max_value=1000), min_size=1, max_size=50))
def test_quantiles_are_within_five_percent(values: list[float]):
    clock = Clock()
    activity = Activity(clock)
    for value in values:
        activity.note_first_token(value)
    (slot,) = activity.report().slots.values()
    exact = sorted(values)
    assert quantile(slot.ttft, 1.0) == pytest.approx(exact[-1], rel=0.05)
    assert quantile(slot.ttft, 0.5) == pytest.approx(exact[(len(exact) - 1) // 2], rel=0.05)


def test_no_values_have_no_quantile():
    assert quantile(Counter(), 0.5) is None


def test_old_slots_and_errors_are_forgotten():
    clock = Clock()
    activity = Activity(clock)
    activity.note_finish(0.1, 3)
    for number in range(MAX_ERRORS + 5):
        activity.note_error(500, "server_error", f"code-{number}", "/generate", "id")
    clock.now += SLOT_S * (NUM_SLOTS - 1)
    assert len(activity.report().slots) == 1
    clock.now += SLOT_S
    report = activity.report()
    assert report.slots == {}
    assert len(report.errors) == MAX_ERRORS
    assert report.errors[-1].code == f"code-{MAX_ERRORS + 4}"


def test_reports_add_up_and_errors_stay_in_order():
    clock = Clock()
    parts = [Activity(clock), Activity(clock)]
    for place, activity in enumerate(parts * 2):
        clock.now += 1
        activity.note_first_token(0.1)
        activity.note_finish(0.01, 5)
        activity.note_served("local")
        activity.note_error(503, "overloaded_error", str(place), "/generate", "id")
    merged = merge_reports(activity.report() for activity in parts)
    assert [error.code for error in merged.errors] == ["0", "1", "2", "3"]
    assert merged.served_by == {"local": 4}
    assert sum(slot.num_tokens for slot in merged.slots.values()) == 20
    # Merging copies: the parts' own reports are as they were.
    assert sum(slot.num_tokens for slot in parts[0].report().slots.values()) == 10


def test_the_last_slots_end_before_the_one_that_still_fills():
    clock = Clock()
    activity = Activity(clock)
    activity.note_finish(None, 7)
    assert last_slots(activity.report(), clock.now)[-1] == Slot()
    slots = last_slots(activity.report(), clock.now + SLOT_S)
    assert len(slots) == NUM_SLOTS
    assert slots[-1].num_tokens == 7


def test_goodput_counts_whole_sequences_that_met_both_limits(monkeypatch: pytest.MonkeyPatch):
    from serve_app.config.sections_cost import SloSection
    from serve_app.observability import metrics as module

    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    metrics = IngressMetrics("m", slo=SloSection(ttft_ms=500, tpot_ms=100))

    def sequence(ttft_s: float, tpot_s: float, reason: str = "stop", num: int = 5) -> None:
        timer = metrics.start_sequence(clock.now)
        for place in range(num):
            clock.now += ttft_s if place == 0 else tpot_s
            timer.on_tokens(3, place + 1)
        timer.on_finish(reason, 3)

    sequence(0.4, 0.09)
    sequence(0.6, 0.09)
    sequence(0.4, 0.11)
    sequence(0.4, 0.01, reason="abort")  # nobody got it whole
    sequence(0.4, 0.0, num=1)  # one token has no time per token
    lines = metrics.render().splitlines()
    assert 'xeray_slo_sequences_total{model_name="m"} 4.0' in lines
    assert 'xeray_goodput_sequences_total{model_name="m"} 2.0' in lines
    assert 'xeray_slo_limit_seconds{kind="ttft"} 0.5' in lines
