"""The choice among a model's widths under scripted load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from serve_app.core.clock import ManualClock
from serve_app.core.errors import ConfigError
from serve_app.deployments.precision import Load, PrecisionLimits, PrecisionPolicy, Variant

VARIANTS = (Variant("bf16", 160), Variant("int8", 90), Variant("int4", 50))
BUSY = Load(0.95, 4, 8, 1000)
CALM = Load(0.1, 1, 8, 1000)
BETWEEN = Load(0.6, 2, 8, 1000)


def _policy(clock, registry=None, **limits):
    return PrecisionPolicy(VARIANTS, PrecisionLimits(**limits), clock=clock, registry=registry)


def test_it_narrows_under_load_and_comes_back():
    clock, registry = ManualClock(), CollectorRegistry()
    policy = _policy(clock, registry, patience_s=10)

    def active(name):
        return registry.get_sample_value("xeray_precision_active", {"variant": name})

    assert policy.observe(BUSY).name == "bf16"
    clock.advance(9)
    assert policy.observe(BUSY).name == "bf16"
    clock.advance(1)
    assert policy.observe(BUSY).name == "int8"
    assert (active("bf16"), active("int8")) == (0, 1)
    policy.observe(CALM)
    clock.advance(10)
    assert policy.observe(CALM).name == "bf16"
    assert (active("bf16"), active("int8")) == (1, 0)
    switched = {"variant": "int8"}
    assert registry.get_sample_value("xeray_precision_switches_total", switched) == 1


def test_a_moment_of_relief_begins_the_wait_anew():
    clock = ManualClock()
    policy = _policy(clock, patience_s=10)
    for load in (BUSY, BETWEEN, BUSY):
        assert policy.observe(load).name == "bf16"
        clock.advance(9)
    assert policy.observe(BUSY).name == "bf16"


def test_waiting_sequences_are_pressure_too():
    clock = ManualClock()
    policy = _policy(clock, patience_s=0)
    assert policy.observe(Load(0.0, 9, 8, 1000)).name == "int8"


def test_it_does_not_widen_into_memory_that_is_not_there():
    clock = ManualClock()
    policy = _policy(clock, patience_s=0)
    assert policy.start(100).name == "int8"
    assert policy.observe(Load(0.0, 0, 8, 159)).name == "int8"
    assert policy.observe(Load(0.0, 0, 8, 160)).name == "bf16"


def test_a_long_prompt_takes_the_narrowest_for_itself():
    registry = CollectorRegistry()
    policy = _policy(ManualClock(), registry, long_prompt_tokens=100)
    assert policy.choose(100).name == "int4"
    assert policy.choose(99).name == "bf16"
    assert policy.active.name == "bf16"
    counted = registry.get_sample_value("xeray_precision_requests_total", {"variant": "int4"})
    assert counted == 1


def test_bad_variants_and_limits_are_named():
    with pytest.raises(ConfigError, match="needs 50 bytes, and 49 are free"):
        _policy(ManualClock()).start(49)
    with pytest.raises(ConfigError, match="widest first"):
        PrecisionPolicy(VARIANTS[::-1])
    with pytest.raises(ConfigError, match="one name"):
        PrecisionPolicy([VARIANTS[0], VARIANTS[0]])
    with pytest.raises(ConfigError, match="below high"):
        PrecisionLimits(low=0.9, high=0.9)


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 5)), max_size=60))
def test_it_moves_one_step_at_a_time_and_never_faster_than_its_patience(loads):
    clock = ManualClock()
    policy = _policy(clock, patience_s=10)
    names = [variant.name for variant in VARIANTS]
    moved_s, before = -10.0, 0
    for pressure, seconds in loads:
        clock.advance(seconds)
        index = names.index(policy.observe(Load(pressure, 0, 8, 1000)).name)
        assert abs(index - before) <= 1
        if index != before:
            assert clock.now() - moved_s >= 10
            moved_s, before = clock.now(), index
