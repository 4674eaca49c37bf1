from __future__ import annotations

from dataclasses import asdict

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.errors import ConfigError, EngineError, OverloadedError
from serve_app.core.events import (
    EngineCapabilities,
    EngineInfo,
    EngineStats,
    FinishReason,
    TokenEvent,
    TokenLogprob,
)
from serve_app.core.sampling import SamplingParams
from serve_app.engine import wire

ids = st.integers(0, 200_000)
logprobs = st.builds(
    TokenLogprob,
    ids,
    st.floats(-50, 0),
    st.lists(st.tuples(ids, st.floats(-50, 0)), max_size=3).map(tuple),
)
events = st.builds(
    TokenEvent,
    st.text(min_size=1),
    st.lists(ids, max_size=4).map(tuple),
    logprobs=st.none() | st.lists(logprobs, max_size=3).map(tuple),
    finish_reason=st.none() | st.sampled_from(list(FinishReason)),
    stop_token_id=st.none(),
    num_cached_tokens=st.integers(0, 1000),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3).map(tuple),
    error=st.none(),
    embedding=st.none(),
    queue_time_s=st.none() | st.floats(0, 600),
) | st.builds(
    TokenEvent,
    st.text(min_size=1),
    finish_reason=st.just(FinishReason.LENGTH),
    embedding=st.binary(),
)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 5000),
    embeds=st.booleans(),
    stop_token_ids=st.lists(ids, max_size=4).map(tuple),
    temperature=st.floats(0, 2),
    logit_bias=st.lists(st.tuples(ids, st.floats(-100, 100)), max_size=3).map(tuple),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
    cache_salt=st.none() | st.text(),
)


def over_the_wire(value: object) -> object:
    return msgpack.unpackb(msgpack.packb(value))


@given(events)
def test_events_survive(event):
    assert wire.unpack_event(over_the_wire(wire.pack_event(event))) == event


def test_an_error_event_survives():
    event = TokenEvent("a", finish_reason=FinishReason.ERROR, error=EngineError("gone").info())
    assert wire.unpack_event(over_the_wire(wire.pack_event(event))) == event


@given(sampling)
def test_sampling_survives(params):
    assert wire.unpack_sampling(over_the_wire(wire.pack_sampling(params))) == params


def test_stats_info_and_errors_survive():
    stats = EngineStats(num_running=3, mode="off", step_time_s_total=1.5)
    assert wire.unpack_stats(over_the_wire(wire.pack_stats(stats))) == stats
    info = EngineInfo(
        "native", "m", "cpu", "x", "float32", 10, 20, 3, 4, 16, 8, EngineCapabilities(seed=False)
    )
    assert wire.unpack_info(over_the_wire(asdict(info))) == info
    for error in (ConfigError("a", param="b"), EngineError("c"), OverloadedError("d")):
        back = wire.unpack_error(over_the_wire(wire.pack_error(error)))
        assert type(back) is type(error)
        assert (back.message, back.param) == (error.message, error.param)


@given(st.lists(st.lists(st.integers() | st.text()), max_size=6), st.integers(1, 7))
def test_frames_come_whole_however_the_bytes_are_cut(frames, size):
    frames = [[v if isinstance(v, str) else v % 2**63 for v in frame] for frame in frames]
    data = b"".join(wire.pack_frame(*frame) for frame in frames)
    reader = wire.FrameReader()
    got = [f for i in range(0, len(data), size) for f in reader.feed(data[i : i + size])]
    assert got == frames
