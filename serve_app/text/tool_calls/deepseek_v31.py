"""DeepSeek V3.1: the function's name, a separator, the arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence

from serve_app.text.tool_calls.deepseek_v3 import (
    CALL_CLOSE,
    CALL_OPEN,
    SECTION_CLOSE,
    SECTION_OPEN,
    SEPARATOR,
)
from serve_app.text.tool_calls.syntax import ToolFunction, definitions, parse_object

_WHOLE = re.compile(rf"\s*(?P<name>[^\s<>]+)\s*{SEPARATOR}\s*(?P<arguments>.*?)\s*", re.DOTALL)
_INSTRUCTIONS = """\
## Tools
You have these tools:
{definitions}

To call them, write exactly this, one begin and end for each call; the arguments are JSON:
{section_open}{call_open}NAME{separator}{{"argument": "value"}}{call_close}{section_close}"""


class DeepSeekV31Syntax:
    """`…calls begin… …call begin…NAME…sep…{…}…call end… …calls end…`."""

    name = "deepseek_v31"
    call_open = CALL_OPEN
    call_close = CALL_CLOSE
    section_open = SECTION_OPEN
    section_close = SECTION_CLOSE
    head = re.compile(rf"\s*(?P<name>[^\s<>]+)\s*{SEPARATOR}\s*(?=\{{)")
    tail = re.compile(r"\s*")

    def parse_whole(self, body: str) -> tuple[str, str] | None:
        """Take a call without arguments."""
        match = _WHOLE.fullmatch(body)
        if match is None:
            return None
        arguments = match["arguments"] or "{}"
        return (match["name"], arguments) if parse_object(arguments) is not None else None

    def call_texts(self, name: str) -> tuple[str, str]:
        """As the models' templates write it."""
        return f"{name}{SEPARATOR}", ""

    def instructions(self, functions: Sequence[ToolFunction]) -> str:
        """The wording of the models' own templates, in short."""
        return _INSTRUCTIONS.format(
            definitions=definitions(functions),
            section_open=SECTION_OPEN,
            call_open=CALL_OPEN,
            separator=SEPARATOR,
            call_close=CALL_CLOSE,
            section_close=SECTION_CLOSE,
        )
