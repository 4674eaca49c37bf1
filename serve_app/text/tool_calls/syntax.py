"""What one syntax of tool calls is: its markers, the head of a call, how calls are written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ToolFunction:
    """A function that the model may call; `parameters` is a JSON Schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]

    def definition(self) -> dict[str, Any]:
        """The function as chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


class ToolSyntax(Protocol):
    """One model family's way of writing tool calls.

    name: as in `model.tool_call_parser`. call_open, call_close: around each call.
    section_open, section_close: around all of them, "" where there is nothing.
    head: matches a call's text up to the brace that opens its arguments; group `name`.
    tail: what may follow the arguments within a call; matches the empty text, too.
    """

    name: str
    call_open: str
    call_close: str
    section_open: str
    section_close: str
    head: re.Pattern[str]
    tail: re.Pattern[str]

    def parse_whole(self, body: str) -> tuple[str, str] | None:
        """Return name and arguments of a call whose head is unusual, or None: it is no call."""
        ...

    def call_texts(self, name: str) -> tuple[str, str]:
        """Return what a call has before and after its arguments, markers left out."""
        ...

    def instructions(self, functions: Sequence[ToolFunction]) -> str:
        """Return the system text that tells a model of its tools, for templates that do not."""
        ...


def markers(syntax: ToolSyntax) -> tuple[str, ...]:
    """The syntax's markers, without empty ones."""
    named = (syntax.section_open, syntax.call_open, syntax.call_close, syntax.section_close)
    return tuple(marker for marker in named if marker)


def parse_object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None where the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def definitions(functions: Sequence[ToolFunction]) -> str:
    """One JSON definition a line."""
    return "\n".join(json.dumps(f.definition(), ensure_ascii=False) for f in functions)
