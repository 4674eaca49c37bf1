"""Splits an answer into content and tool calls while it streams.

A call is told as soon as its head is complete; its arguments follow as they come, byte for byte as
the model wrote them. Markers never show. What is no call after all comes back as content.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from serve_app.text.reasoning import num_begun
from serve_app.text.tool_calls.syntax import ToolSyntax, markers

_OUTSIDE_STRINGS = frozenset(' \t\r\n{}[]:,-+.0123456789eEtrufalsn"')
"""Characters that JSON has outside of its strings."""


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of the `index`-th call: its id and name, or else a part of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class _State(StrEnum):
    CONTENT = "content"
    HEAD = "head"  # behind a call's opening marker
    ARGUMENTS = "arguments"
    TAIL = "tail"  # behind the arguments


def new_call_id() -> str:
    """Return an id for a call."""
    return f"call_{secrets.token_hex(12)}"


class ToolCallParser:
    """One answer's parser; the result does not depend on how the text was cut into pieces.

    max_calls: 1 where calls may not run in parallel; further ones come back as content.
    Whitespace in front of a marker and right behind one belongs to the syntax.
    """

    def __init__(
        self,
        syntax: ToolSyntax,
        max_calls: int | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._syntax = syntax
        self._markers = markers(syntax)
        self._max_calls = max_calls
        self._new_id = new_id
        self._state = _State.CONTENT
        self._held = ""
        self._is_after_marker = False
        self._scanner = _ObjectScanner()
        self._content: list[str] = []
        self._deltas: list[ToolDelta] = []
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[ToolDelta]]:
        """Take more text; return the new content and the new pieces of calls."""
        self._held += text
        while self._advance():
            pass
        return self._take()

    def finish(self) -> tuple[str, list[ToolDelta]]:
        """Return what was held back; nothing may be pushed afterwards."""
        held, self._held = self._held, ""
        if self._state is _State.HEAD:
            self._end_call(held)
        elif self._state is _State.CONTENT:
            self._add_content(held)
        return self._take()

    def _take(self) -> tuple[str, list[ToolDelta]]:
        content, deltas = "".join(self._content), self._deltas
        self._content, self._deltas = [], []
        return content, deltas

    def _advance(self) -> bool:
        """Go through what is held; True where the state changed and there may be more to do."""
        if self._state is _State.CONTENT:
            return self._read_content()
        if self._state is _State.HEAD:
            return self._read_head()
        if self._state is _State.ARGUMENTS:
            return self._read_arguments()
        return self._read_tail()

    def _read_content(self) -> bool:
        text = self._held
        found = [(at, marker) for marker in self._markers if (at := text.find(marker)) >= 0]
        if not found:
            shown = len(text) - max(num_begun(text, marker) for marker in self._markers)
            # Whitespace in front of a marker is not content: it waits for what follows.
            shown = len(text[:shown].rstrip())
            self._add_content(text[:shown])
            self._held = text[shown:]
            return False
        at, marker = min(found)
        self._add_content(text[:at].rstrip())
        self._held = text[at + len(marker) :]
        self._is_after_marker = True
        if marker == self._syntax.call_open:
            self._state = _State.HEAD
        return True

    def _add_content(self, text: str) -> None:
        if self._is_after_marker:
            text = text.lstrip()
            self._is_after_marker = not text
        if text:
            self._content.append(text)

    def _read_head(self) -> bool:
        match = None if self._is_full else self._syntax.head.match(self._held)
        if match is not None:
            self._start_call(match["name"])
            self._held = self._held[match.end() :]
            self._state, self._scanner = _State.ARGUMENTS, _ObjectScanner()
            return True
        end = self._held.find(self._syntax.call_close)
        if end < 0:
            return False
        body = self._held[:end]
        self._held = self._held[end + len(self._syntax.call_close) :]
        self._end_call(body)
        return True

    def _end_call(self, body: str) -> None:
        """A call that ended before its head was seen: an unusual one, or content."""
        call = None if self._is_full else self._syntax.parse_whole(body)
        if call is None:
            self._is_after_marker = True
            self._add_content(self._without_markers(body).rstrip())
        else:
            name, arguments = call
            self._start_call(name)
            self._deltas.append(ToolDelta(self.num_calls - 1, arguments=arguments))
        self._state, self._is_after_marker = _State.CONTENT, True

    @property
    def _is_full(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def _start_call(self, name: str) -> None:
        self._deltas.append(ToolDelta(self.num_calls, self._new_id(), name))
        self.num_calls += 1

    def _read_arguments(self) -> bool:
        length = self._scanner.scan(self._held)
        if length:
            self._deltas.append(ToolDelta(self.num_calls - 1, arguments=self._held[:length]))
            self._held = self._held[length:]
        if not self._scanner.is_done:
            return False
        self._state = _State.TAIL
        return True

    def _read_tail(self) -> bool:
        match = self._syntax.tail.match(self._held)
        assert match is not None, "a tail matches the empty text"
        if match.end() == len(self._held):
            return False
        self._held = self._held[match.end() :]
        self._state, self._is_after_marker = _State.CONTENT, True
        return True

    def _without_markers(self, text: str) -> str:
        shorter = text
        for marker in self._markers:
            shorter = shorter.replace(marker, "")
        return text if shorter == text else self._without_markers(shorter)


class _ObjectScanner:
    """Finds where a JSON object ends, character by character.

    A character that JSON cannot have where it stands ends it, too: what follows is no argument.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def scan(self, text: str) -> int:
        """Return how much of `text` belongs to the object."""
        for place, char in enumerate(text):
            if self._is_in_string:
                self._step_in_string(char)
            elif char not in _OUTSIDE_STRINGS:
                self.is_done = True
                return place
            else:
                self._step_outside(char)
                if self.is_done:
                    return place + 1
        return len(text)

    def _step_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_in_string = False

    def _step_outside(self, char: str) -> None:
        if char == '"':
            self._is_in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.is_done = self._depth == 0
