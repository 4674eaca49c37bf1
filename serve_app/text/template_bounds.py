"""Bounds on what a chat template may make in one go: a single call can fill the memory.

A template comes with a model file. Its time is bounded where it calls, looks up or loops, but
`"x".ljust(10**10)` or thirty doublings of a text are over before anyone looks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.exceptions import TemplateError

MAX_TEXT_CHARS = 32 * 1024 * 1024
_MAX_PRODUCT = 1024 * 1024
_WIDE_FORMAT = re.compile(r"\d{5}|\*")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")
"""A field whose width is another's value: then any number may be a width."""
_WIDTH_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_WIDTH_FILTERS = ("batch", "center", "indent", "slice", "tojson")


class OutOfBounds(TemplateError):
    """Rendering took too long or grew too large."""


def check_binop(operator: str, left: Any, right: Any) -> None:
    """Raise OutOfBounds for powers, huge numbers, wide formats, long repetitions and sums."""
    if operator == "**" or any(isinstance(v, int) and abs(v) > 2**63 for v in (left, right)):
        raise OutOfBounds(f"the operator {operator} is limited in chat templates")
    if operator == "%" and isinstance(left, str):
        _check_format(left)
    if operator == "*" and _product_size(left, right) > _MAX_PRODUCT:
        raise OutOfBounds("a repetition in the chat template is too long")
    if operator == "+" and isinstance(left, Sequence) and isinstance(right, Sequence):
        _check_length(len(left) + len(right))


def check_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise OutOfBounds where a method of a text would make one that is too long."""
    method = getattr(function, "__wrapped__", function)  # as the sandbox hands out `format`
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(text, str):
        return
    if name in _WIDTH_METHODS or _NESTED_FIELD.search(text):
        _check_numbers((*args, *kwargs.values()))
    if name in ("format", "format_map"):
        _check_format(text)
    elif name == "replace":
        _check_replacement(text, *args[:2])
    elif name == "join" and args and isinstance(args[0], Sequence):
        _check_length(len(text) * len(args[0]))


def bounded_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return the filters, those that can make much of little within bounds."""
    bounded = {
        # What is filtered comes first, and may be any number.
        name: _bounded(filters[name], lambda args: _check_numbers(args[1:]))
        for name in _WIDTH_FILTERS
    }
    bounded["format"] = _bounded(filters["format"], lambda args: _check_format(str(args[0])))
    bounded["replace"] = _bounded(
        # The evaluation's context comes first.
        filters["replace"],
        lambda args: _check_replacement(str(args[1]), *args[2:4]),
    )
    return {**filters, **bounded}


def joined(parts: Iterable[Any]) -> str:
    """Join what `~`, a block or a macro makes. Raises OutOfBounds past MAX_TEXT_CHARS."""
    texts = [str(part) for part in parts]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


class BoundedCodeGenerator(CodeGenerator):
    """Compiles `~` to a call of the environment's `concat`, which a subclass can bound."""

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Write `environment.concat((a, b, …))`."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def _bounded(
    function: Callable[..., Any], check: Callable[[Sequence[Any]], None]
) -> Callable[..., Any]:
    @wraps(function)  # jinja2's marks of what it passes first are attributes
    def call(*args: Any, **kwargs: Any) -> Any:
        check((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return call


def _check_numbers(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_PRODUCT for value in values):
        raise OutOfBounds("a number in the chat template is too large")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise OutOfBounds("a format in the chat template is too wide")


def _check_replacement(text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    _check_length(len(text) + text.count(str(old)) * len(str(new)))


def _check_length(num_chars: int) -> None:
    if num_chars > MAX_TEXT_CHARS:
        raise OutOfBounds("a text in the chat template is too long")


def _product_size(left: Any, right: Any) -> int:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return len(sequence) * count
    return 0
