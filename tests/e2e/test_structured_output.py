"""Answers of a given form from the embedded model, through every process."""

from __future__ import annotations

import json

import openai
import pytest

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "is_capital": {"type": "boolean"},
    },
    "required": ["city", "population", "is_capital"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Describe Paris as JSON."}]


def test_a_schema_is_followed(client: openai.OpenAI, model: str) -> None:
    wish = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        response_format=wish,
        max_tokens=200,
        temperature=1.5,
        seed=3,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    city = json.loads(choice.message.content or "")
    assert set(city) == {"city", "population", "is_capital"}
    assert isinstance(city["population"], int)
    assert isinstance(city["is_capital"], bool)


def test_a_schema_that_cannot_be_followed_is_a_400(client: openai.OpenAI, model: str) -> None:
    wish = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, response_format=wish)
    assert caught.value.param == "response_format"


def test_tools_are_refused_where_the_template_writes_none(
    client: openai.OpenAI, model: str
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, tools=tools)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools")
