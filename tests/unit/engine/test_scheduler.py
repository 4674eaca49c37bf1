from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.errors import ConfigError
from serve_app.core.events import BatchingMode, BatchingOptions
from serve_app.core.sampling import SamplingParams
from serve_app.engine.block_manager import BlockManager
from serve_app.engine.prompt_lookup import LookupOptions, PromptLookup
from serve_app.engine.scheduled_batch import ScheduledBatch
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Sequence

BLOCK_SIZE = 4
NUM_BLOCKS = 16
MAX_TOKENS = 12


@dataclass
class Driver:
    """A device that needs no time: computes what is scheduled, `depth` steps behind."""

    scheduler: Scheduler
    depth: int = 0
    in_flight: list[ScheduledBatch] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    num_computed: dict[str, list[int]] = field(default_factory=dict)
    arrivals: int = 0

    def add(self, length: int, max_tokens: int = MAX_TOKENS, token_id: int | None = None) -> None:
        token_id = self.arrivals if token_id is None else token_id
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        name = f"r{self.arrivals}"
        self.scheduler.add(Sequence(name, [token_id] * length, params, self.arrivals))
        self.arrivals += 1

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        if batch:
            self.in_flight.append(batch)
        while len(self.in_flight) > (self.depth if batch else 0):
            self._read(self.in_flight.pop(0))
        manager = self.scheduler.block_manager
        manager.check_integrity(self.scheduler.running)
        return batch

    def _read(self, batch: ScheduledBatch) -> None:
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if sequence.is_finished:
                continue
            if chunk.samples:
                sequence.resolve(7)
            self.scheduler.register_computed(chunk)
            if chunk.samples and sequence.finish_reason_after(7):
                self.scheduler.finish(sequence)
                self.finished.append(sequence)


def make(budget: int = 16, max_num_seqs: int = 4, chunk: int | None = None) -> Scheduler:
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, alignment=chunk)
    return Scheduler(
        manager,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        prefill_chunk=chunk,
    )


requests = st.lists(
    st.tuples(st.integers(1, 50), st.integers(1, MAX_TOKENS), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(
    requests=requests,
    budget=st.integers(1, 40),
    mode=st.sampled_from(list(BatchingMode)),
    chunk=st.sampled_from([None, 8]),
    depth=st.integers(0, 1),
)
def test_everyone_finishes_within_the_budget(requests, budget, mode, chunk, depth):
    scheduler = make(budget, chunk=chunk)
    scheduler.configure(BatchingOptions(mode))
    driver = Driver(scheduler, depth)
    pending = list(requests)
    for _ in range(20_000):
        if pending:
            length, max_tokens, token_id = pending.pop()
            driver.add(length, max_tokens, token_id)
        elif not scheduler.has_work() and not driver.in_flight:
            break
        batch = driver.step()
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert all(chunk.length == 1 for chunk in batch.decodes)
        assert len(scheduler.running) <= scheduler.max_num_running
    assert len(driver.finished) == len(requests)
    for sequence in driver.finished:
        assert (
            sequence.num_known_tokens - sequence.num_prompt_tokens == sequence.sampling.max_tokens
        )
    manager = scheduler.block_manager
    assert manager.num_used_blocks == 0
    if mode is not BatchingMode.CONTINUOUS:
        assert scheduler.counters.num_joins_total == 0
    if mode is BatchingMode.OFF:
        assert scheduler.counters.max_num_running == 1


@settings(max_examples=40, deadline=None)
@given(
    requests=requests,
    modes=st.lists(st.sampled_from(list(BatchingMode)), min_size=1, max_size=8),
)
def test_toggling_loses_nobody(requests, modes):
    scheduler = make()
    driver = Driver(scheduler, depth=1)
    for length, max_tokens, token_id in requests:
        driver.add(length, max_tokens, token_id)
    for step in range(20_000):
        if not scheduler.has_work() and not driver.in_flight:
            break
        if step % 5 == 0:
            scheduler.configure(BatchingOptions(modes[step // 5 % len(modes)]))
        driver.step()
        assert len(scheduler.running) <= scheduler.max_num_running
    assert len(driver.finished) == len(requests)


def test_decodes_come_before_prefills():
    driver = Driver(make(budget=8))
    driver.add(4)
    driver.step()
    driver.add(30)
    batch = driver.step()
    assert [chunk.sequence.request_id for chunk in batch.decodes] == ["r0"]
    assert [chunk.length for chunk in batch.prefills] == [7]


def test_the_youngest_is_preempted_and_comes_back_first():
    driver = Driver(make(budget=64))
    driver.add(28, max_tokens=30)
    driver.add(28, max_tokens=30)
    while driver.scheduler.counters.num_preemptions_total == 0:
        driver.step()
    driver.add(1, max_tokens=1)
    assert [s.request_id for s in driver.scheduler.running] == ["r0"]
    assert [s.request_id for s in driver.scheduler.waiting] == ["r1", "r2"]


def test_a_lower_priority_number_runs_first():
    scheduler = make(max_num_seqs=1)
    for arrival, priority in enumerate((5, 0)):
        params = SamplingParams(priority=priority)
        scheduler.add(Sequence(f"p{priority}", [1], params, arrival))
    assert scheduler.schedule().admitted[0].request_id == "p0"


def test_static_admits_a_whole_batch_and_nobody_joins():
    scheduler = make(budget=4)
    scheduler.configure(BatchingOptions(BatchingMode.STATIC))
    driver = Driver(scheduler)
    for _ in range(5):
        driver.add(4, max_tokens=3)
    batch = driver.step()
    assert len(batch.admitted) == 4
    while len(driver.finished) < 4:
        assert len(scheduler.waiting) == 1
        driver.step()
    assert [s.request_id for s in driver.step().admitted] == ["r4"]


def test_invariant_chunks_end_at_multiples_and_are_scheduled_whole():
    driver = Driver(make(budget=12, chunk=8))
    driver.add(27, max_tokens=2)
    ends = []
    while not driver.finished:
        ends += [(chunk.start, chunk.end) for chunk in driver.step().prefills]
    assert ends == [(0, 8), (8, 16), (16, 24), (24, 27)]


def test_invariant_recomputes_generated_tokens_one_per_step():
    driver = Driver(make(budget=64, chunk=8))
    driver.add(28, max_tokens=30)
    driver.add(28, max_tokens=30)
    while driver.scheduler.counters.num_preemptions_total == 0:
        driver.step()
    (victim,) = driver.scheduler.waiting
    assert victim.num_output_tokens > 1
    driver.scheduler.finish(driver.scheduler.running[0])
    steps = [driver.step() for _ in range(victim.num_output_tokens + 1)]
    own = [[c for c in step.chunks if c.sequence is victim] for step in steps]
    assert all(c.end <= 28 for c in own[0])
    assert [len(chunks) for chunks in own[1:]] == [1] * len(own[1:])
    assert [c.samples for chunks in own[1:-1] for c in chunks] == [False] * (len(own) - 2)
    assert own[-1][0].samples


def test_limits_beyond_the_engines_are_refused():
    with pytest.raises(ConfigError, match="max_num_seqs"):
        make().configure(BatchingOptions(max_num_seqs=5))


@pytest.mark.parametrize(("num_blocks", "length"), [(2, 0), (3, 4)])
def test_a_draft_takes_what_is_left_and_gives_back_what_failed(num_blocks, length):
    manager = BlockManager(num_blocks, 4)
    scheduler = Scheduler(manager, max_num_seqs=2, max_num_batched_tokens=64, max_decode_rows=8)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    sequence = Sequence("a", [1, 2, 3, 1, 2, 3, 1], params, 0)
    sequence.lookup = PromptLookup(LookupOptions(num_tokens=6, min_ngram=1, max_ngram=3))
    scheduler.add(sequence)
    (prompt,) = scheduler.schedule().chunks
    assert prompt.draft == ()
    assert sequence.take([2], ()) == ((2,), None)
    scheduler.register_computed(prompt)
    batch = scheduler.schedule()
    (chunk,) = batch.decodes
    assert chunk.draft == (3, 1, 2, 3)[:length]
    assert (batch.num_tokens, batch.num_preempted) == (1 + length, 0)
    assert scheduler.schedule().chunks == [], "where it goes on hangs on what is accepted"
    # The first token of the draft holds, the second does not.
    taken, _ = sequence.take([3, 5, 9, 9, 9][: 1 + length], chunk.draft)
    assert taken == (3, 5)[: 1 + bool(length)]
    scheduler.register_computed(chunk, len(taken) - 1)
    assert sequence.num_computed_tokens == chunk.end + len(taken) - 1
    assert manager.num_used_blocks == -(-sequence.num_computed_tokens // 4)
    manager.check_integrity(scheduler.running)


def test_drafts_share_the_rows_and_the_budget():
    manager = BlockManager(64, 4)
    scheduler = Scheduler(manager, max_num_seqs=3, max_num_batched_tokens=8, max_decode_rows=12)
    for i in range(3):
        sequence = Sequence(f"r{i}", [i], SamplingParams(max_tokens=20, temperature=0.0), i)
        sequence.lookup = PromptLookup(LookupOptions(num_tokens=6, min_ngram=1, max_ngram=3))
        scheduler.add(sequence)
    for chunk in scheduler.schedule().chunks:
        chunk.sequence.take([chunk.sequence.token_ids[0]], ())
    lengths = [len(chunk.draft) for chunk in scheduler.schedule().decodes]
    assert lengths == [2, 2, 1], "eight rows: three tokens and five drafted ones"
