"""The embedding engine against transformers' hidden states on the same weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from serve_app.config.schema import EngineSection, ModelSection
from serve_app.core.errors import ClientError, ConfigError, ContextLengthError, EngineError
from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.sampling import SamplingParams
from serve_app.engine.client import EngineClient
from serve_app.engine.embedding import EmbeddingEngine
from serve_app.engine.factory import create_engine

EMBED = SamplingParams(max_tokens=0, embeds=True)
SECTION = {
    "device": "cpu",
    "dtype": "float32",
    "kv_cache_tokens": 2048,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "warmup": False,
}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A tiny random Qwen3 as its embedding models are saved: layers alone, without a head."""
    from transformers import Qwen3Config, Qwen3Model

    folder = tmp_path_factory.mktemp("tiny-qwen3-embedding")
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = Qwen3Model(config).eval()
    model.save_pretrained(folder)
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_N"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    return folder, model


@torch.inference_mode()
def reference(model: torch.nn.Module, ids: list[int], pooling: str) -> np.ndarray:
    states = model(torch.tensor([ids])).last_hidden_state[0]
    vector = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]
    return vector.numpy()


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(96) for _ in range(rng.randint(1, 130))] for _ in range(count)]


def run(engine: EmbeddingEngine, asked: list[list[int]]) -> dict[str, TokenEvent]:
    """Embed all at once; each gets exactly one event."""
    for place, ids in enumerate(asked):
        engine.submit(str(place), ids, EMBED)
    events: dict[str, TokenEvent] = {}
    while engine.has_work():
        for event in engine.step():
            assert event.request_id not in events
            events[event.request_id] = event
    return events


def vector_of(event: TokenEvent) -> np.ndarray:
    assert event.finish_reason is FinishReason.LENGTH, event.error
    return np.frombuffer(event.embedding, dtype="<f4")


@pytest.fixture
def make(qwen3: tuple[Path, torch.nn.Module]) -> Callable[..., EmbeddingEngine]:
    """A function from embedding settings (and engine settings) to an engine."""

    def make(embedding: dict[str, object] | None = None, **section: object) -> EmbeddingEngine:
        model = ModelSection.model_validate({"path": str(qwen3[0]), "embedding": embedding or {}})
        engine = create_engine(model, EngineSection.model_validate({**SECTION, **section}))
        assert isinstance(engine, EmbeddingEngine)
        return engine

    return make


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("is_invariant", [False, True])
def test_vectors_are_the_references(make, qwen3, pooling, is_invariant):
    engine = make({"pooling": pooling}, batch_invariant=is_invariant)
    asked = prompts(20)  # more than run at once, most of them longer than a step
    events = run(engine, asked)
    for place, ids in enumerate(asked):
        expected = reference(qwen3[1], ids, pooling)
        got = vector_of(events[str(place)])
        assert abs(float(np.linalg.norm(got)) - 1.0) < 1e-5
        cosine = float(got @ expected / np.linalg.norm(expected))
        assert cosine >= 0.9999, (place, len(ids), cosine)
    stats = engine.stats()
    assert (stats.num_used_blocks, stats.num_free_blocks) == (0, stats.num_blocks)
    assert stats.num_prompt_tokens_total == sum(map(len, asked))
    assert stats.num_generation_tokens_total == 0
    assert stats.num_chunked_prefills_total > 0
    engine.check_integrity()


def test_without_normalisation_the_hidden_state_itself_comes(make, qwen3):
    ids = prompts(1)[0]
    events = run(make({"normalize": False}), [ids])
    np.testing.assert_allclose(
        vector_of(events["0"]), reference(qwen3[1], ids, "last"), rtol=1e-3, atol=1e-4
    )


def test_invariant_vectors_are_the_same_bits_alone_and_together(make):
    asked = prompts(6)
    engine = make({"pooling": "mean"}, batch_invariant=True)
    together = {key: event.embedding for key, event in run(engine, asked).items()}
    for place, ids in enumerate(asked):
        assert run(engine, [ids])["0"].embedding == together[str(place)]


def test_abort_frees_blocks_and_ends_once(make):
    engine = make()
    engine.submit("a", list(range(90)), EMBED)
    assert engine.step() == []
    engine.abort("a")
    engine.abort("a")
    engine.abort("unknown")
    assert engine.stats().num_used_blocks == 0
    (event,) = engine.step()
    assert event.finish_reason is FinishReason.ABORTED
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("ids", "sampling", "error", "param"),
    [
        ([1], SamplingParams(max_tokens=3), ClientError, "generation"),
        ([], EMBED, ClientError, "prompt"),
        ([96], EMBED, ClientError, "prompt"),
        ([1] * 257, EMBED, ContextLengthError, "prompt"),
    ],
)
def test_what_can_never_be_served_is_refused(make, ids, sampling, error, param):
    engine = make()
    with pytest.raises(error) as caught:
        engine.submit("a", ids, sampling)
    assert caught.value.param == param
    assert len(run(engine, [[1] * 256])) == 1, "the longest prompt fits"


def test_an_engine_that_generates_refuses_to_embed(make_engine):
    with pytest.raises(ClientError, match="embeddings") as caught:
        make_engine().submit("a", [1], EMBED)
    assert caught.value.param == "embeddings"


def test_out_of_memory_sheds_the_youngest_and_computes_the_others_anew(make, qwen3, monkeypatch):
    engine = make({"pooling": "mean"}, max_num_batched_tokens=100)
    forward, calls = engine._network.forward, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 2:  # the rest of the first prompt, and most of the second
            raise torch.OutOfMemoryError("no room")
        return forward(*args)

    monkeypatch.setattr(engine._network, "forward", fail_once)
    asked = [[1 + place + i % 70 for i in range(120)] for place in range(3)]
    events = run(engine, asked)
    assert "out of memory" in events["1"].error.message
    for place in (0, 2):
        expected = reference(qwen3[1], asked[place], "mean")
        got = vector_of(events[str(place)])
        assert float(got @ expected) / np.linalg.norm(expected) > 0.9999
    stats = engine.stats()
    assert (stats.num_shed_total, stats.num_used_blocks) == (1, 0)
    assert stats.num_preemptions_total == 1
    assert run(engine, asked[1:2])["0"].finish_reason is FinishReason.LENGTH


def test_non_finite_states_end_only_their_prompt(make, monkeypatch):
    engine = make(max_num_batched_tokens=256)
    forward = engine._network.forward

    def poisoned(ids, *args):
        hidden = forward(ids, *args)
        hidden[ids == 7] = float("nan")
        return hidden

    monkeypatch.setattr(engine._network, "forward", poisoned)
    events = run(engine, [[1, 2], [3, 7], [4]])
    assert "non-finite" in events["1"].error.message
    assert {events[key].finish_reason for key in "02"} == {FinishReason.LENGTH}


def test_steps_that_fail_again_and_again_end_the_engine(make, monkeypatch):
    engine = make(max_num_seqs=1)

    def broken(*args):
        raise RuntimeError("device error")

    monkeypatch.setattr(engine._network, "forward", broken)
    for place in range(5):
        engine.submit(str(place), [1, 2], EMBED)
    events = [event for _ in range(3) for event in engine.step()]
    assert {event.request_id for event in events} == set("01234"), "nobody is left without an end"
    with pytest.raises(EngineError, match="no longer answers"):
        engine.step()


@pytest.mark.parametrize(
    ("section", "param"),
    [
        ({"kind": "transformers"}, "engine.kind"),
        ({"tensor_parallel_size": 2}, "engine.tensor_parallel_size"),
        ({"fixed_rate_tokens_per_s": 5.0}, "engine.fixed_rate_tokens_per_s"),
    ],
)
def test_settings_of_other_engines_are_named(qwen3, section, param):
    with pytest.raises(ConfigError, match=r"model\.task: generate") as caught:
        create_engine(
            ModelSection(path=str(qwen3[0])), EngineSection.model_validate({**SECTION, **section})
        )
    assert caught.value.param == param


def test_warm_up_measures_a_budget(make):
    budget = make(warmup=True, max_num_batched_tokens=None).info.max_num_batched_tokens
    assert 16 <= budget <= 8192


async def test_vectors_cross_the_process_and_prove_its_health(qwen3):
    client = EngineClient(
        ModelSection(path=str(qwen3[0])),
        EngineSection.model_validate({**SECTION, "num_threads": 1}),
    )
    info = await client.start()
    assert (info.capabilities.embeddings, info.capabilities.generation) == (True, False)
    assert info.details["pooling"] == "last"
    stream = client.submit("a", [5, 6, 7], EMBED)
    (event,) = [event async for events in stream for event in events]
    expected = reference(qwen3[1], [5, 6, 7], "last")
    assert float(vector_of(event) @ expected) / np.linalg.norm(expected) > 0.9999
    assert await client.canary(10.0)
    await client.close()
