"""What a chat request says of its answer's form: tools, response_format, limits on thinking."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from serve_app.api.jobs import Job
from serve_app.api.protocol.chat import ChatCompletionRequest
from serve_app.api.protocol.tools import NamedToolChoice, Tool
from serve_app.config.sections_reasoning import ReasoningSection
from serve_app.core.errors import ClientError, UnsupportedParameterError
from serve_app.core.events import EngineCapabilities
from serve_app.core.requests import ModelCard, OutputForm, PreparedPrompt
from serve_app.core.sampling import Constraint
from serve_app.text.tool_calls.registry import SYNTAXES
from serve_app.text.tool_calls.stream import ToolCallParser
from serve_app.text.tool_calls.syntax import markers

_NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_NO_REASONING = "none"


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How an answer's tool calls are read: the model's syntax, and how many there may be."""

    syntax: str
    max_calls: int | None = None

    def new_parser(self) -> ToolCallParser:
        """Return the parser of one answer."""
        return ToolCallParser(SYNTAXES[self.syntax], self.max_calls)

    @property
    def markers(self) -> tuple[str, ...]:
        """What must stay in the text for the parser, special token or not."""
        return markers(SYNTAXES[self.syntax])


def output_form(
    body: ChatCompletionRequest, card: ModelCard, capabilities: EngineCapabilities
) -> OutputForm | None:
    """Return the form that the request asks for, None for plain text.

    Raises ClientError on what does not fit together, UnsupportedParameterError on what the model
    or its engine lacks.
    """
    tools = _offered_tools(body, card, capabilities)
    forced = _forced_tools(body, tools)
    schema = _response_schema(body)
    if not tools and schema is None:
        return None
    is_single = isinstance(body.tool_choice, NamedToolChoice) or body.parallel_tool_calls is False
    form = OutputForm(
        schema=None if forced else schema,
        schema_param="tool_choice" if forced else "response_format",
        tools=tuple(map(_tool_dict, tools)),
        forced_tools=forced,
        max_calls=1 if is_single and tools else None,
    )
    if form.needs_grammar:
        _check_grammar_goes_with(body, form.schema_param, capabilities)
    return form


def tool_plan(form: OutputForm | None, card: ModelCard) -> ToolPlan | None:
    """Return how the answer's calls are read; None where it has none."""
    if form is None or not form.tools or card.tool_syntax is None:
        return None
    return ToolPlan(card.tool_syntax, form.max_calls)


def thinking_budget(
    body: ChatCompletionRequest, section: ReasoningSection, capabilities: EngineCapabilities
) -> int | None:
    """Return the most tokens that the answer may think for; None is no limit.

    `thinking_budget` stands over `reasoning_effort`; the effort is a wish, which an engine that
    cannot end thinking may leave open. Raises UnsupportedParameterError for the budget.
    """
    if body.thinking_budget is not None and not capabilities.thinking_budget:
        raise UnsupportedParameterError(
            "thinking_budget is not supported by this model's engine", param="thinking_budget"
        )
    if not capabilities.thinking_budget:
        return None
    asked = body.thinking_budget
    if asked is None and body.reasoning_effort is not None:
        asked = section.budget(body.reasoning_effort)
    limits = [limit for limit in (asked, section.max_thinking_tokens) if limit is not None]
    return min(limits, default=None)


def effort_variables(effort: str | None) -> dict[str, Any]:
    """Return what chat templates call an effort: Qwen's and DeepSeek's switches, GPT-OSS' word."""
    if effort is None:
        return {}
    thinks = effort != "none"
    switches: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}
    return {**switches, "reasoning_effort": effort} if thinks else switches


def with_form(
    job: Job, prompt: PreparedPrompt, kind: str, budget: int | None, plan: ToolPlan | None
) -> Job:
    """Return the job with what its sequences must follow, and how their thinking is counted."""
    thinks = kind != _NO_REASONING
    limit = budget if thinks else None
    constraint = None
    if prompt.grammar or limit is not None:
        constraint = Constraint(
            grammar=prompt.grammar,
            is_thinking=thinks and prompt.starts_in_reasoning,
            may_think=thinks and not prompt.starts_in_reasoning,
            thinking_budget=limit,
        )
    requests = tuple(
        replace(
            request,
            sampling=replace(request.sampling, constraint=constraint),
            shown_special_tokens=() if plan is None else plan.markers,
            reasoning_kind=kind,
            starts_in_reasoning=prompt.starts_in_reasoning,
        )
        for request in job.requests
    )
    return replace(job, requests=requests)


def _offered_tools(
    body: ChatCompletionRequest, card: ModelCard, capabilities: EngineCapabilities
) -> tuple[Tool, ...]:
    tools = body.tools or ()
    if not tools:
        if body.tool_choice not in (None, "none"):
            raise ClientError("tool_choice only goes with tools", param="tool_choice")
        return ()
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ClientError("tools: each function needs a name of its own", param="tools")
    for place, tool in enumerate(tools):
        _check_parameters(tool, f"tools.{place}.function.parameters")
    if body.tool_choice == "none":
        return ()
    if not capabilities.tools:
        raise UnsupportedParameterError(
            "tools are not supported by this model's engine", param="tools"
        )
    if card.tool_syntax is None:
        raise UnsupportedParameterError(
            "tools are not supported by this model: its chat template writes none; the server's"
            " model.tool_call_parser can set a syntax",
            param="tools",
        )
    return tools


def _check_parameters(tool: Tool, param: str) -> None:
    parameters = tool.function.parameters
    if parameters and parameters.get("type", "object") != "object":
        raise ClientError(f"{param} should be the schema of an object", param=param)


def _forced_tools(body: ChatCompletionRequest, tools: tuple[Tool, ...]) -> tuple[str, ...]:
    names = tuple(tool.function.name for tool in tools)
    if isinstance(body.tool_choice, NamedToolChoice):
        name = body.tool_choice.function.name
        if name not in names:
            raise ClientError(
                "tool_choice names a function that is not among tools", param="tool_choice"
            )
        return (name,)
    return names if body.tool_choice == "required" else ()


def _response_schema(body: ChatCompletionRequest) -> dict[str, Any] | None:
    wish = body.response_format
    if wish is None or wish.type == "text":
        return None
    if wish.type == "json_object":
        return _ANY_OBJECT
    if wish.json_schema is None:
        param = "response_format.json_schema"
        raise ClientError(f"{param} is missing", param=param)
    return wish.json_schema.schema_


def _tool_dict(tool: Tool) -> dict[str, Any]:
    function = tool.function
    return {
        "name": function.name,
        "description": function.description or "",
        "parameters": {"type": "object", **function.parameters}
        if function.parameters
        else _NO_PARAMETERS,
    }


def _check_grammar_goes_with(
    body: ChatCompletionRequest, param: str, capabilities: EngineCapabilities
) -> None:
    if not capabilities.structured_output:
        raise UnsupportedParameterError(
            f"{param} is not supported by this model's engine", param=param
        )
    others = {
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "continue_final_message": body.continue_final_message,
    }
    for name, value in others.items():
        if value:
            raise ClientError(f"{name} does not go with {param}", param=name)
