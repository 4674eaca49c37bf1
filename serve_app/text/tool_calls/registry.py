"""The syntaxes by name, and which of them a model's chat template uses."""

from __future__ import annotations

from serve_app.text.tool_calls.deepseek_v3 import SECTION_OPEN, SEPARATOR, DeepSeekV3Syntax
from serve_app.text.tool_calls.deepseek_v31 import DeepSeekV31Syntax
from serve_app.text.tool_calls.hermes import HermesSyntax
from serve_app.text.tool_calls.syntax import ToolSyntax

SYNTAXES: dict[str, ToolSyntax] = {
    syntax.name: syntax for syntax in (HermesSyntax(), DeepSeekV3Syntax(), DeepSeekV31Syntax())
}


def resolve_tool_syntax(setting: str, chat_template: str | None) -> str | None:
    """Return the name of a model's syntax, None for no tools; `setting` as in the config."""
    if setting == "none":
        return None
    return detect_tool_syntax(chat_template) if setting == "auto" else SYNTAXES[setting].name


def detect_tool_syntax(chat_template: str | None) -> str | None:
    """Return the syntax whose markers the template writes, or None."""
    template = chat_template or ""
    if SECTION_OPEN in template and SEPARATOR in template:
        # V3 names the kind of tool in front of the separator, V3.1 the function itself.
        has_kind = f"function{SEPARATOR}" in template or "['type'] + '" + SEPARATOR in template
        return "deepseek_v3" if has_kind or "```json" in template else "deepseek_v31"
    if HermesSyntax.call_open in template:
        return "hermes"
    return None
