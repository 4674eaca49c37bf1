"""Earlier calls and tools reach each kind of chat template in the form that it reads."""

from __future__ import annotations

import pytest

from serve_app.text.tool_calls.history import (
    adapt_messages,
    template_names_tools,
    with_instructions,
)
from serve_app.text.tool_calls.registry import SYNTAXES, resolve_tool_syntax
from serve_app.text.tool_calls.syntax import ToolFunction

R1 = (
    "{% if message['content'] is none %}{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'"
    " + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n'"
    " + tool['function']['arguments'] + '\\n```'}}{% endif %}"
)
V31 = (
    "{% if tools %}x{% endif %}{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'"
    " + tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments']}}"
)
QWEN = (
    "{%- if tools %}<tools>{% endif %}{{ '<tool_call>' }}{{ tool_call.arguments | tojson }}"
    "{{ '</tool_call>' }}"
)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
TURN = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("template", "syntax", "names_tools"),
    [
        (R1, "deepseek_v3", False),
        (V31, "deepseek_v31", True),
        (QWEN, "hermes", True),
        ("{{ messages }}", None, False),
        (None, None, False),
    ],
)
def test_the_template_tells_the_syntax(template, syntax, names_tools):
    assert resolve_tool_syntax("auto", template) == syntax
    assert template_names_tools(template) is names_tools
    assert resolve_tool_syntax("none", template) is None
    assert resolve_tool_syntax("hermes", template) == "hermes"


def test_arguments_are_text_or_an_object_as_the_template_prints_them():
    (r1,) = adapt_messages([TURN], R1)
    assert r1["content"] is None
    assert r1["tool_calls"][0]["function"]["arguments"] == '{"a": "é"}'
    (qwen,) = adapt_messages([TURN], QWEN)
    assert qwen == TURN
    assert TURN["tool_calls"][0]["function"]["arguments"] == {"a": "é"}  # the caller's is untouched


@pytest.mark.parametrize("name", sorted(SYNTAXES))
def test_a_template_without_tools_gets_them_in_the_system_message(name):
    tools = (ToolFunction("look_up", "Finds things.", {"type": "object"}),)
    user = {"role": "user", "content": "hi"}
    made = with_instructions((user,), SYNTAXES[name], tools)
    assert [message["role"] for message in made] == ["system", "user"]
    assert '"name": "look_up"' in made[0]["content"]
    assert SYNTAXES[name].call_open in made[0]["content"]
    extended = with_instructions(
        ({"role": "system", "content": "Be brief."}, user), SYNTAXES[name], tools
    )
    assert len(extended) == 2
    assert extended[0]["content"].startswith("Be brief.\n\n")
