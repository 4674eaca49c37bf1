"""Splits an answer into reasoning and content while it streams.

DeepSeek-R1's form, which Qwen3 and others share: `<think>…</think>` in front of the answer. The
template may have opened the tag in the prompt, so that only the closing one appears; an answer that
never closes it is reasoning to its end.
"""

from __future__ import annotations

from enum import StrEnum

from serve_app.text.chat_template import THINK_CLOSE, THINK_OPEN

_WHITESPACE = " \t\r\n"


class ReasoningKind(StrEnum):
    """How a model marks its reasoning."""

    NONE = "none"
    DEEPSEEK_R1 = "deepseek_r1"


def resolve_reasoning_kind(setting: str, chat_template: str | None) -> ReasoningKind:
    """Return what `model.reasoning` means for a model; `auto` looks for the tag in its template."""
    if setting != "auto":
        return ReasoningKind(setting)
    has_tag = THINK_CLOSE in (chat_template or "")
    return ReasoningKind.DEEPSEEK_R1 if has_tag else ReasoningKind.NONE


class _State(StrEnum):
    START = "start"  # nothing but whitespace so far; an opening tag may come
    REASONING = "reasoning"
    CONTENT = "content"


class ReasoningParser:
    """One answer's parser; the result does not depend on how the text was cut into pieces.

    kind: none makes everything content.
    starts_in_reasoning: True where the prompt ends inside an open <think>; False where it does not,
    then only an opening tag at the start of the answer begins reasoning; None where nobody knows:
    the answer counts as reasoning until `</think>`, as for a model that always thinks.
    Tags, and the newlines right behind them, belong to neither part.
    """

    def __init__(self, kind: ReasoningKind | str, starts_in_reasoning: bool | None = None) -> None:
        self._unopened = _State.CONTENT if starts_in_reasoning is False else _State.REASONING
        is_parsing = ReasoningKind(kind) is not ReasoningKind.NONE
        self._state = _State.START if is_parsing else _State.CONTENT
        self._held = ""
        self._is_after_tag = False

    @property
    def is_reasoning(self) -> bool:
        """Whether text that comes now would be reasoning."""
        return self._state is _State.REASONING

    @property
    def is_content(self) -> bool:
        """Whether reasoning is over: all further text is content."""
        return self._state is _State.CONTENT

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return the new reasoning and the new content."""
        if self._state is _State.START:
            text = self._begin(self._held + text)
        reasoning = ""
        if self._state is _State.REASONING:
            reasoning, text = self._reason(self._held + text)
        content = self._skip_newlines(text) if self._state is _State.CONTENT else ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """Return what was held back, as reasoning and content."""
        held, self._held = self._held, ""
        is_content = self._state is _State.CONTENT or (
            self._state is _State.START and self._unopened is _State.CONTENT
        )
        return ("", held) if is_content else (held, "")

    def _begin(self, text: str) -> str:
        """Leave START once it is clear whether the answer opens with the tag; return the rest."""
        stripped = text.lstrip(_WHITESPACE)
        if stripped.startswith(THINK_OPEN):
            self._enter(_State.REASONING)
            return stripped[len(THINK_OPEN) :]
        if THINK_OPEN.startswith(stripped):
            self._held = text
            return ""
        self._state, self._held = self._unopened, ""
        return text

    def _reason(self, text: str) -> tuple[str, str]:
        """Return the reasoning in `text` and, past the closing tag, what follows."""
        end = text.find(THINK_CLOSE)
        if end >= 0:
            reasoning = self._skip_newlines(text[:end])
            self._enter(_State.CONTENT)
            return reasoning, text[end + len(THINK_CLOSE) :]
        shown = len(text) - num_begun(text, THINK_CLOSE)
        self._held = text[shown:]
        return self._skip_newlines(text[:shown]), ""

    def _enter(self, state: _State) -> None:
        self._state, self._held, self._is_after_tag = state, "", True

    def _skip_newlines(self, text: str) -> str:
        if not self._is_after_tag:
            return text
        text = text.lstrip("\r\n")
        self._is_after_tag = not text
        return text


class ReasoningCounter:
    """Counts the tokens that an answer spends on reasoning, its tags included, as they come."""

    def __init__(self, kind: ReasoningKind | str, starts_in_reasoning: bool | None) -> None:
        self._parser = ReasoningParser(kind, starts_in_reasoning)
        self._num_undecided = 0
        self.num_tokens = 0

    def add(self, text: str) -> None:
        """Count a token that brought `text`, "" where its characters are not complete yet."""
        if self._parser.is_content:
            return
        was_reasoning = self._parser.is_reasoning
        self._parser.push(text)
        if was_reasoning or self._parser.is_reasoning:
            self.num_tokens += 1 + self._num_undecided
            self._num_undecided = 0
        elif self._parser.is_content:
            self._num_undecided = 0
        else:
            self._num_undecided += 1


def num_begun(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag` without completing it."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
