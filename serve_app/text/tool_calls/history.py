"""Fits tools and earlier calls to what a model's chat template does with them.

Templates differ: some print a call's arguments as JSON themselves (Qwen's), others want the JSON as
text, and tell a turn of calls by its content being none (DeepSeek's); and DeepSeek's first ones
write calls, but never the tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.text.tool_calls.syntax import ToolFunction, ToolSyntax

_NAMES_TOOLS = re.compile(r"\{[%{][^}]*\btools\b")
_PRINTS_JSON = re.compile(r"arguments['\"]?\]?\s*\|\s*tojson")
_TESTS_NONE = re.compile(r"\bis\s+none\b|==\s*none\b", re.IGNORECASE)


def adapt_messages(
    messages: Sequence[Mapping[str, Any]], template: str | None
) -> tuple[dict[str, Any], ...]:
    """Return the conversation with earlier calls as `template` reads them."""
    return tuple(
        _adapt_calls(message, template or "") if message.get("tool_calls") else dict(message)
        for message in messages
    )


def template_names_tools(template: str | None) -> bool:
    """Whether the template writes the tools that it is given."""
    return _NAMES_TOOLS.search(template or "") is not None


def with_instructions(
    messages: Sequence[Mapping[str, Any]], syntax: ToolSyntax, functions: Sequence[ToolFunction]
) -> tuple[dict[str, Any], ...]:
    """Return the conversation with the tools described in its system message."""
    text = syntax.instructions(functions)
    if messages and messages[0].get("role") == "system":
        first = dict(messages[0])
        first["content"] = f"{first.get('content') or ''}\n\n{text}".lstrip()
        return (first, *map(dict, messages[1:]))
    return ({"role": "system", "content": text}, *map(dict, messages))


def _adapt_calls(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    adapted = dict(message)
    if not adapted.get("content") and _TESTS_NONE.search(template):
        adapted["content"] = None
    if not _PRINTS_JSON.search(template):
        adapted["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
    return adapted


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return {**call, "function": function}
