"""Speculative decoding by prompt lookup: the same ids as without it, and nothing left behind.

The network answers with a checksum of the whole context as it lies in the KV cache, over four ids:
text repeats by chance, drafts hold one time in a few, and a key that a failed draft left behind
would change every later id.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.bench.baseline_network import ChecksumNetwork, checksum_model
from serve_app.config.schema import EngineSection
from serve_app.core.events import FinishReason
from serve_app.core.sampling import SamplingParams
from serve_app.engine.native import NativeEngine

VOCAB = 4
DRAFTS = {"method": "prompt_lookup", "num_tokens": 6, "min_ngram": 1, "max_ngram": 4}


class RepeatingGraphs:
    """Stands for a device that captures: the function runs again into the same result."""

    is_capturing = True

    def capture(self, function):
        result = function()
        return lambda: result.copy_(function())


def make_engine(is_on: bool, graphs: object = None, depth: int = 0, **section) -> NativeEngine:
    values = {"kv_cache_tokens": 1024, "max_num_seqs": 6, "max_num_batched_tokens": 64, **section}
    model = checksum_model()
    model.network = ChecksumNetwork(vocab_size=VOCAB)
    drafts = DRAFTS if is_on else {}
    settings_ = EngineSection(device="cpu", warmup=False, speculative=drafts, **values)
    engine = NativeEngine(model, settings_, graphs=graphs)
    engine._depth = depth  # 1: as on an accelerator
    return engine


def sampling_of(rng: random.Random) -> SamplingParams:
    is_greedy = rng.random() < 0.4
    return SamplingParams(
        max_tokens=rng.randint(1, 40),
        min_tokens=rng.choice((0, 0, 6)),
        temperature=0.0 if is_greedy else rng.choice((0.3, 1.0)),
        top_p=rng.choice((1.0, 0.8)),
        top_k=rng.choice((0, 0, 2)),
        seed=rng.randrange(1 << 40),
        repetition_penalty=rng.choice((1.0, 1.0, 1.3)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.2)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        logit_bias=rng.choice(((), ((1, 1.5),))),
        stop_token_ids=rng.choice(((), (), (3,))),
        logprobs=rng.choice((None, None, 2)),
    )


def requests_of(rng: random.Random, count: int) -> dict[str, tuple[list[int], SamplingParams]]:
    return {
        f"r{i}": ([rng.randrange(VOCAB) for _ in range(rng.randint(1, 90))], sampling_of(rng))
        for i in range(count)
    }


def run(engine: NativeEngine, requests, rng: random.Random | None = None, num_aborted: int = 0):
    """Events by request; with `rng` requests arrive over time, and some are aborted on the way."""
    events = {name: [] for name in requests}
    waiting = list(requests.items())
    aborted = set(rng.sample(sorted(requests), num_aborted)) if rng else set()
    while waiting or engine.has_work():
        for _ in range(min(len(waiting), rng.choice((0, 0, 1, 3)) if rng else len(waiting))):
            name, (prompt, sampling) = waiting.pop()
            engine.submit(name, prompt, sampling)
        for event in engine.step():
            own = events[event.request_id]
            assert not own or own[-1].finish_reason is None, "an event after the terminal one"
            own.append(event)
            if event.request_id in aborted and len(ids_of(own)) >= 3:
                engine.abort(event.request_id)
                aborted.discard(event.request_id)
        engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    assert all(own[-1].finish_reason is not None for own in events.values())
    return events


def ids_of(events) -> list[int]:
    return [token_id for event in events for token_id in event.new_token_ids]


def facts_of(events):
    """What a client sees of a request, however many tokens came at once."""
    logprobs = [entry for event in events for entry in event.logprobs or ()]
    return ids_of(events), logprobs, events[-1].finish_reason, events[-1].stop_token_id


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    depth=st.sampled_from((0, 1)),
    has_graphs=st.booleans(),
    batch_invariant=st.booleans(),
    kv_cache_tokens=st.sampled_from((256, 320, 1024)),
    max_num_seqs=st.sampled_from((1, 4, 6)),
)
def test_drafts_change_no_answer(
    seed, depth, has_graphs, batch_invariant, kv_cache_tokens, max_num_seqs
):
    rng = random.Random(seed)
    requests = requests_of(rng, 10)
    plain = run(make_engine(False), requests)
    engine = make_engine(
        True,
        RepeatingGraphs() if has_graphs else None,
        depth,
        batch_invariant=batch_invariant,
        kv_cache_tokens=kv_cache_tokens,
        max_num_seqs=max_num_seqs,
    )
    drafted = run(engine, requests, rng, num_aborted=2)
    for name, events in plain.items():
        if drafted[name][-1].finish_reason is FinishReason.ABORTED:
            ids = ids_of(drafted[name])
            assert ids == ids_of(events)[: len(ids)], name
        else:
            assert facts_of(drafted[name]) == facts_of(events), name


@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_save_steps_under_preemption(depth):
    rng = random.Random(5)
    requests = requests_of(rng, 24)
    plain, engine = make_engine(False), make_engine(True, depth=depth, kv_cache_tokens=256)
    expected = run(plain, requests)
    found = run(engine, requests)
    assert {n: facts_of(e) for n, e in found.items()} == {
        n: facts_of(e) for n, e in expected.items()
    }
    stats = engine.stats()
    assert stats.num_preemptions_total > 0
    assert 0 < stats.num_accepted_tokens_total < stats.num_draft_tokens_total
    assert stats.num_drafts_total <= stats.num_draft_tokens_total
    assert stats.num_generation_tokens_total == sum(len(ids_of(e)) for e in found.values())
    assert plain.stats().num_drafts_total == 0


def test_a_text_that_repeats_takes_few_steps():
    prompt, sampling = [1, 2, 3], SamplingParams(
        max_tokens=60, temperature=0.0, logit_bias=((2, 100.0),)
    )  # fmt: skip
    steps = {}
    for is_on in (False, True):
        engine = make_engine(is_on)
        assert ids_of(run(engine, {"a": (prompt, sampling)})["a"]) == [2] * 60
        steps[is_on] = engine.stats().num_steps_total
    assert steps[False] == 60
    assert steps[True] < 20


def test_rows_of_drafts_stay_within_what_was_warmed_up():
    engine = make_engine(True, max_num_seqs=4)
    sampling = SamplingParams(max_tokens=40, temperature=0.0, logit_bias=((2, 100.0),))
    for i in range(4):
        engine.submit(f"r{i}", [2, 2, 2], sampling)
    engine.step()  # the prompts
    widest = 0
    while engine.has_work():
        before = engine.stats().num_scheduled_tokens_total
        engine.step()
        widest = max(widest, engine.stats().num_scheduled_tokens_total - before)
    assert widest == 7, "a row each and three more: as many as a lone sequence's draft would take"
    assert engine._runner._batch_buckets[-1] == 7


def test_drafts_can_be_switched_off_for_new_sequences():
    engine = make_engine(True)
    engine.speculate(False)
    sampling = SamplingParams(max_tokens=30, temperature=0.0, logit_bias=((2, 100.0),))
    run(engine, {"a": ([2, 2], sampling)})
    assert engine.stats().num_drafts_total == 0
    engine.speculate(True)
    run(engine, {"a": ([2, 2], sampling)})
    assert engine.stats().num_drafts_total > 0


def test_a_draft_that_ran_is_forgotten_with_its_aborted_sequence():
    engine = make_engine(True, depth=1)
    sampling = SamplingParams(max_tokens=60, temperature=0.0, logit_bias=((2, 100.0),))
    engine.submit("a", [2] * 40, sampling)
    while engine._sequences["a"].num_drafted == 0:
        engine.step()
    engine.abort("a")
    events = []
    while engine.has_work():
        events += engine.step()
        engine.check_integrity()
    assert [event.finish_reason for event in events] == [FinishReason.ABORTED]
    assert engine.stats().num_used_blocks == 0


def test_a_failing_row_of_a_draft_fails_only_when_it_is_the_next():
    engine = make_engine(True)
    network = engine._runner.network
    compute = network.compute_logits

    def poisoned(hidden):
        logits = compute(hidden)
        logits[1:] = float("nan")
        return logits

    network.compute_logits = poisoned
    sampling = SamplingParams(max_tokens=12, temperature=0.0, logit_bias=((2, 100.0),))
    events = run(engine, {"a": ([2, 2, 2], sampling)})["a"]
    assert ids_of(events) == [2] * 12
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert engine.stats().num_drafts_total > 0
