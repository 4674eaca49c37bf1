"""Tool calls are found whatever pieces the text comes in; nothing is lost, no marker shows."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.text.tool_calls.registry import SYNTAXES
from serve_app.text.tool_calls.stream import ToolCallParser
from serve_app.text.tool_calls.syntax import markers

NAMES = sorted(SYNTAXES)


def write(name: str, *calls: tuple[str, str]) -> str:
    """The text of calls, as a model of that family writes it."""
    syntax = SYNTAXES[name]
    written = []
    for function, arguments in calls:
        before, after = syntax.call_texts(function)
        written.append(f"{syntax.call_open}{before}{arguments}{after}{syntax.call_close}")
    return syntax.section_open + "\n".join(written) + syntax.section_close


def parse(name: str, pieces: list[str], max_calls: int | None = None):
    """Content, and each call as (name, arguments)."""
    parser = ToolCallParser(SYNTAXES[name], max_calls)
    content, calls, ids = "", [], set()
    results = [parser.push(piece) for piece in pieces]
    for text, deltas in [*results, parser.finish()]:
        content += text
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                assert delta.arguments == ""
                assert delta.id
                ids.add(delta.id)
                calls.append((delta.name, ""))
            else:
                assert delta.index == len(calls) - 1
                assert delta.arguments
                calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    assert len(ids) == len(calls) == parser.num_calls
    return content, calls


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


@pytest.mark.parametrize("name", NAMES)
def test_calls_and_the_content_before_them(name):
    text = "Let me look.\n" + write(name, ("f", '{"a": "x}\\"{y"}'), ("g_2", '{"b": [{}, []]}'))
    content, calls = parse(name, [text])
    assert content == "Let me look."
    assert calls == [("f", '{"a": "x}\\"{y"}'), ("g_2", '{"b": [{}, []]}')]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_stream_as_they_come(name):
    text = write(name, ("f", '{"city": "Paris", "days": 3}'))
    parser = ToolCallParser(SYNTAXES[name])
    fragments = [d.arguments for char in text for d in parser.push(char)[1] if d.arguments]
    assert "".join(fragments) == '{"city": "Paris", "days": 3}'
    assert len(fragments) == len('{"city": "Paris", "days": 3}')


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", ["", "\n", "   "])
def test_an_answer_without_calls_is_content_as_it_is(name, tail):
    text = 'Is 1 < 2? Yes, <tool> {"a": 1} <｜not a marker｜>' + tail
    assert parse(name, list(text)) == (text, [])


UNUSUAL = [
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ("f", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', ("f", "{}")),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("f", '{"a": 1}'),
    ),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}', ("f", '{"a": 1}')),
    (
        "deepseek_v3",
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n{"a": 1}<｜tool▁call▁end｜>',
        ("f", '{"a": 1}'),
    ),
    (
        "deepseek_v31",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜><｜tool▁call▁end｜>",
        ("f", "{}"),
    ),
]


@pytest.mark.parametrize(("name", "text", "call"), UNUSUAL)
def test_unusual_calls_are_calls(name, text, call):
    assert parse(name, list(text)) == ("", [call])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("body", ["no call at all", '{"name": 3}', '{"nam', "[1, 2]", "{{{"])
def test_what_is_no_call_comes_back_as_content_without_markers(name, body):
    syntax = SYNTAXES[name]
    text = f"before {syntax.section_open}{syntax.call_open}{body}{syntax.call_close}"
    text += f"{syntax.section_close} after"
    content, calls = parse(name, list(text))
    assert calls == []
    assert content.split() == f"before{body}after".split()


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_was_cut_off_keeps_what_came(name):
    text = write(name, ("f", '{"city": "Par'))
    text = text[: text.index("Par") + 3]
    assert parse(name, list(text)) == ("", [("f", '{"city": "Par')])


@pytest.mark.parametrize("name", NAMES)
def test_broken_arguments_end_the_call_and_the_rest_is_content(name):
    syntax = SYNTAXES[name]
    before, _ = syntax.call_texts("f")
    text = f'{syntax.call_open}{before}{{"a": oops}}{syntax.call_close}'
    content, calls = parse(name, list(text))
    assert calls == [("f", '{"a": ')]
    assert content == "oops}"


@pytest.mark.parametrize("name", NAMES)
def test_one_call_where_they_may_not_run_in_parallel(name):
    text = write(name, ("f", "{}"), ("g", '{"b": 1}'))
    content, calls = parse(name, list(text), max_calls=1)
    assert calls == [("f", "{}")]
    assert '{"b": 1}' in content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
FUNCTION_NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)


@st.composite
def answers(draw):
    """A syntax, text that mixes calls, markers and junk, and places to cut it."""
    name = draw(st.sampled_from(NAMES))
    syntax = SYNTAXES[name]
    call = st.builds(lambda f, a: write(name, (f, json.dumps(a))), FUNCTION_NAMES, OBJECTS)
    junk = st.sampled_from(
        [*markers(syntax), *(m[:5] for m in markers(syntax)), " \n", "{", "}", '"', "```json\n"]
    )
    parts = draw(st.lists(call | junk | st.text(max_size=5), max_size=6))
    return name, "".join(parts), draw(st.lists(st.integers(0, 400), max_size=12))


@given(answers())
def test_the_pieces_never_change_the_result(answer):
    name, text, places = answer
    whole = parse(name, [text])
    assert parse(name, cut(text, places)) == whole
    assert parse(name, list(text)) == whole


@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(FUNCTION_NAMES, OBJECTS), min_size=1, max_size=3),
    st.text(st.characters(exclude_characters="<｜"), max_size=20),
    st.booleans(),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_calls_survive_exactly_and_no_marker_shows(name, calls, before, ascii_only, places):
    written = [(f, json.dumps(a, ensure_ascii=ascii_only)) for f, a in calls]
    text = before + write(name, *written)
    content, found = parse(name, cut(text, places))
    assert found == written
    assert content == before.rstrip()
    assert not any(marker in content for marker in markers(SYNTAXES[name]))
