from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.text.stop_strings import StopStringMatcher

few_letters = st.text(alphabet="ab\n", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def run_matcher(
    stops: list[str], texts: list[str], include: bool = False
) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stops, include)
    shown = []
    for text in texts:
        piece, matched = matcher.push(text)
        shown.append(piece)
        if matched is not None:
            return "".join(shown), matched
    return "".join(shown) + matcher.finish(), None


@given(stops=stop_lists, text=few_letters, cuts=st.lists(st.integers(0, 24), max_size=6))
def test_result_does_not_depend_on_the_split_and_nothing_leaks(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(edges)]

    shown, matched = run_matcher(stops, parts)

    assert (shown, matched) == run_matcher(stops, [text]) == run_matcher(stops, list(text))
    assert not any(stop in shown for stop in stops)
    if matched is None:
        assert shown == text
    else:
        assert text.startswith(shown + matched)


@given(stops=stop_lists, text=few_letters)
def test_what_is_shown_early_is_never_the_beginning_of_the_match(
    stops: list[str], text: str
) -> None:
    matcher = StopStringMatcher(stops)
    shown = ""
    for char in text:
        piece, matched = matcher.push(char)
        shown += piece
        if matched is not None:
            break
    before = run_matcher(stops, [text])[0]

    assert before.startswith(shown)


@pytest.mark.parametrize(
    ("stops", "text", "include", "expected"),
    [
        (["END"], "the END of", False, ("the ", "END")),
        (["END"], "the END of", True, ("the END", "END")),
        (["abcd", "bc"], "xabcd", False, ("xa", "bc")),
        (["c", "abc"], "xabc", False, ("x", "abc")),
        ([""], "x", False, ("x", None)),
        (["\n\n"], "a\n", False, ("a\n", None)),
    ],
)
def test_table(
    stops: list[str], text: str, include: bool, expected: tuple[str, str | None]
) -> None:
    assert run_matcher(stops, list(text), include) == expected


def test_after_a_match_everything_is_dropped() -> None:
    matcher = StopStringMatcher(["x"])
    matcher.push("ax")

    assert matcher.push("more") == ("", "x")
    assert matcher.matched == "x"
    assert matcher.finish() == ""
