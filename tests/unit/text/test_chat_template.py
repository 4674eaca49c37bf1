from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from serve_app.core.errors import ClientError
from serve_app.text import template_environment
from serve_app.text.chat_template import render_chat
from serve_app.text.gguf_vocabulary import TokenType, parts_from_metadata
from serve_app.text.template_environment import BoundedTemplate
from serve_app.text.tokenizer import Tokenizer
from tests.unit.text.vocabularies import R1_SPECIALS, gguf_metadata, gguf_tokenizer

NAMES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "start|>", "<", "|>", ">"]
CHATML_TRIMMED = (
    "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content | trim }}"
    "<|im_end|>{{ '\n' }}{%- endfor %}"
)


@pytest.fixture(scope="module")
def r1() -> Tokenizer:
    return gguf_tokenizer("deepseek-r1-qwen")


def usual_rendering(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], template: str | None = None, **kwargs: Any
) -> str:
    rendered, _ = render_jinja_template(
        conversations=[messages],
        chat_template=template or tokenizer.chat_template,
        **tokenizer.named_tokens,
        **kwargs,
    )
    return str(rendered[0])


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


texts = st.text(st.characters(max_codepoint=0x2FFFF, categories=["L", "N", "P", "Z"]), max_size=20)
conversations = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": texts}
    ),
    min_size=1,
    max_size=4,
)


@given(messages=conversations, prompt=st.booleans())
def test_benign_text_has_the_ids_of_the_usual_way(
    embedded: Tokenizer, messages: list[dict[str, Any]], prompt: bool
) -> None:
    text = usual_rendering(embedded, messages, add_generation_prompt=prompt)
    expected = embedded.encode(text, add_special_tokens=False, parse_special=True)

    ids, _ = render_chat(embedded, messages, add_generation_prompt=prompt)

    assert ids == expected


@given(messages=conversations)
def test_a_template_that_transforms_contents_gives_the_same_ids(
    r1: Tokenizer, messages: list[dict[str, Any]]
) -> None:
    messages.append({"role": "assistant", "content": " <think>why</think> so\n"})
    text = usual_rendering(r1, messages, add_generation_prompt=True)

    ids, starts_in_reasoning = render_chat(r1, messages)

    assert ids == r1.encode(text, add_special_tokens=False, parse_special=True)
    assert starts_in_reasoning
    assert "why" not in r1.decode(ids)


@given(
    pieces=st.lists(st.one_of(st.sampled_from(NAMES), texts), max_size=6),
    role=st.sampled_from(["user", "assistant", "system"]),
)
def test_no_content_adds_a_special_token(embedded: Tokenizer, pieces: list[str], role: str) -> None:
    content = "".join(pieces)
    messages = [{"role": role, "content": content}, {"role": "user", "content": "hi"}]
    harmless = [{"role": role, "content": "x"}, {"role": "user", "content": "hi"}]

    ids, _ = render_chat(embedded, messages)
    expected, _ = render_chat(embedded, harmless)

    def specials(of: list[int]) -> list[int]:
        return [token_id for token_id in of if token_id in embedded.special_ids]

    assert specials(ids) == specials(expected)
    assert embedded.decode(ids, False) == usual_rendering(
        embedded, messages, add_generation_prompt=True
    )


def test_pieces_of_a_name_do_not_join_across_messages(embedded: Tokenizer) -> None:
    glue = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [*user("<|im_"), *user("start|>")]

    ids, _ = render_chat(embedded, messages, template_kwargs={"chat_template": glue})

    assert not embedded.special_ids & set(ids)
    assert embedded.decode(ids) == "<|im_start|>"


def test_overlapping_names_are_all_broken() -> None:
    tokenizer = gguf_tokenizer()
    first, second, *_ = R1_SPECIALS
    template = "{{ messages[0].content }}"

    ids, _ = render_chat(
        tokenizer, user(first[:-1] + second + first), template_kwargs={"chat_template": template}
    )

    assert not tokenizer.special_ids & set(ids)


def test_tools_and_other_arguments_cannot_inject_either(embedded: Tokenizer) -> None:
    template = "<|im_start|>{{ tools | tojson }}{{ tools | tojson(ensure_ascii=true) }}{{ note }}"
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    arguments = {"chat_template": template, "tools": tools, "note": "<|im_start|>"}

    ids, _ = render_chat(embedded, user("hi"), template_kwargs=arguments)

    assert [i for i in ids if i in embedded.special_ids] == [1]
    assert embedded.decode(ids).count("<|im_end|>") == 2


def test_private_use_characters_in_the_text_survive(embedded: Tokenizer) -> None:
    content = "\ue000<|im_end|>\ue001\\ue002"

    ids, _ = render_chat(embedded, user(content))

    assert content in embedded.decode(ids)


def test_text_parts_are_joined_by_newlines(embedded: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert render_chat(embedded, user(parts)) == render_chat(embedded, user("a\nb"))
    with pytest.raises(ClientError, match="type text") as caught:
        render_chat(embedded, user([{"type": "image_url", "image_url": {}}]))
    assert caught.value.param == "messages"


def test_continue_final_message_ends_with_it(embedded: Tokenizer) -> None:
    messages = [*user("count"), {"role": "assistant", "content": "one, two, "}]

    ids, _ = render_chat(embedded, messages, False, True)
    trimmed, _ = render_chat(
        embedded, messages, False, True, template_kwargs={"chat_template": CHATML_TRIMMED}
    )

    assert embedded.decode(ids, False).endswith("<|im_start|>assistant\none, two, ")
    assert embedded.decode(trimmed, False).endswith("<|im_start|>assistant\none, two,")


@pytest.mark.parametrize(
    ("messages", "starts"),
    [
        (user("hi"), True),
        ([*user("hi"), {"role": "assistant", "content": "<think>a</think>b"}], True),
    ],
)
def test_r1_prompt_starts_in_reasoning(
    r1: Tokenizer, messages: list[dict[str, Any]], starts: bool
) -> None:
    assert render_chat(r1, messages)[1] is starts
    assert render_chat(r1, messages, add_generation_prompt=False)[1] is False


def test_think_in_user_text_does_not_start_reasoning(embedded: Tokenizer, r1: Tokenizer) -> None:
    plain = {"chat_template": "{% for m in messages %}{{ m.content }}\n### Answer\n{% endfor %}"}
    closed = {"chat_template": "<｜Assistant｜><think>\n\n</think>\n"}

    assert render_chat(embedded, user("what is <think>"))[1] is False
    assert render_chat(embedded, user("what is <think>"), template_kwargs=plain)[1] is False
    assert render_chat(r1, user("hi"), template_kwargs=closed)[1] is False


def test_think_tags_as_control_tokens_work_in_answers_and_are_text_elsewhere() -> None:
    metadata = gguf_metadata("deepseek-r1-qwen")
    kinds = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = [*kinds[:-2], TokenType.CONTROL, TokenType.CONTROL]
    tokenizer = Tokenizer(parts_from_metadata(metadata, "small.gguf"))
    think = tokenizer.special_tokens["<think>"]
    answer = {"role": "assistant", "content": "<think>why</think>so"}

    ids, starts_in_reasoning = render_chat(tokenizer, [*user("a <think> b"), answer, *user("c")])

    assert "why" not in tokenizer.decode(ids)
    assert ids.count(think) == 1  # the template's own, at the end
    assert "a <think> b" in tokenizer.decode(ids)
    assert starts_in_reasoning


def test_continuing_inside_thinking_starts_in_reasoning(r1: Tokenizer) -> None:
    messages = [*user("hi"), {"role": "assistant", "content": "<think>well"}]

    assert render_chat(r1, messages, False, True)[1] is True


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 'x' * 1000000000 }}", "too long"),
        ("{{ 9 ** 999999999 }}", "limited"),
        ("{{ '%999999999d' % 1 }}", "too wide"),
        ("{{ '%999999999d'|format(1) }}", "too wide"),
        ("{{ '{:>999999999}'.format(1) }}", "too wide"),
        ("{{ '{:>{}}'.format(1, 999999999) }}", "too large"),
        ("{{ 'x'.ljust(999999999) }}", "too large"),
        ("{{ 'x'|center(width=999999999) }}", "too large"),
        ("{{ [1]|tojson(indent=999999999) }}", "too large"),
        ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "too long"),
        ("{{ ('a' * 99999)|replace('a', 'b' * 99999) }}", "too long"),
        ("{{ ('a' * 99999).join('b' * 99999) }}", "too long"),
        ("{% set x = 'x' * 99999 %}" + "{% set x = x ~ x %}" * 30, "too long"),
        ("{% set x = 'x' * 99999 %}" + "{% set x = x + x %}" * 30, "too long"),
        ("{% set x = 'x' * 99999 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 30, "too long"),
        ("{% if %}", "chat_template: line 1"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "cannot be compiled"),
        ("{{ " + "9" * 5000 + " }}", "cannot be compiled"),
    ],
)
def test_a_template_that_fails_is_the_clients_error(
    embedded: Tokenizer, template: str, message: str
) -> None:
    with pytest.raises(ClientError, match=message) as caught:
        render_chat(embedded, user("hi"), template_kwargs={"chat_template": template})

    assert caught.value.param in ("messages", "chat_template")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 5000000|tojson }}", "5000000"),
        ("{{ '{:,} of {}'.format(5000000, 9999999) }}", "5,000,000 of 9999999"),
        ("{{ 'a-b'.replace('-', '+') ~ 7000000 ~ none }}", "a+b7000000None"),
        ("{{ 'x'|center(5) }}|{{ 'x'.ljust(3) }}|{{ '%5d'|format(12) }}", "  x  |x  |   12"),
    ],
)
def test_numbers_and_texts_of_the_usual_size_pass(template: str, text: str) -> None:
    assert BoundedTemplate(template).render({}) == text


def test_rendering_has_an_end_in_time_and_size(
    embedded: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_environment, "MAX_RENDER_S", 0.05)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ClientError, match="too long"):
        render_chat(embedded, user("hi"), template_kwargs={"chat_template": loop})

    monkeypatch.setattr(template_environment, "MAX_RENDER_CHARS", 1000)
    flood = "{% for i in range(2000) %}{{ i }}{% endfor %}"
    with pytest.raises(ClientError, match="too long"):
        render_chat(embedded, user("hi"), template_kwargs={"chat_template": flood})


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"messages": []}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
        ({"template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"template_kwargs": {"chat_template": 3}}, "chat_template"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages"),
    ],
)
def test_bad_arguments_name_the_parameter(
    embedded: Tokenizer, kwargs: dict[str, Any], param: str
) -> None:
    with pytest.raises(ClientError) as caught:
        render_chat(embedded, **{"messages": user("hi"), **kwargs})

    assert caught.value.param == param


def test_hugging_face_dialect(embedded: Tokenizer) -> None:
    template = (
        "{%- for m in messages %}\n    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{%- endfor %}"
        "{{ {'a': 'é<'} | tojson }}{{ strftime_now('%Y') | length }}"
    )
    messages = [*user("a"), *user("b"), *user("c")]

    ids, _ = render_chat(embedded, messages, template_kwargs={"chat_template": template})

    assert embedded.decode(ids) == usual_rendering(embedded, messages, template)


def test_without_a_template_the_message_names_the_way_out() -> None:
    metadata = gguf_metadata()
    del metadata["tokenizer.chat_template"]
    tokenizer = Tokenizer(parts_from_metadata(metadata, "small.gguf"))

    with pytest.raises(ClientError, match="no chat template"):
        render_chat(tokenizer, user("hi"))
