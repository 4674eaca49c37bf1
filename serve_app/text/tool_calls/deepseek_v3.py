"""DeepSeek V3 and R1: the arguments in a code block behind the function's name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from serve_app.text.tool_calls.syntax import ToolFunction, definitions, parse_object

SECTION_OPEN = "<｜tool▁calls▁begin｜>"
SECTION_CLOSE = "<｜tool▁calls▁end｜>"
CALL_OPEN = "<｜tool▁call▁begin｜>"
CALL_CLOSE = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"

_WHOLE = re.compile(
    rf"\s*(?:function\s*)?{SEPARATOR}\s*(?P<name>[^\s<>]+)\s*(?:```(?:json)?\s*)?(?P<arguments>.*?)"
    r"\s*(?:```)?\s*",
    re.DOTALL,
)
_INSTRUCTIONS = """\
## Tools
You have these tools:
{definitions}

To call them, write exactly this, one begin and end for each call:
{section_open}{call_open}function{separator}NAME
```json
{{"argument": "value"}}
```{call_close}{section_close}"""


class DeepSeekV3Syntax:
    """`…calls begin… …call begin…function…sep…NAME\\n```json\\n{…}\\n```…call end……calls end…`."""

    name = "deepseek_v3"
    call_open = CALL_OPEN
    call_close = CALL_CLOSE
    section_open = SECTION_OPEN
    section_close = SECTION_CLOSE
    head = re.compile(rf"\s*function{SEPARATOR}(?P<name>[^\s<>]+)\s*```json\s*(?=\{{)")
    tail = re.compile(r"\s*`{0,3}\s*")

    def parse_whole(self, body: str) -> tuple[str, str] | None:
        """Take a call whose code block is missing or named differently."""
        match = _WHOLE.fullmatch(body)
        if match is None:
            return None
        arguments = match["arguments"] or "{}"
        return (match["name"], arguments) if parse_object(arguments) is not None else None

    def call_texts(self, name: str) -> tuple[str, str]:
        """As the models' templates write it."""
        return f"function{SEPARATOR}{name}\n```json\n", "\n```"

    def instructions(self, functions: Sequence[ToolFunction]) -> str:
        """The first R1 and V3 templates write calls of the past, but no tools."""
        return _INSTRUCTIONS.format(
            definitions=definitions(functions),
            section_open=SECTION_OPEN,
            call_open=CALL_OPEN,
            separator=SEPARATOR,
            call_close=CALL_CLOSE,
            section_close=SECTION_CLOSE,
        )
