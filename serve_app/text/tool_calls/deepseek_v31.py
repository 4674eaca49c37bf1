"""DeepSeek V3.1: the function's name, a separator, the arguments."""

from __future__ import annotations

import re

from serve_app.text.tool_calls.deepseek_v3 import SEPARATOR, DeepSeekSyntax

_WHOLE = re.compile(rf"\s*(?P<name>[^\s<>]+)\s*{SEPARATOR}\s*(?P<arguments>.*?)\s*", re.DOTALL)
_INSTRUCTIONS = """\
## Tools
You have these tools:
{definitions}

To call them, write exactly this, one begin and end for each call; the arguments are JSON:
{section_open}{call_open}NAME{separator}{{"argument": "value"}}{call_close}{section_close}"""


class DeepSeekV31Syntax(DeepSeekSyntax):
    """`…calls begin… …call begin…NAME…sep…{…}…call end… …calls end…`."""

    name = "deepseek_v31"
    head = re.compile(rf"\s*(?P<name>[^\s<>]+)\s*{SEPARATOR}\s*(?=\{{)")
    tail = re.compile(r"\s*")
    whole = _WHOLE
    wording = _INSTRUCTIONS

    def call_texts(self, name: str) -> tuple[str, str]:
        """As the models' templates write it."""
        return f"{name}{SEPARATOR}", ""
