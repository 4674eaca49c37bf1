"""DeepSeek V3 and R1: the arguments in a code block behind the function's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

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


class DeepSeekSyntax:
    """What DeepSeek's syntaxes share: the marks, and how a call is read and described."""

    call_open = CALL_OPEN
    call_close = CALL_CLOSE
    section_open = SECTION_OPEN
    section_close = SECTION_CLOSE
    whole: ClassVar[re.Pattern[str]]
    """A call that `head` did not match: groups `name` and `arguments`."""
    wording: ClassVar[str]
    """How the model is told to write a call."""

    def parse_whole(self, body: str) -> tuple[str, str] | None:
        """Take a call that is written differently, or without arguments."""
        match = self.whole.fullmatch(body)
        if match is None:
            return None
        arguments = match["arguments"] or "{}"
        return (match["name"], arguments) if parse_object(arguments) is not None else None

    def instructions(self, functions: Sequence[ToolFunction]) -> str:
        """For templates that write calls of the past, but no tools."""
        return self.wording.format(
            definitions=definitions(functions),
            section_open=SECTION_OPEN,
            call_open=CALL_OPEN,
            separator=SEPARATOR,
            call_close=CALL_CLOSE,
            section_close=SECTION_CLOSE,
        )


class DeepSeekV3Syntax(DeepSeekSyntax):
    """`…calls begin… …call begin…function…sep…NAME\\n```json\\n{…}\\n```…call end……calls end…`."""

    name = "deepseek_v3"
    head = re.compile(rf"\s*function{SEPARATOR}(?P<name>[^\s<>]+)\s*```json\s*(?=\{{)")
    tail = re.compile(r"\s*`{0,3}\s*")
    whole = _WHOLE
    wording = _INSTRUCTIONS

    def call_texts(self, name: str) -> tuple[str, str]:
        """As the models' templates write it."""
        return f"function{SEPARATOR}{name}\n```json\n", "\n```"
