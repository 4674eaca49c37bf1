import gc
import random

import pytest
import torch

from serve_app.bench.decode import SHAPES
from serve_app.config.schema import EngineSection
from serve_app.core.events import FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.devices import release_cached_memory
from serve_app.engine.native import NativeEngine
from serve_app.models.loading.random_source import make_random_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=6)


def fail_on(engine, monkeypatch, times, *, is_prefill):
    """Let the runner run out of memory in its next `times` steps of that kind."""
    run, left = engine._runner.run, [times]

    def failing(batch):
        if left[0] and bool(batch.prefills) is is_prefill:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", failing)


def run_to_end(engine):
    ids, ends = {}, {}
    while engine.has_work():
        for event in engine.step():
            ids.setdefault(event.request_id, []).extend(event.new_token_ids)
            if event.finish_reason is not None:
                ends[event.request_id] = event.finish_reason
    return ids, ends


@pytest.fixture
def prompts(random_prompts):
    return random_prompts(4, seed=5)


def test_a_prompt_goes_on_after_memory_was_given_back(make_engine, monkeypatch, prompts, reference):
    engine = make_engine()
    fail_on(engine, monkeypatch, 1, is_prefill=True)
    engine.submit("a", prompts[0], PARAMS)
    ids, _ = run_to_end(engine)
    assert ids["a"] == reference.generate(prompts[0], 6)
    stats = engine.stats()
    assert (stats.num_cache_releases_total, stats.num_shed_total) == (1, 0)


@pytest.mark.parametrize("is_prefill", [True, False])
def test_the_youngest_is_shed_and_the_others_are_exact(
    make_engine, monkeypatch, prompts, reference, is_prefill
):
    engine = make_engine()
    for name, prompt in zip("abcd", prompts, strict=True):
        engine.submit(name, prompt, PARAMS)
    fail_on(engine, monkeypatch, 2 if is_prefill else 1, is_prefill=is_prefill)
    ids, ends = run_to_end(engine)
    shed = [name for name, reason in ends.items() if reason is FinishReason.ERROR]
    assert len(shed) == 1
    assert len(ends) == 4
    for name, prompt in zip("abcd", prompts, strict=True):
        if name not in shed:
            assert ids[name] == reference.generate(prompt, 6)
    stats = engine.stats()
    assert stats.num_shed_total == 1
    assert stats.num_cache_releases_total == int(is_prefill), "decode steps give nothing back"
    assert stats.num_used_blocks == 0
    engine.check_integrity()


def test_reads_are_counted(make_engine, prompts):
    engine = make_engine()
    engine.submit("a", prompts[0], PARAMS)
    run_to_end(engine)
    stats = engine.stats()
    assert stats.weight_bytes_read_total > 0
    contexts = [len(prompts[0]) + i for i in range(6)]
    per_token = engine.info.kv_cache_bytes // ((stats.num_blocks + 1) * engine.info.block_size)
    assert stats.kv_bytes_read_total == per_token * sum(contexts)
    assert stats.last_step_bytes > per_token * contexts[-1]
    assert stats.memory_bandwidth_bytes > 0
    assert stats.bandwidth_share == 0, "no limit is measured on a CPU"


PIECE_BYTES, NUM_PIECES = 4 << 20, 256


def fragment_memory(device):
    """Cut a gigabyte into pieces and leave every other one to the garbage collector.

    Garbage in cycles, as an exception's traceback makes it, keeps the allocator from joining what
    is free between the pieces, and the segment from being given back.
    """
    torch.empty(NUM_PIECES * PIECE_BYTES, dtype=torch.uint8, device=device)
    pieces = [torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) for _ in range(NUM_PIECES)]
    for piece in pieces[::2]:
        cycle = [piece]
        cycle.append(cycle)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_a_prompt_for_which_memory_is_too_fragmented_succeeds_after_one_release():
    device = torch.device("cuda", 0)
    model = make_random_model(SHAPES["smollm2-135m"], device=device)
    section = EngineSection(
        kv_cache_tokens=16384,
        max_num_seqs=2,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
    )
    engine = NativeEngine(model, section)
    prompt = [random.Random(0).randrange(1000) for _ in range(8000)]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    engine.submit("before", prompt, params)
    expected, _ = run_to_end(engine)
    release_cached_memory(device)
    limit = torch.cuda.memory_reserved(device) + NUM_PIECES * PIECE_BYTES + (32 << 20)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    gc.disable()
    try:
        fragment_memory(device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(48 << 20, dtype=torch.uint8, device=device)
        assert engine.stats().num_cache_releases_total == 0
        engine.submit("fragmented", prompt, params)
        ids, _ = run_to_end(engine)
    finally:
        gc.enable()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert ids["fragmented"] == expected["before"]
    stats = engine.stats()
    assert (stats.num_cache_releases_total, stats.num_shed_total) == (1, 0)
    engine.close()
