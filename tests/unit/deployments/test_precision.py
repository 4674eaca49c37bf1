"""The choice among a model's widths under scripted load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from serve_app.config.load import validate_args
from serve_app.config.sections_precision import PrecisionSection
from serve_app.core.clock import ManualClock
from serve_app.core.errors import ConfigError
from serve_app.core.requests import GenerateRequest, ReplicaHealth, ReplicaLoad
from serve_app.core.sampling import SamplingParams
from serve_app.deployments.pools import ModelPools, Pool, model_pools
from serve_app.deployments.precision import Load, PrecisionPolicy
from serve_app.deployments.routing import ReplicaRouter

WIDTHS = ("bf16", "int8", "int4")
BUSY = Load(0.95, 4, 8)
CALM = Load(0.1, 1, 8)
BETWEEN = Load(0.6, 2, 8)


def _policy(clock, registry=None, **limits):
    section = PrecisionSection(mode="auto", **limits)
    return PrecisionPolicy(WIDTHS, section, clock=clock, registry=registry)


def loads(load: Load, *names: str) -> dict[str, Load]:
    """The same load of each width that is named, of all where none is."""
    return dict.fromkeys(names or WIDTHS, load)


def test_it_narrows_under_load_and_comes_back():
    clock, registry = ManualClock(), CollectorRegistry()
    policy = _policy(clock, registry, patience_s=10)

    def active(name):
        return registry.get_sample_value("xeray_precision_active", {"variant": name})

    assert policy.observe(loads(BUSY)) == "bf16"
    clock.advance(9)
    assert policy.observe(loads(BUSY)) == "bf16"
    clock.advance(1)
    assert policy.observe(loads(BUSY)) == "int8"
    assert (active("bf16"), active("int8")) == (0, 1)
    policy.observe(loads(CALM))
    clock.advance(10)
    assert policy.observe(loads(CALM)) == "bf16"
    assert (active("bf16"), active("int8")) == (1, 0)
    switched = {"variant": "int8"}
    assert registry.get_sample_value("xeray_precision_switches_total", switched) == 1


def test_a_moment_of_relief_begins_the_wait_anew():
    clock = ManualClock()
    policy = _policy(clock, patience_s=10)
    for load in (BUSY, BETWEEN, BUSY):
        assert policy.observe(loads(load)) == "bf16"
        clock.advance(9)
    assert policy.observe(loads(BUSY)) == "bf16"


def test_waiting_sequences_are_pressure_too():
    assert _policy(ManualClock(), patience_s=0).observe(loads(Load(0.0, 9, 8))) == "int8"


def test_it_does_not_widen_while_the_wider_one_is_still_busy():
    policy = _policy(ManualClock(), patience_s=0)
    assert policy.observe(loads(BUSY)) == "int8"
    assert policy.observe({"bf16": BUSY, "int8": CALM}) == "int8"
    assert policy.observe({"bf16": CALM, "int8": CALM}) == "bf16"


def test_only_what_can_be_loaded_is_chosen():
    policy = _policy(ManualClock(), patience_s=0, long_prompt_tokens=100)
    assert policy.observe(loads(CALM, "int8", "bf16")) == "bf16"
    assert policy.choose(100) == "int8", "the narrowest that is there"
    assert policy.observe(loads(BUSY, "bf16", "int4")) == "int4", "the next that is there"
    assert policy.observe(loads(CALM, "int8")) == "int8", "the active one is gone"
    assert policy.observe(loads(BUSY, "int8")) == "int8"
    assert policy.observe({}) == "int8", "and nothing else came"


def test_a_long_prompt_takes_the_narrowest_for_itself():
    registry = CollectorRegistry()
    policy = _policy(ManualClock(), registry, long_prompt_tokens=100)
    assert policy.choose(100) == "int4"
    assert policy.choose(99) == "bf16"
    assert policy.active == "bf16"
    counted = registry.get_sample_value("xeray_precision_requests_total", {"variant": "int4"})
    assert counted == 1


def test_bad_variants_are_named():
    for names in ((), ("int4", "int4")):
        with pytest.raises(ConfigError, match="name of its own"):
            PrecisionPolicy(names)


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 5)), max_size=60))
def test_it_moves_one_step_at_a_time_and_never_faster_than_its_patience(course):
    clock = ManualClock()
    policy = _policy(clock, patience_s=10)
    moved_s, before = -10.0, 0
    for pressure, seconds in course:
        clock.advance(seconds)
        index = WIDTHS.index(policy.observe(loads(Load(pressure, 0, 8))))
        assert abs(index - before) <= 1
        if index != before:
            assert clock.now() - moved_s >= 10
            moved_s, before = clock.now(), index


POOLS = [{"name": "wide"}, {"name": "narrow", "engine": {"weight_format": "int4"}}]


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"precision": {"mode": "auto"}}, "two pools or more"),
        ({"precision": {"low": 0.9, "high": 0.5}, "pools": POOLS}, r"low \(0.9\) should be below"),
        ({"precision": {"mode": "fast"}}, "mode"),
    ],
)
def test_a_config_that_cannot_be_is_refused(args: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        validate_args(args)


def test_it_is_off_unless_the_config_says_otherwise():
    handles: Any = [object(), object()]
    assert model_pools(validate_args({"pools": POOLS}), handles).precision is None
    assert (
        model_pools(
            validate_args({"pools": POOLS, "precision": {"mode": False}}), handles
        ).precision
        is None
    )  # a bare off in YAML
    registry = CollectorRegistry()
    config = validate_args({"pools": POOLS, "precision": {"mode": "auto"}})
    assert model_pools(config, handles, registry).precision is not None
    wide = {"variant": "wide"}
    assert registry.get_sample_value("xeray_precision_active", wide) == 1


class Deployment:
    """A pool's deployment: notes to which replica each request went."""

    def __init__(self) -> None:
        self.went_to: list[str | None] = []
        self.generate = SimpleNamespace(remote=self._generate)

    def options(self, *, stream: bool) -> Deployment:
        assert stream
        return self

    def _generate(self, request: GenerateRequest) -> str:
        self.went_to.append(request.target_replica)
        return "stream"


def health(replica_id: str, num_streams: int) -> ReplicaHealth:
    load = ReplicaLoad(num_streams=num_streams, max_num_seqs=4, num_blocks=100)
    return ReplicaHealth(replica_id, "ready", load=load)


def test_requests_go_to_the_active_width_and_come_back_to_it():
    clock = ManualClock()
    wide, narrow = Deployment(), Deployment()
    pools: Any = ModelPools(
        (Pool("wide", wide), Pool("narrow", narrow)),  # type: ignore[arg-type]
        ReplicaRouter(now=clock.now),
        PrecisionPolicy(
            ("wide", "narrow"),
            PrecisionSection(mode="auto", patience_s=5, long_prompt_tokens=50),
            clock=clock,
        ),
    )

    def report(num_wide: int, num_narrow: int) -> None:
        ranked = [(0, health("w", num_wide)), (1, health("n", num_narrow))]
        pools.router.update(ranked, clock.now())
        pools.precision.update(ranked)

    def send(num_tokens: int = 3, exclude: tuple[str, ...] = ()) -> str:
        request = GenerateRequest("r", tuple(range(num_tokens)), SamplingParams())
        call = pools.start(request, exclude)
        call.close()
        return call.ticket.replica_id

    report(0, 0)
    assert send() == "w"
    assert send(num_tokens=50) == "n", "a long prompt goes to the narrowest"
    report(4, 0)
    assert send() == "w", "a moment's pressure changes nothing"
    clock.advance(6)
    report(4, 0)
    assert send() == "n"
    assert send(exclude=("n",)) == "w", "rather another width than none"
    report(0, 1)
    clock.advance(6)
    report(0, 1)
    assert send() == "w"
    assert wide.went_to == ["w", "w", "w", "w"]
    assert narrow.went_to == ["n", "n"]
