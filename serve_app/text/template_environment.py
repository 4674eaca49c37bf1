"""The sandbox in which a model's chat template runs: Hugging Face's dialect, within bounds.

The dialect (trim_blocks, lstrip_blocks, loop controls, `generation` blocks, `tojson`,
`raise_exception`, `strftime_now`) is the one of transformers' chat templates. A template comes with
a model file, so it is not trusted: no unsafe attributes, and an end to time, output and products.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve_app.core.errors import ClientError, ConfigError
from serve_app.text.template_bounds import (
    BoundedCodeGenerator,
    OutOfBounds,
    bounded_filters,
    check_binop,
    check_call,
    joined,
)

MAX_RENDER_S = 5.0
MAX_RENDER_CHARS = 32 * 1024 * 1024


class _RefusedByTemplate(TemplateError):
    """The template called raise_exception."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks the answer for training; here the block is its content."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 asks for

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Stops a rendering at its deadline whenever it calls, looks something up, or multiplies."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    code_generator_class = BoundedCodeGenerator
    concat = staticmethod(joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        self._rendering = threading.local()  # several threads may render at once
        self.filters = bounded_filters({**self.filters, "tojson": _tojson})
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        check_call(obj, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_time()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def start_clock(self) -> None:
        """Begin a rendering on this thread."""
        self._rendering.deadline_s = time.monotonic() + MAX_RENDER_S

    def check_time(self) -> None:
        """Raise once this thread's rendering has had its time."""
        if time.monotonic() > getattr(self._rendering, "deadline_s", float("inf")):
            raise OutOfBounds("rendering took too long")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise _RefusedByTemplate(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class BoundedTemplate:
    """A compiled chat template. ConfigError where its syntax is wrong or beyond the compiler."""

    def __init__(self, source: str) -> None:
        self._environment = _BoundedEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"model.chat_template: line {error.lineno}: {error.message}",
                param="model.chat_template",
            ) from None
        except Exception as error:  # too deep, or a number that Python does not read
            raise ConfigError(
                f"model.chat_template: it cannot be compiled ({type(error).__name__})",
                param="model.chat_template",
            ) from None

    def render(self, variables: dict[str, Any]) -> str:
        """Return the text. ClientError naming `messages` where the template refuses or fails."""
        self._environment.start_clock()
        try:
            return _gather(self._template.generate(variables), self._environment.check_time)
        except _RefusedByTemplate as error:
            raise _refusal(f"the chat template refuses these messages: {error}") from None
        except OutOfBounds as error:
            raise _refusal(f"the chat template failed: {error}") from None
        except Exception as error:  # whatever a template does wrong, the request cannot be rendered
            reason = f"{error.__class__.__name__}: {error}"[:200]
            raise _refusal(f"the chat template failed on these messages: {reason}") from None


def _gather(pieces: Any, check_time: Callable[[], None]) -> str:
    gathered: list[str] = []
    num_chars = 0
    for piece in pieces:
        check_time()
        num_chars += len(piece)
        if num_chars > MAX_RENDER_CHARS:
            raise OutOfBounds("the rendered prompt is too long")
        gathered.append(piece)
    return "".join(gathered)


def _refusal(message: str) -> ClientError:
    return ClientError(message, param="messages")
