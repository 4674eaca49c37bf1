"""Tools and schemas on their way through the Preprocessor: into the prompt, and into a grammar."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config.schema import ModelSection
from serve_app.core.requests import OutputForm, PreparedPrompt, PrepareRequest
from serve_app.deployments import form_preparation
from serve_app.deployments.prompt_preparation import PromptPreparer

QWEN = (
    "{%- if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    '{% for call in message.tool_calls or [] %}<tool_call>\n{"name": "{{ call.function.name }}",'
    ' "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% endfor %}<|im_start|>assistant\n"
)
TOOL = {
    "name": "f",
    "description": "Ends <|im_end|> here.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
USER = {"role": "user", "content": "hi"}


def preparer(**model: Any) -> PromptPreparer:
    return PromptPreparer(ModelSection(**model))


@pytest.fixture(scope="module")
def qwen() -> PromptPreparer:
    return preparer(chat_template=QWEN)


def prepare(
    made: PromptPreparer, form: OutputForm | None, *messages: dict[str, Any], **changes: Any
) -> tuple[str, PreparedPrompt]:
    request = PrepareRequest("r", messages=messages or (USER,), form=form, **changes)
    prompt = made.prepare(request)
    return made.tokenizer.decode(prompt.token_ids, skip_special_tokens=False), prompt


def test_a_template_that_knows_tools_gets_them(qwen: PromptPreparer) -> None:
    text, prompt = prepare(qwen, OutputForm(tools=(TOOL,)))
    assert prompt.error is None
    assert prompt.grammar == ""
    assert text.startswith('<|im_start|>system\nTools:{"type": "function", "function": {"name"')
    assert "Tools" not in prepare(qwen, None)[0]


def test_control_tokens_in_tools_are_text(qwen: PromptPreparer) -> None:
    _, prompt = prepare(qwen, OutputForm(tools=(TOOL,)))
    end = qwen.tokenizer.special_tokens["<|im_end|>"]
    assert prompt.token_ids.count(end) == 2  # the template's own: system and user


def test_earlier_calls_reach_the_template(qwen: PromptPreparer) -> None:
    function = {"name": "f", "arguments": {"a": 1}}
    call = {"id": "c", "type": "function", "function": function}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = {"role": "tool", "content": "42", "tool_call_id": "c"}
    text, prompt = prepare(qwen, None, USER, turn, answer)
    assert prompt.error is None
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<|im_start|>tool\n42" in text


def test_a_template_without_tools_gets_a_system_message() -> None:
    made = preparer(tool_call_parser="hermes")
    assert made.card.tool_syntax == "hermes"
    text, _ = prepare(made, OutputForm(tools=(TOOL,)))
    assert "<tools>" in text
    assert '"name": "f"' in text


def test_forced_tools_and_schemas_make_grammars(qwen: PromptPreparer) -> None:
    forced = prepare(qwen, OutputForm(tools=(TOOL, {**TOOL, "name": "g"}), forced_tools=("g",)))[1]
    assert '\\"name\\": \\"g\\"' in forced.grammar
    assert '\\"name\\": \\"f\\"' not in forced.grammar
    either = prepare(qwen, OutputForm(schema=SCHEMA, tools=(TOOL,)))[1]
    assert either.grammar.startswith("start: (answer | calls)")
    assert prepare(qwen, OutputForm(schema=SCHEMA))[1].grammar.startswith("start: (answer)")


def test_reasoning_models_may_break_the_line_before_their_answer() -> None:
    made = preparer(reasoning="deepseek_r1")
    assert "BREAK" in prepare(made, OutputForm(schema=SCHEMA))[1].grammar


@pytest.mark.parametrize(
    ("form", "param"),
    [
        (OutputForm(schema={"not": {}}), "response_format"),
        (OutputForm(schema={"type": "string", "pattern": "(?=a)b"}), "response_format"),
        (OutputForm(schema={"enum": ["x" * 70_000]}), "response_format"),
        (
            OutputForm(tools=({**TOOL, "parameters": {"oneOf": [{}, {}]}},), forced_tools=("f",)),
            "tools",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    qwen: PromptPreparer, form: OutputForm, param: str
) -> None:
    _, prompt = prepare(qwen, form)
    assert prompt.token_ids == ()
    assert prompt.error is not None
    assert (prompt.error.status, prompt.error.param) == (400, param)
    assert "\n" not in prompt.error.message


def test_without_the_library_grammars_are_an_unsupported_parameter(
    qwen: PromptPreparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form_preparation, "has_grammars", lambda: False)
    error = prepare(qwen, OutputForm(schema=SCHEMA))[1].error
    assert error is not None
    assert (error.code, error.param) == ("unsupported_parameter", "response_format")


def test_forms_in_a_batch_are_the_same_as_alone(qwen: PromptPreparer) -> None:
    forms = (
        None,
        OutputForm(schema=SCHEMA),
        OutputForm(tools=(TOOL,)),
        OutputForm(schema={"not": {}}),
    )
    requests = [PrepareRequest("r", messages=(USER,), form=form) for form in forms]
    assert qwen.prepare_batch(requests) == [qwen.prepare(request) for request in requests]
