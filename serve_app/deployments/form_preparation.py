"""The form that an answer shall have: tools for the chat template, grammars for the engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from serve_app.core.errors import ClientError, UnsupportedParameterError
from serve_app.core.requests import ModelCard, OutputForm, PrepareRequest
from serve_app.engine.constraint import GrammarCompiler, has_grammars
from serve_app.text.token_vocabulary import token_vocabulary
from serve_app.text.tokenizer import Tokenizer
from serve_app.text.tool_calls.grammar import check_schema, output_grammar
from serve_app.text.tool_calls.history import (
    adapt_messages,
    template_names_tools,
    with_instructions,
)
from serve_app.text.tool_calls.registry import SYNTAXES
from serve_app.text.tool_calls.syntax import ToolFunction, ToolSyntax


class FormPreparer:
    """What the Preprocessor does for `PrepareRequest.form`. Thread-safe.

    Grammars are compiled here once to refuse bad ones before an engine sees them; the vocabulary
    is indexed when the first one comes.
    """

    def __init__(self, tokenizer: Tokenizer, card: ModelCard) -> None:
        self._tokenizer = tokenizer
        self._card = card
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    def adapt(
        self, request: PrepareRequest
    ) -> tuple[tuple[Mapping[str, Any], ...], dict[str, Any]]:
        """Return messages and template variables, with the tools where the template wants them."""
        kwargs = request.template_kwargs
        template = kwargs.get("chat_template", self._tokenizer.chat_template)
        template = template if isinstance(template, str) else None
        messages = adapt_messages(request.messages or (), template)
        if request.form is None or not request.form.tools:
            return messages, kwargs
        functions = _functions(request.form)
        if template_names_tools(template):
            return messages, {**kwargs, "tools": [f.definition() for f in functions]}
        return with_instructions(messages, self._syntax(), functions), kwargs

    def grammar(self, form: OutputForm | None, starts_in_reasoning: bool) -> str:
        """Return the grammar that `form` asks for, "" for none. Raises ClientError on a bad one."""
        if form is None or not form.needs_grammar:
            return ""
        if not has_grammars():
            raise UnsupportedParameterError(
                f"{form.schema_param} needs llguidance, which is not installed here",
                param=form.schema_param,
            )
        if form.schema is not None:
            check_schema(form.schema, form.schema_param)
        functions = _functions(form)
        if form.forced_tools:
            functions = [f for f in functions if f.name in form.forced_tools]
        for function in functions:
            check_schema(function.parameters, "tools")
        grammar = output_grammar(
            form.schema,
            self._syntax() if functions else None,
            functions,
            self._tokenizer.special_tokens.get,
            max_calls=form.max_calls,
            has_break=starts_in_reasoning or self._card.is_reasoning,
        )
        param = form.schema_param if form.schema is not None else "tools"
        self._compiled().check(grammar, param)
        return grammar

    def _syntax(self) -> ToolSyntax:
        if self._card.tool_syntax is None:
            raise ClientError("this model's chat template has no tools", param="tools")
        return SYNTAXES[self._card.tool_syntax]

    def _compiled(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(token_vocabulary(self._tokenizer))
            return self._compiler


def _functions(form: OutputForm) -> list[ToolFunction]:
    return [
        ToolFunction(tool["name"], tool.get("description") or "", tool["parameters"])
        for tool in form.tools
    ]
