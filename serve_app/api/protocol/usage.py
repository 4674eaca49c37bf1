"""Token counts of an answer."""

from __future__ import annotations

from serve_app.api.protocol.base import ResponseModel


class PromptTokensDetails(ResponseModel):
    """How many prompt tokens came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(ResponseModel):
    """How many generated tokens were spent on reasoning."""

    reasoning_tokens: int


class Usage(ResponseModel):
    """Token counts: prompts once each, generated tokens over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
