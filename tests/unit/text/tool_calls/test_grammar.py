"""Grammars of answers, and what keeps schemas within bounds."""

from __future__ import annotations

import pytest

from serve_app.core.errors import ClientError
from serve_app.text.tool_calls.grammar import MAX_SCHEMA_DEPTH, check_schema, output_grammar
from serve_app.text.tool_calls.registry import SYNTAXES
from serve_app.text.tool_calls.syntax import ToolFunction

FUNCTION = ToolFunction("f", "", {"type": "object"})


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"enum": ["x" * 70_000]}, "65536 characters"),
        (nested(MAX_SCHEMA_DEPTH), "levels deep"),
        ({"anyOf": [{"type": "string", "pattern": "a" * 1025}]}, "pattern"),
        ({"properties": {"a": {"$ref": "http://elsewhere/x.json"}}}, r"\$ref"),
        ({"items": {"x-guidance": {}}}, "x-guidance"),
    ],
)
def test_schemas_out_of_bounds_are_refused_by_name(schema, reason):
    with pytest.raises(ClientError, match=reason) as caught:
        check_schema(schema, "response_format")
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        {},
        nested(MAX_SCHEMA_DEPTH - 1),
        {"properties": {"pattern": {"type": "string"}, "$ref": {"$ref": "#/$defs/a"}}, "$defs": {}},
        {"enum": [{"$ref": "http://this-is-data", "x-guidance": 1}]},
    ],
)
def test_names_of_properties_and_data_are_no_keywords(schema):
    check_schema(schema, "response_format")


def test_control_tokens_stand_for_markers_and_plain_ones_are_text():
    syntax = SYNTAXES["deepseek_v3"]
    ids = {"<｜tool▁calls▁begin｜>": 7, "<｜tool▁sep｜>": 9}
    grammar = output_grammar(None, syntax, (FUNCTION,), ids.get)
    assert "calls: <[7]> call" in grammar
    assert '"function" <[9]> "f\\n```json\\n"' in grammar
    assert '"<｜tool▁call▁begin｜>"' in grammar


def test_an_answer_may_be_json_or_calls_where_both_are_offered():
    grammar = output_grammar({"type": "object"}, SYNTAXES["hermes"], (FUNCTION,), {}.get)
    assert grammar.startswith("start: (answer | calls)\n")
    one = output_grammar(None, SYNTAXES["hermes"], (FUNCTION,), {}.get, max_calls=1, has_break=True)
    assert one.startswith("start: BREAK? (calls)\nBREAK: ")
    assert "call){" not in one
