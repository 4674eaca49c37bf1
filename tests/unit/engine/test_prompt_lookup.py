from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.prompt_lookup import Acceptance, LookupOptions, PromptLookup
from serve_app.engine.row_costs import RowCosts


def lookup(num_tokens: int = 8, min_ngram: int = 2, max_ngram: int = 4) -> PromptLookup:
    return PromptLookup(LookupOptions(num_tokens, min_ngram, max_ngram))


def draft(ids: list[int], limit: int = 8, **options: int) -> tuple[int, ...]:
    return lookup(**options).draft(ids, len(ids), limit)


def test_what_followed_the_last_tokens_before_is_the_draft():
    assert draft([5, 6, 7, 8, 9, 5, 6], limit=3) == (7, 8, 9)


def test_the_longest_match_wins_then_the_latest():
    assert draft([1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3], limit=1) == (40,)
    assert draft([2, 3, 40, 9, 2, 3, 50, 1, 2, 3], limit=1) == (50,)
    # beyond max_ngram the latest wins
    assert draft([1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3], limit=1, max_ngram=2) == (50,)


def test_a_draft_repeats_itself_past_the_end():
    assert draft([4, 9, 4, 9], limit=5) == (4, 9, 4, 9, 4)


@pytest.mark.parametrize(
    "ids", [[], [3], [3, 3], [1, 2, 3, 4], [7, 1, 2, 8, 2]], ids=["none", "one", "two", "new", "1"]
)
def test_without_a_match_of_min_ngram_there_is_none(ids):
    assert draft(ids) == ()


def test_only_known_tokens_count_and_new_ones_are_read_once():
    one = lookup()
    ids = [5, 6, 7, 5, 6, -1]
    assert one.draft(ids, 5, 2) == (7, 5)
    ids[5:] = [7, 5, -1]
    assert one.draft(ids, 7, 2) == (6, 7)


@given(
    st.lists(st.integers(0, 2), max_size=600),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 8),
)
def test_a_draft_is_what_a_plain_search_finds(ids, min_ngram, more, limit):
    max_ngram = min_ngram + more
    expected: list[int] = []
    for length in range(max_ngram, min_ngram - 1, -1):
        ends = [
            end
            for end in range(length, len(ids))
            if ids[end - length : end] == ids[len(ids) - length :]
        ]
        if ends:
            text = list(ids)
            for _ in range(limit):
                text.append(text[ends[-1] + len(text) - len(ids)])
            expected = text[len(ids) :]
            break
    found = draft(ids, limit, min_ngram=min_ngram, max_ngram=max_ngram)
    assert list(found) == expected


def test_drafts_that_hold_get_longer_and_those_that_fail_shorter():
    acceptance = Acceptance()
    lengths = [acceptance.longest(0.1)]
    for _ in range(4):
        acceptance.count_draft(4, 4)
        lengths.append(acceptance.longest(0.1))
    assert lengths == sorted(lengths)
    assert lengths[-1] > 10
    for _ in range(16):
        acceptance.count_draft(4, 0)
    assert acceptance.longest(0.1) == 1
    assert acceptance.longest(0.5) == 0


def test_failed_drafts_are_tried_again_after_a_while():
    acceptance = Acceptance()
    for _ in range(20):
        acceptance.count_draft(1, 0)
    assert acceptance.longest(0.3) == 0
    for _ in range(100):
        acceptance.count_token()
    assert acceptance.longest(0.3) >= 1


@given(st.floats(0.001, 2.0), st.lists(st.integers(0, 5), max_size=30))
def test_every_token_of_the_longest_draft_is_worth_its_row(break_even, accepted):
    acceptance = Acceptance()
    for number in accepted:
        acceptance.count_draft(5, number)
    length, each = acceptance.longest(break_even), acceptance.probability
    assert 0 < each < 1
    assert length == 0 or each**length >= break_even * (1 - 1e-9)
    assert each ** (length + 1) < break_even * (1 + 1e-9)


def test_waiting_is_worth_it_only_where_drafts_hold():
    one, ids = lookup(), [5, 6, 7, 5, 6]
    assert one.is_promising(ids, 5)
    assert not one.is_promising(ids, 4)
    for _ in range(3):
        one.learn((1,), (2,))
    assert not one.is_promising(ids, 5)


def test_row_costs_interpolate_and_never_fall():
    costs = RowCosts({1: 10.0, 2: 9.0, 4: 13.0, 8: 21.0})
    assert costs.step_s(1) == costs.step_s(2) == 9.0
    assert costs.step_s(3) == 11.0
    assert costs.step_s(8) == 21.0
    assert costs.step_s(10) == 25.0


def test_break_even_is_low_where_rows_are_free_and_one_where_they_are_not():
    assert RowCosts({1: 1.0, 8: 1.0}).break_even(1, 4) == pytest.approx(0.02)
    assert RowCosts({1: 1.0, 8: 8.0}).break_even(2, 4) == pytest.approx(1.0)
    # 2 more rows take 20 % of a step for one row longer
    assert RowCosts({1: 1.0, 2: 1.1, 3: 1.2}).break_even(1, 2) == pytest.approx(0.1)
    assert 0 < RowCosts({}).break_even(1, 4) < RowCosts({}).break_even(32, 4) < 1
