import pytest
import torch

from serve_app.core.events import FinishReason
from serve_app.core.sampling import SamplingParams

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
