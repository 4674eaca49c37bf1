"""Chat messages to token ids through the model's own chat template, safe against injection.

A template writes special tokens by name, and users can write the same names. So every string
from outside goes through the template with a breaker, a character that occurs nowhere else, inside
each such name (and at its ends where it could complete one across the border). In the rendered text
the names that are still whole are the template's own: they get the tokenizer's secret mark, the
breakers go, and the text is encoded in one call. For text without special names the ids are exactly
those of rendering and encoding the usual way, and template logic (strip, split) sees plain strings.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from serve_app.core.errors import ClientError, ConfigError
from serve_app.text.template_environment import BoundedTemplate
from serve_app.text.tokenizer import Tokenizer

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
_THINK_TAGS = frozenset({THINK_OPEN, THINK_CLOSE})
_PRIVATE_USE = (range(0xE000, 0xF8FF), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_RESERVED = frozenset({"messages", "add_generation_prompt", "continue_final_message"})
_MAX_CACHED_TEMPLATES = 16


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], bool]:
    """Return the prompt's token ids, and whether it ends inside an open <think>.

    Arguments and errors are those of `render_marked`.
    """
    text, is_reasoning = render_marked(
        tokenizer, messages, add_generation_prompt, continue_final_message, template_kwargs
    )
    return tokenizer.encode_marked(text), is_reasoning


def render_marked(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, bool]:
    """Return the prompt as text for `encode_marked`, and whether it ends inside an open <think>.

    Contents are strings or lists of text parts (joined by newlines). `chat_template` among
    `template_kwargs` replaces the model's template; whether a request may is the caller's matter.
    Raises ClientError naming the parameter where messages or arguments cannot be rendered.
    """
    arguments = dict(template_kwargs or {})
    template = _pick_template(tokenizer, arguments.pop("chat_template", None))
    _check_arguments(tokenizer, messages, add_generation_prompt, continue_final_message, arguments)
    conversation = [_flatten_content(message) for message in messages]
    shield = _Shield.for_texts(tokenizer, _strings([conversation, arguments]))
    shielded = [shield.protect_message(message) for message in conversation]
    ending = _Ending.append_to(shielded) if continue_final_message else None
    text = template.render(
        {
            **tokenizer.named_tokens,
            **shield.protect(arguments),
            "messages": shielded,
            "add_generation_prompt": add_generation_prompt,
        }
    )
    if ending is not None:
        text = ending.cut(text)
    return shield.mark_specials(text), shield.ends_in_thinking(text)


def _pick_template(tokenizer: Tokenizer, requested: Any) -> BoundedTemplate:
    if requested is None:
        if tokenizer.chat_template is None:
            raise ClientError(
                "this model has no chat template: use /v1/completions, or set model.chat_template",
                param="messages",
            )
        return _compiled(tokenizer.chat_template)
    if not isinstance(requested, str):
        raise ClientError("chat_template must be a string", param="chat_template")
    try:
        return _compiled(requested)
    except ConfigError as error:
        reason = error.message.removeprefix("model.chat_template: ")
        raise ClientError(f"chat_template: {reason}", param="chat_template") from None


@lru_cache(maxsize=_MAX_CACHED_TEMPLATES)
def _compiled(source: str) -> BoundedTemplate:
    return BoundedTemplate(source)


def _check_arguments(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    continue_final_message: bool,
    arguments: Mapping[str, Any],
) -> None:
    if not messages:
        raise ClientError("messages must not be empty", param="messages")
    if add_generation_prompt and continue_final_message:
        raise ClientError(
            "continue_final_message needs add_generation_prompt: false",
            param="continue_final_message",
        )
    taken = sorted((_RESERVED | tokenizer.named_tokens.keys()) & arguments.keys())
    if taken:
        raise ClientError(
            f"chat_template_kwargs may not set {', '.join(taken)}", param="chat_template_kwargs"
        )


def _flatten_content(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    texts = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
        text = part.get("text") if is_text else None
        if not isinstance(text, str):
            raise ClientError("content parts must be of type text", param="messages")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


@dataclass(frozen=True, slots=True)
class _Ending:
    """A mark behind the final message, to find where it ends in the rendered text."""

    mark: str

    @classmethod
    def append_to(cls, messages: list[dict[str, Any]]) -> _Ending:
        content = messages[-1].get("content")
        if not isinstance(content, str):
            raise ClientError(
                "continue_final_message needs a final message with text content",
                param="continue_final_message",
            )
        mark = secrets.token_hex(16)
        # The space shows whether the template trims contents.
        messages[-1] = {**messages[-1], "content": f"{content}{mark} "}
        return cls(mark)

    def cut(self, text: str) -> str:
        end = text.rfind(self.mark)
        if end < 0:
            raise ClientError(
                "continue_final_message: the chat template leaves the final message out",
                param="continue_final_message",
            )
        is_trimming = text[end + len(self.mark) :][:1] != " "
        return text[:end].rstrip() if is_trimming else text[:end]


class _Shield:
    """Breaks the names of special tokens in outside text, and tells the template's own apart."""

    def __init__(self, tokenizer: Tokenizer, breaker: str) -> None:
        self._breaker = breaker
        self._mark = tokenizer.special_mark
        self._names = _special_names(tuple(tokenizer.special_tokens))

    @classmethod
    def for_texts(cls, tokenizer: Tokenizer, texts: Iterable[str]) -> _Shield:
        everything = "\n".join(texts)
        for code in (code for block in _PRIVATE_USE for code in block):
            if chr(code) not in everything and _escape(code) not in everything:
                return cls(tokenizer, chr(code))
        raise ClientError("messages use every private-use character there is", param="messages")

    def protect_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Protect a message's values; its own keys are the API's, hence known.

        Templates look for think tags in earlier answers, so there these stay whole.
        """
        protected = {key: self.protect(value) for key, value in message.items()}
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str):
            protected["content"] = self._break(content, self._names.pattern_without_think)
        return protected

    def protect(self, value: Any) -> Any:
        """Protect every string in a JSON-like value."""
        if isinstance(value, str):
            return self._break(value, self._names.pattern)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(inner) for inner in value]
        return value

    def _break(self, text: str, pattern: re.Pattern[str] | None) -> str:
        if pattern is None or not text:
            return text
        breaker = self._breaker
        while pattern.search(text):  # again, since names can overlap
            text = pattern.sub(lambda match: match[0][0] + breaker + match[0][1:], text)
        if text.isidentifier():  # a role, a type, a function's name: templates compare these
            return text
        if self._names.could_begin_before(text):
            text = breaker + text
        return text + breaker if self._names.could_end_after(text) else text

    def mark_specials(self, text: str) -> str:
        """Put the tokenizer's mark in front of the names that are whole; take the breakers out."""
        if self._names.pattern is not None:
            text = self._names.pattern.sub(lambda match: self._mark + match[0], text)
        return self._without_breakers(text)

    def ends_in_thinking(self, text: str) -> bool:
        """Whether the text behind the template's last special token leaves a <think> open.

        Without a special token to bound it, only a <think> at the very end counts: the tag may be
        a word of the user's.
        """
        pattern = self._names.pattern_without_think
        starts = [match.end() for match in pattern.finditer(text)] if pattern else []
        if not starts:
            return text.rstrip().endswith(THINK_OPEN)
        tail = self._without_breakers(text[starts[-1] :])
        return tail.rfind(THINK_OPEN) > tail.rfind(THINK_CLOSE)

    def _without_breakers(self, text: str) -> str:
        # `tojson(ensure_ascii=true)` writes the breaker as an escape.
        return text.replace(self._breaker, "").replace(_escape(ord(self._breaker)), "")


def _escape(code: int) -> str:
    return json.dumps(chr(code))[1:-1]


@dataclass(frozen=True, slots=True)
class _SpecialNames:
    """Names of special tokens, of two characters or more (one cannot be broken), to match."""

    pattern: re.Pattern[str] | None
    pattern_without_think: re.Pattern[str] | None
    heads: frozenset[str]
    tails: frozenset[str]
    max_part: int

    def could_end_after(self, text: str) -> bool:
        """Whether the end of `text` is the beginning of a name."""
        longest = min(self.max_part, len(text))
        return any(text[-size:] in self.heads for size in range(1, longest + 1))

    def could_begin_before(self, text: str) -> bool:
        """Whether the beginning of `text` is the end of a name."""
        longest = min(self.max_part, len(text))
        return any(text[:size] in self.tails for size in range(1, longest + 1))


@lru_cache(maxsize=_MAX_CACHED_TEMPLATES)
def _special_names(all_names: tuple[str, ...]) -> _SpecialNames:
    names = sorted((name for name in all_names if len(name) > 1), key=len, reverse=True)
    return _SpecialNames(
        pattern=_any_of(names),
        pattern_without_think=_any_of([name for name in names if name not in _THINK_TAGS]),
        heads=frozenset(name[:cut] for name in names for cut in range(1, len(name))),
        tails=frozenset(name[cut:] for name in names for cut in range(1, len(name))),
        max_part=max(map(len, names), default=1) - 1,
    )


def _any_of(names: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, names))) if names else None
