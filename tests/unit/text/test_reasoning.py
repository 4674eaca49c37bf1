from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.text.reasoning import (
    ReasoningCounter,
    ReasoningKind,
    ReasoningParser,
    resolve_reasoning_kind,
)

starts = st.sampled_from([True, False, None])
fragments = st.lists(
    st.sampled_from(["<think>", "</think>", "<th", "</", ">", "\n", " ", "a", "think"]), max_size=10
)


def parse(texts: list[str], start: bool | None, kind: str = "deepseek_r1") -> tuple[str, str]:
    parser = ReasoningParser(kind, start)
    deltas = [parser.push(text) for text in texts] + [parser.finish()]
    return "".join(r for r, _ in deltas), "".join(c for _, c in deltas)


@given(parts=fragments, start=starts)
def test_result_does_not_depend_on_the_split(parts: list[str], start: bool | None) -> None:
    text = "".join(parts)

    assert parse([text], start) == parse(list(text), start) == parse(parts, start)


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [
        ("<think>\nwhy</think>\n\nso", False, ("why", "so")),
        ("why</think>so", True, ("why", "so")),
        ("<think>why</think>so", True, ("why", "so")),
        ("why</think>so", None, ("why", "so")),
        ("why", True, ("why", "")),
        ("<think>why </thi", False, ("why </thi", "")),
        ("so it is", False, ("", "so it is")),
        ("so <think> is a tag", False, ("", "so <think> is a tag")),
        ("why</think>so</think>", True, ("why", "so</think>")),
        ("\n<think>why</think>", False, ("why", "")),
        ("<thi", False, ("", "<thi")),
        ("", True, ("", "")),
    ],
)
def test_table(text: str, start: bool | None, expected: tuple[str, str]) -> None:
    assert parse([text], start) == expected


def test_kind_none_is_all_content() -> None:
    assert parse(["<think>a</thi", "nk>b"], True, "none") == ("", "<think>a</think>b")


def test_is_reasoning_follows_the_stream() -> None:
    parser = ReasoningParser("deepseek_r1", True)

    parser.push("why")
    before = parser.is_reasoning
    parser.push("</think>")

    assert before
    assert not parser.is_reasoning


@pytest.mark.parametrize(
    ("setting", "template", "kind"),
    [
        ("auto", "{{ content.split('</think>')[-1] }}", ReasoningKind.DEEPSEEK_R1),
        ("auto", "{{ content }}", ReasoningKind.NONE),
        ("auto", None, ReasoningKind.NONE),
        ("none", "</think>", ReasoningKind.NONE),
        ("deepseek_r1", None, ReasoningKind.DEEPSEEK_R1),
    ],
)
def test_kind_of_a_model(setting: str, template: str | None, kind: ReasoningKind) -> None:
    assert resolve_reasoning_kind(setting, template) is kind


@pytest.mark.parametrize(
    ("texts", "start", "count"),
    [
        (["a", "b", "</think>", "c"], True, 3),  # the closing tag's token counts, the answer's not
        (["a", "</th", "ink>", "c", "d"], True, 3),
        (["\n", "<think>", "a", "</think>", "c"], False, 4),
        (["\n", "c"], False, 0),
        (["", "a", "b"], True, 3),
        (["a", "b"], False, 0),
    ],
)
def test_tokens_of_reasoning_are_counted_one_by_one(
    texts: list[str], start: bool, count: int
) -> None:
    counter = ReasoningCounter("deepseek_r1", start)
    for text in texts:
        counter.add(text)

    assert counter.num_tokens == count
