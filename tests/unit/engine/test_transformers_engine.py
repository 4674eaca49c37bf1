from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import ConfigError, EngineError, UnsupportedParameterError
from serve_app.core.events import BatchingMode, BatchingOptions, FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.factory import create_engine
from serve_app.engine.transformers_engine import TransformersEngine, _queue_time, _Request

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-NeoX: an architecture that the native engine lacks."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("tiny-neox")
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_neox(neox_folder: Path) -> Iterator[Callable[..., TransformersEngine]]:
    engines: list[TransformersEngine] = []

    def make(**section: object) -> TransformersEngine:
        settings = {"kv_cache_tokens": 2048, "max_num_seqs": 4, "dtype": "float32", **section}
        engine = create_engine(ModelSection(path=str(neox_folder)), EngineSection(**settings))
        assert isinstance(engine, TransformersEngine)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def test_an_unknown_architecture_streams_through_transformers(make_neox, run_all, neox_folder):
    from transformers import GPTNeoXForCausalLM

    reference = GPTNeoXForCausalLM.from_pretrained(neox_folder, dtype=torch.float32).eval()
    engine = make_neox()
    assert engine.info.engine == "transformers"
    prompts = [[5, 6, 7], [9, 4, 1, 2, 8], list(range(20, 60)), [11], [3, 3], [8, 1]]
    collected = run_all(engine, {f"r{i}": (p, GREEDY) for i, p in enumerate(prompts)})
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert collected.ids(f"r{i}") == expected
        assert collected.end(f"r{i}").finish_reason is FinishReason.LENGTH
        assert len(collected.events[f"r{i}"]) > 1, "tokens must come one after the other"
    stats = engine.stats()
    assert stats.num_generation_tokens_total == 12 * 6
    assert stats.num_free_blocks == stats.num_blocks


def test_stop_ids_are_reported(make_neox, run_all):
    engine = make_neox()
    ids = run_all(engine, {"a": ([5, 6, 7], GREEDY)}).ids("a")
    cut = ids.index(ids[4]) + 1
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(ids[4],))
    collected = run_all(engine, {"b": ([5, 6, 7], params)})
    assert collected.ids("b") == ids[:cut]
    assert collected.end("b").finish_reason is FinishReason.STOP
    assert collected.end("b").stop_token_id == ids[4]


def test_abort_makes_the_last_event_that_the_manager_does_not_send(make_neox):
    engine = make_neox()
    engine.submit("a", [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=200))
    events = engine.step()
    while not events:
        events = engine.step()
    engine.abort("a")
    rest = engine.step()
    assert [event.finish_reason for event in rest][-1] is FinishReason.ABORTED
    assert not engine.has_work()
    engine.submit("a", [5, 6, 7], GREEDY)
    again = []
    while engine.has_work():
        again += engine.step()
    assert sum(len(event.new_token_ids) for event in again) == 12


def test_off_runs_one_at_a_time(make_neox, run_all):
    engine = make_neox()
    engine.configure(BatchingOptions(BatchingMode.OFF))
    collected = run_all(engine, {f"r{i}": ([5 + i], GREEDY) for i in range(3)})
    assert engine.stats().max_num_running == 1
    events = [collected.events[f"r{i}"] for i in range(3)]
    waits = [[event.queue_time_s for event in own] for own in events]
    assert 0 <= waits[0][0] < waits[1][0] < waits[2][0], "they wait one for the other"
    assert not any(later for own in waits for later in own[1:]), "told once"


def test_a_wait_that_the_manager_does_not_tell_is_unknown():
    request = _Request("a", "0", [5], GREEDY)
    request.handed_over_s = request.submitted_s + 2.0
    assert _queue_time(request, SimpleNamespace(lifespan=(-1, -1), created_time=7.0)) is None
    told = SimpleNamespace(lifespan=(10.0, -1), created_time=7.0)
    assert _queue_time(request, told) == pytest.approx(5.0)


def test_what_the_manager_lacks_is_refused(make_neox):
    engine = make_neox()
    for name, params in {
        "seed": SamplingParams(seed=1),
        "min_p": SamplingParams(min_p=0.1),
        "logprobs": SamplingParams(logprobs=0),
        "repetition_penalty": SamplingParams(repetition_penalty=1.2),
        "logit_bias": SamplingParams(logit_bias=((1, 1.0),)),
    }.items():
        with pytest.raises(UnsupportedParameterError) as refused:
            engine.submit("a", [5], params)
        assert refused.value.param == name


def test_a_dead_manager_ends_requests_and_then_the_engine(make_neox):
    engine = make_neox()
    engine.submit("a", [5], SamplingParams(temperature=0.0, max_tokens=200))
    engine.submit("b", [6], SamplingParams(temperature=0.0, max_tokens=200))
    engine.step()
    engine._manager.stop(block=True, timeout=10, hard_stop=True)
    events = []
    for _ in range(5):
        events += engine.step()
        if len({e.request_id for e in events if e.finish_reason}) == 2:
            break
    assert {e.finish_reason for e in events if e.finish_reason} == {FinishReason.ERROR}
    engine.submit("c", [7], GREEDY)
    assert [event.finish_reason for event in engine.step()] == [FinishReason.ERROR]
    assert engine.has_work(), "the worker must come to know that the engine is dead"
    with pytest.raises(EngineError):
        engine.step()


def test_batch_invariance_is_not_promised(neox_folder):
    with pytest.raises(ConfigError, match="batch_invariant"):
        create_engine(
            ModelSection(path=str(neox_folder)),
            EngineSection(batch_invariant=True, dtype="float32"),
        )


def test_drafts_are_refused_where_only_this_engine_serves_the_model(neox_folder):
    section = EngineSection(speculative={"method": "prompt_lookup"}, dtype="float32")
    with pytest.raises(ConfigError, match=r"engine\.speculative\.method: .* set it to off") as it:
        create_engine(ModelSection(path=str(neox_folder)), section)
    assert it.value.param == "engine.speculative.method"
