from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.core.sampling import SamplingParams
from serve_app.engine.block_manager import SCRATCH_BLOCK, BlockManager
from serve_app.engine.sequence import Sequence

BLOCK_SIZE = 4
NUM_BLOCKS = 12


def make_sequence(ids: list[int], salt: str | None = None) -> Sequence:
    return Sequence("r", ids, SamplingParams(cache_salt=salt), arrival=0)


class BlockLife(RuleBasedStateMachine):
    """Random admissions with shared prefixes, growth, registration and release."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.live: list[Sequence] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=24))
    def admit(self, ids: list[int]) -> None:
        sequence = make_sequence(ids)
        prefix = self.manager.match_prefix(sequence, len(ids) - 1)
        for i, block in enumerate(prefix):
            assert self.content[block] == tuple(ids[: (i + 1) * BLOCK_SIZE])
        if not self.manager.can_allocate(len(ids), prefix):
            return
        held = {block for other in self.live for block in other.block_table}
        self.manager.allocate(sequence, prefix)
        new = sequence.block_table[len(prefix) :]
        assert not held & set(new), "a block in use was handed out"
        assert SCRATCH_BLOCK not in sequence.block_table
        self.live.append(sequence)
        self._compute(sequence, len(prefix))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token_id=st.integers(0, 1))
    def grow(self, data: st.DataObject, token_id: int) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        if self.manager.can_grow(sequence, sequence.num_tokens + 1):
            first = sequence.num_tokens // BLOCK_SIZE
            sequence.token_ids.append(token_id)
            self.manager.grow(sequence, sequence.num_tokens)
            self._compute(sequence, first)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), register=st.booleans())
    def release(self, data: st.DataObject, register: bool) -> None:
        sequence = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        if register:
            self.manager.register(sequence, sequence.num_tokens)
        self.manager.release(sequence)

    @rule()
    def forget(self) -> None:
        self.manager.reset_prefix_cache()

    @invariant()
    def every_block_has_one_state(self) -> None:
        self.manager.check_integrity(self.live)

    def _compute(self, sequence: Sequence, first: int) -> None:
        for i in range(first, sequence.num_tokens // BLOCK_SIZE):
            self.content[sequence.block_table[i]] = tuple(
                sequence.token_ids[: (i + 1) * BLOCK_SIZE]
            )


TestBlockLife = BlockLife.TestCase
TestBlockLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def hold(manager: BlockManager, ids: list[int], salt: str | None = None) -> Sequence:
    sequence = make_sequence(ids, salt)
    manager.allocate(sequence, manager.match_prefix(sequence, len(ids) - 1))
    manager.register(sequence, len(ids))
    return sequence


def test_a_released_prefix_is_found_and_shared():
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    first = hold(manager, list(range(10)))
    blocks = list(first.block_table)
    manager.release(first)
    assert (manager.num_free_blocks, manager.num_cached_blocks) == (NUM_BLOCKS - 2, 2)
    second, third = hold(manager, list(range(12))), hold(manager, list(range(9)))
    assert second.block_table[:2] == third.block_table[:2] == blocks[:2]
    manager.check_integrity([second, third])


def test_the_last_token_is_never_a_hit():
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    manager.release(hold(manager, list(range(8))))
    same = make_sequence(list(range(8)))
    assert len(manager.match_prefix(same, 7)) == 1


def test_salts_separate():
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    manager.release(hold(manager, list(range(8)), salt="a"))
    assert manager.match_prefix(make_sequence(list(range(9)), salt="b"), 8) == []
    assert len(manager.match_prefix(make_sequence(list(range(9)), salt="a"), 8)) == 2


def test_the_least_recently_used_goes_first_and_leaves_before_its_parent():
    manager = BlockManager(4, BLOCK_SIZE)
    manager.release(hold(manager, [1] * 8))
    manager.release(hold(manager, [2] * 8))
    hold(manager, [3] * 4)
    assert len(manager.match_prefix(make_sequence([1] * 9), 8)) == 1
    assert len(manager.match_prefix(make_sequence([2] * 9), 8)) == 2


def test_alignment_cuts_hits():
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, alignment=8)
    manager.release(hold(manager, list(range(12))))
    assert len(manager.match_prefix(make_sequence(list(range(13))), 12)) == 2


def test_blocks_of_a_failed_draft_are_free_at_once():
    manager = BlockManager(8, 4)
    sequence = make_sequence([1] * 6)
    manager.allocate(sequence, [])
    manager.grow(sequence, 15)
    assert manager.num_used_blocks == 4
    manager.register(sequence, 6)
    manager.shrink(sequence, 9)
    assert len(sequence.block_table) == 3
    manager.shrink(sequence, 8)
    manager.shrink(sequence, 8)
    assert manager.num_used_blocks == 2
    manager.check_integrity([sequence])
    manager.release(sequence)
    assert (manager.num_used_blocks, manager.num_cached_blocks) == (0, 1)


def test_integrity_check_finds_a_leak():
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    hold(manager, [1] * 8)
    with pytest.raises(AssertionError):
        manager.check_integrity([])


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40))
def test_caching_off_keeps_nothing(ids):
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=False)
    manager.release(hold(manager, ids))
    assert manager.num_free_blocks == NUM_BLOCKS
