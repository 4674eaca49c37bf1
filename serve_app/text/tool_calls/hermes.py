"""Hermes, as Qwen and many others write it: a JSON object between <tool_call> tags."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from serve_app.text.tool_calls.syntax import ToolFunction, definitions, parse_object

_INSTRUCTIONS = """\
You may call one or more functions to assist with the user query. Their signatures:
<tools>
{definitions}
</tools>
For each function call, answer with a JSON object with the function's name and arguments:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


class HermesSyntax:
    """`<tool_call>\\n{"name": "f", "arguments": {…}}\\n</tool_call>`."""

    name = "hermes"
    call_open = "<tool_call>"
    call_close = "</tool_call>"
    section_open = ""
    section_close = ""
    head = re.compile(
        r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\<>]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
    )
    tail = re.compile(r"\s*\}?\s*")

    def parse_whole(self, body: str) -> tuple[str, str] | None:
        """Take the keys in any order; arguments may be an object or its JSON as a string."""
        call = parse_object(body)
        name = None if call is None else call.get("name")
        if call is None or not isinstance(name, str) or not name:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            return (name, arguments) if parse_object(arguments) is not None else None
        if not isinstance(arguments, dict):
            return None
        return name, json.dumps(arguments, ensure_ascii=False)

    def call_texts(self, name: str) -> tuple[str, str]:
        """As the models' templates write it."""
        return f'\n{{"name": {json.dumps(name)}, "arguments": ', "}\n"

    def instructions(self, functions: Sequence[ToolFunction]) -> str:
        """The wording that models of this family were trained on, in short."""
        return _INSTRUCTIONS.format(definitions=definitions(functions))
