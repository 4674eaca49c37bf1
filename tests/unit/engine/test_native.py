from __future__ import annotations

import random

import pytest

from serve_app.core.errors import ClientError, ContextLengthError
from serve_app.core.events import BatchingMode, BatchingOptions, FinishReason
from serve_app.core.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def test_greedy_output_is_the_references_for_random_arrivals(
    make_engine, reference, random_prompts
):
    prompts = random_prompts(60, seed=1)
    engine = make_engine(kv_cache_tokens=384, max_num_batched_tokens=48)
    rng = random.Random(2)
    arrivals = [(f"r{i}", prompt) for i, prompt in enumerate(prompts)]
    rng.shuffle(arrivals)
    aborted = {f"r{i}" for i in rng.sample(range(60), 8)}
    outputs: dict[str, list[int]] = {name: [] for name, _ in arrivals}
    finished = {}
    while arrivals or engine.has_work():
        for _ in range(min(len(arrivals), rng.choice((0, 0, 1, 4)))):
            name, prompt = arrivals.pop()
            engine.submit(name, prompt, GREEDY)
        for event in engine.step():
            assert event.request_id not in finished
            outputs[event.request_id] += event.new_token_ids
            if event.finish_reason is not None:
                finished[event.request_id] = event.finish_reason
            elif event.request_id in aborted and len(outputs[event.request_id]) == 5:
                engine.abort(event.request_id)
        engine.check_integrity()
    stats = engine.stats()
    assert len(finished) == 60
    assert {name for name, why in finished.items() if why == "aborted"} == aborted
    assert stats.num_preemptions_total > 0
    assert stats.num_chunked_prefills_total > 0
    assert stats.num_prefix_hit_tokens_total > 0
    assert stats.num_joins_total > 0
    assert stats.num_aborted_total == 8
    assert stats.num_used_blocks == 0
    for i, prompt in enumerate(prompts):
        expected = reference.generate(prompt, 24)
        got = outputs[f"r{i}"]
        assert got == expected[: len(got)], f"r{i}"
        assert len(got) == (5 if f"r{i}" in aborted else 24)
    assert len({i for ids in outputs.values() for i in ids}) >= 16


@pytest.mark.parametrize("is_greedy", [True, False])
def test_batch_invariant_gives_the_same_ids_alone_and_together(
    make_engine, run_all, random_prompts, is_greedy
):
    prompts = random_prompts(64, seed=3)
    settings = {"by_row": True, "batch_invariant": True, "max_num_seqs": 16}
    together = make_engine(kv_cache_tokens=512, max_num_batched_tokens=200, **settings)
    requests = {
        f"r{i}": (
            prompt,
            SamplingParams(
                max_tokens=20,
                temperature=0.0 if is_greedy else 1.2,
                top_p=1.0 if i % 3 else 0.9,
                top_k=0 if i % 2 else 40,
                seed=i,
                frequency_penalty=0.5 if i % 5 == 0 else 0.0,
            ),
        )
        for i, prompt in enumerate(prompts)
    }
    crowd = run_all(together, requests)
    stats = together.stats()
    assert stats.num_preemptions_total > 0
    assert stats.num_prefix_hit_tokens_total > 0
    alone = make_engine(kv_cache_tokens=2048, **settings)
    for name, request in requests.items():
        single = run_all(alone, {name: request})
        assert single.ids(name) == crowd.ids(name), name


def test_modes_bound_what_runs(make_engine, run_all, random_prompts):
    requests = {f"r{i}": (p, GREEDY) for i, p in enumerate(random_prompts(12, seed=5))}
    joins, peaks = {}, {}
    for mode in BatchingMode:
        engine = make_engine()
        engine.configure(BatchingOptions(mode))
        run_all(engine, requests)
        joins[mode] = engine.stats().num_joins_total
        peaks[mode] = engine.stats().max_num_running
    assert joins[BatchingMode.CONTINUOUS] > 0
    assert joins[BatchingMode.STATIC] == 0
    assert peaks[BatchingMode.OFF] == 1
    assert peaks[BatchingMode.STATIC] == 8


def test_mode_toggles_under_load_break_no_stream(make_engine, reference, random_prompts):
    engine = make_engine()
    prompts = random_prompts(16, seed=6)
    outputs: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.submit(f"r{i}", prompt, GREEDY)
    modes = [BatchingMode.OFF, BatchingMode.STATIC, BatchingMode.CONTINUOUS]
    for step in range(100_000):
        if not engine.has_work():
            break
        if step % 15 == 14:
            engine.configure(BatchingOptions(modes[step // 15 % 3]))
        for event in engine.step():
            outputs.setdefault(event.request_id, []).extend(event.new_token_ids)
        if engine.stats().mode == "off":
            assert engine.stats().max_num_running <= 1
    assert outputs == {f"r{i}": reference.generate(p, 24) for i, p in enumerate(prompts)}


def test_stop_id_is_reported_and_ends_the_sequence(make_engine, run_all, reference):
    prompt = [5, 6, 7]
    expected = reference.generate(prompt, 10)
    stop = expected[4]
    cut = expected.index(stop) + 1
    params = SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=(stop,))
    collected = run_all(make_engine(), {"a": (prompt, params)})
    assert collected.ids("a") == expected[:cut]
    assert collected.end("a").finish_reason is FinishReason.STOP
    assert collected.end("a").stop_token_id == stop


def test_min_tokens_bans_stop_ids(make_engine, run_all, reference):
    prompt = [5, 6, 7]
    stop = reference.generate(prompt, 1)[0]
    params = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=(stop,), min_tokens=5)
    ids = run_all(make_engine(), {"a": (prompt, params)}).ids("a")
    assert len(ids) >= 5
    assert stop not in ids[:5]


def test_length_ends_at_the_context(make_engine, run_all):
    engine = make_engine(kv_cache_tokens=64)
    assert engine.info.max_model_len == 64
    params = SamplingParams(temperature=0.0, max_tokens=1000)
    collected = run_all(engine, {"a": (list(range(3, 53)), params)})
    assert len(collected.ids("a")) == 14
    assert collected.end("a").finish_reason is FinishReason.LENGTH


def test_logprobs_are_the_raw_distributions(make_engine, run_all, reference):
    prompt = list(range(10, 90))
    params = SamplingParams(
        temperature=0.7, seed=1, max_tokens=6, logprobs=3, prompt_logprobs=2, top_k=5
    )
    collected = run_all(make_engine(), {"a": (prompt, params)})
    ids = collected.ids("a")
    expected = reference.logprobs(prompt + ids)
    first = collected.events["a"][0]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    for place, entry in enumerate(first.prompt_logprobs[1:], start=1):
        assert entry is not None
        assert entry.token_id == prompt[place]
        assert entry.logprob == pytest.approx(expected[place - 1, prompt[place]].item(), abs=1e-4)
        assert len(entry.top) == 2
    for i, event in enumerate(collected.events["a"]):
        assert event.logprobs is not None
        entry = event.logprobs[0]
        row = expected[len(prompt) + i - 1]
        assert entry.logprob == pytest.approx(row[ids[i]].item(), abs=1e-4)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()


def test_prompt_logprobs_without_generation(make_engine, run_all):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    collected = run_all(make_engine(), {"a": (list(range(3, 150)), params)})
    end = collected.end("a")
    assert collected.ids("a") == []
    assert end.finish_reason is FinishReason.LENGTH
    assert end.prompt_logprobs is not None
    assert len(end.prompt_logprobs) == 147


def test_prompt_logprobs_skip_the_prefix_cache(make_engine, run_all):
    engine = make_engine()
    prompt = list(range(3, 100))
    run_all(engine, {"a": (prompt, GREEDY)})
    again = run_all(engine, {"b": (prompt, GREEDY)})
    assert again.events["b"][0].num_cached_tokens == 96
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    scored = run_all(engine, {"c": (prompt, params)})
    assert scored.events["c"][0].num_cached_tokens == 0


def test_the_first_event_tells_how_long_it_waited(make_engine, run_all):
    engine = make_engine(max_num_seqs=1)
    found = run_all(engine, {name: ([3, 4, 5], GREEDY) for name in ("a", "b")})
    waits = {name: [event.queue_time_s for event in found.events[name]] for name in ("a", "b")}
    for first, *later in waits.values():
        assert first is not None
        assert set(later) == {None}
    assert waits["b"][0] > waits["a"][0] >= 0, "the second began when the first had ended"


def test_cache_salt_separates_tenants(make_engine, run_all):
    engine = make_engine()
    prompt = list(range(3, 100))
    hits = {}
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        params = SamplingParams(temperature=0.0, max_tokens=2, cache_salt=salt)
        hits[name] = run_all(engine, {name: (prompt, params)}).events[name][0].num_cached_tokens
    assert hits == {"a": 0, "b": 0, "c": 96}


def test_abort_frees_blocks_within_the_step_and_ends_once(make_engine):
    engine = make_engine()
    engine.submit("a", list(range(3, 60)), GREEDY)
    engine.step()
    assert engine.stats().num_used_blocks > 0
    engine.abort("a")
    engine.abort("a")
    engine.abort("unknown")
    assert engine.stats().num_used_blocks == 0
    assert [event.finish_reason for event in engine.step()] == [FinishReason.ABORTED]
    assert not engine.has_work()


def test_pause_keeps_sequences_in_place(make_engine, run_all, reference):
    engine = make_engine()
    engine.submit("a", [5, 6, 7], GREEDY)
    ids = [i for event in engine.step() for i in event.new_token_ids]
    engine.pause()
    assert not engine.has_work()
    assert engine.step() == []
    engine.resume()
    ids += run_all(engine, {}).ids("a")
    assert ids == reference.generate([5, 6, 7], 24)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], GREEDY, ClientError, "prompt"),
        ([VOCAB := 320], GREEDY, ClientError, "prompt"),
        ([-1], GREEDY, ClientError, "prompt"),
        ([3] * 512, GREEDY, ContextLengthError, "prompt"),
        ([3], SamplingParams(stop_token_ids=(VOCAB,)), ClientError, "stop_token_ids"),
        ([3], SamplingParams(logit_bias=((-2, 1.0),)), ClientError, "logit_bias"),
    ],
)
def test_what_can_never_be_served_is_refused(make_engine, prompt, params, error, param):
    engine = make_engine()
    with pytest.raises(error) as caught:
        engine.submit("a", prompt, params)
    assert caught.value.param == param
    assert not engine.has_work()


def test_non_finite_logits_end_only_their_sequence(make_engine, run_all, reference):
    engine = make_engine()
    network = engine._runner.network
    compute = network.compute_logits

    def poisoned(hidden):
        logits = compute(hidden)
        if len(logits) == 2:
            logits[0] = float("nan")
        return logits

    network.compute_logits = poisoned
    collected = run_all(engine, {"a": ([5, 6, 7], GREEDY), "b": ([8, 9], GREEDY)})
    assert collected.end("a").finish_reason is FinishReason.ERROR
    assert collected.end("a").error is not None
    assert collected.ids("b") == reference.generate([8, 9], 24)
    engine.check_integrity()
    assert engine.stats().num_used_blocks == 0


def test_a_failing_step_ends_its_sequences_and_the_engine_goes_on(make_engine, run_all, reference):
    engine = make_engine()
    network = engine._runner.network
    forward, broken = network.forward, [True]

    def failing(*args):
        if broken.pop() if broken else False:
            raise RuntimeError("out of memory")
        return forward(*args)

    network.forward = failing
    collected = run_all(engine, {"a": ([5, 6, 7], GREEDY)})
    assert collected.end("a").finish_reason is FinishReason.ERROR
    assert collected.end("a").error.is_retryable
    assert engine.stats().num_used_blocks == 0
    assert run_all(engine, {"b": ([8, 9], GREEDY)}).ids("b") == reference.generate([8, 9], 24)


class _RepeatingGraphs:
    """Stands for a device that captures: the function runs again into the same result."""

    is_capturing = True

    def capture(self, function):
        result = function()
        return lambda: result.copy_(function())


def test_captured_buckets_and_asynchronous_steps_change_nothing(
    make_engine, run_all, reference, random_prompts
):
    prompts = random_prompts(20, seed=8)
    engine = make_engine(graphs=_RepeatingGraphs(), kv_cache_tokens=384, warmup=True)
    engine._depth = 1
    stop = reference.generate(prompts[0], 6)[5]
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=(stop,))
    collected = run_all(engine, {f"r{i}": (p, params) for i, p in enumerate(prompts)})
    for i, prompt in enumerate(prompts):
        expected = reference.generate(prompt, 24)
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert collected.ids(f"r{i}") == expected
        collected.end(f"r{i}")
    assert engine.stats().num_preemptions_total > 0
    engine.check_integrity()
    assert engine.stats().num_used_blocks == 0


def test_warm_up_measures_a_budget(make_engine):
    engine = make_engine(max_num_batched_tokens=None, warmup=True)
    assert engine.info.max_num_batched_tokens >= 16
    assert engine.info.startup_s["warmup_s"] > 0
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_chunks_in_flight_end_nothing_early(make_engine, run_all, reference, random_prompts):
    prompt = random_prompts(1, seed=9)[0] * 3
    engine = make_engine(max_num_batched_tokens=16)
    engine._depth = 1  # as on an accelerator: the last chunk is queued before the first is read
    one = SamplingParams(temperature=0.0, max_tokens=1)
    scored = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)
    collected = run_all(engine, {"one": (prompt, one), "scored": (prompt, scored)})
    assert collected.ids("one") == reference.generate(prompt, 1)
    logprobs = collected.end("scored").prompt_logprobs
    assert logprobs is not None
    assert [entry.token_id for entry in logprobs[1:]] == prompt[1:]
