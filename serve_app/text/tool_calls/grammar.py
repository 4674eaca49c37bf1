"""Grammars, in llguidance's Lark dialect, for tool calls that must come and for JSON answers.

Source of the dialect: llguidance's docs/syntax.md. Whitespace within JSON is bounded: a model at a
high temperature must not be able to fill its answer with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve_app.core.errors import ClientError
from serve_app.text.tool_calls.syntax import ToolFunction, ToolSyntax

MAX_SCHEMA_CHARS = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_PATTERN_CHARS = 1024
_MAX_CALLS = 16
_OPTIONS = {"whitespace_pattern": "[ \\n]{0,8}"}
_SCHEMA_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_DATA_KEYS = frozenset({"enum", "const", "default", "examples", "example"})

TokenOf = Callable[[str], int | None]
"""Gives the id of a control token by its name; None where the name is plain text."""


def output_grammar(
    schema: Mapping[str, Any] | None,
    syntax: ToolSyntax | None,
    functions: Sequence[ToolFunction],
    token_of: TokenOf,
    *,
    max_calls: int | None = None,
    has_break: bool = False,
) -> str:
    """Return the grammar of JSON that follows `schema`, or of calls of `functions`, or of either.

    max_calls: most calls. has_break: newlines may come first, as behind the end of thinking.
    """
    kinds = ["answer"] * (schema is not None) + ["calls"] * bool(functions)
    lines = [f"start: {'BREAK? ' if has_break else ''}({' | '.join(kinds)})"]
    if has_break:
        lines.append("BREAK: /\\n{1,2}/")
    if schema is not None:
        lines.append(f"answer: {_json(schema)}")
    if functions:
        assert syntax is not None, "functions are called in some syntax"
        lines += _calls(syntax, functions, token_of, max_calls or _MAX_CALLS)
    return "\n".join(lines) + "\n"


def _calls(
    syntax: ToolSyntax, functions: Sequence[ToolFunction], token_of: TokenOf, max_calls: int
) -> list[str]:
    more = f'("\\n" call){{0,{max_calls - 1}}}' if max_calls > 1 else ""
    section = (_marker(syntax.section_open, token_of), "call", more)
    lines = [_rule("calls", *section, _marker(syntax.section_close, token_of))]
    names = [f"call_{place}" for place in range(len(functions))]
    lines.append("call: " + " | ".join(names))
    for name, function in zip(names, functions, strict=True):
        before, after = syntax.call_texts(function.name)
        lines.append(
            _rule(
                name,
                _marker(syntax.call_open, token_of),
                _text(before, token_of),
                f"{name}_arguments",
                _text(after, token_of),
                _marker(syntax.call_close, token_of),
            )
        )
        lines.append(f"{name}_arguments: {_json(function.parameters)}")
    return lines


def _rule(name: str, *parts: str) -> str:
    return f"{name}: " + " ".join(part for part in parts if part)


def check_schema(schema: Mapping[str, Any], param: str) -> None:
    """Raise ClientError naming `param` where a schema is too large, too deep or odd."""
    size = len(json.dumps(schema, ensure_ascii=False))
    if size > MAX_SCHEMA_CHARS:
        raise ClientError(
            f"{param}: a schema may have {MAX_SCHEMA_CHARS} characters; this one has {size}",
            param=param,
        )
    _check_value(schema, param, depth=1, is_schema=True)


def _check_value(value: Any, param: str, depth: int, is_schema: bool) -> None:
    if not isinstance(value, dict | list):
        return
    if depth > MAX_SCHEMA_DEPTH:
        raise ClientError(f"{param}: a schema may nest {MAX_SCHEMA_DEPTH} levels deep", param=param)
    if isinstance(value, list):
        for inner in value:
            _check_value(inner, param, depth + 1, is_schema)
        return
    if is_schema:
        _check_keys(value, param)
    for key, inner in value.items():
        if is_schema and key in _DATA_KEYS:
            continue
        holds_names = is_schema and key in _SCHEMA_NAMES
        _check_value(inner, param, depth + 1, is_schema=not holds_names)


def _check_keys(schema: Mapping[str, Any], param: str) -> None:
    if "x-guidance" in schema:
        raise ClientError(f"{param}: x-guidance is the server's own", param=param)
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
        raise ClientError(
            f"{param}: a pattern may have {MAX_PATTERN_CHARS} characters", param=param
        )
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise ClientError(f"{param}: $ref may only point into the schema itself", param=param)


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS})


def _marker(marker: str, token_of: TokenOf) -> str:
    if not marker:
        return ""
    token_id = token_of(marker)
    return json.dumps(marker, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"


def _text(text: str, token_of: TokenOf) -> str:
    """Literal text, in which names of control tokens stand for these."""
    parts = re.split(r"(<｜[^<>]*｜>)", text)
    return " ".join(
        _marker(part, token_of) if part.startswith("<｜") else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )
