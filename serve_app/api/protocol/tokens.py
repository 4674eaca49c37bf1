"""Tokenize and detokenize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from serve_app.api.protocol.base import Harmless, RequestModel, ResponseModel, is_empty
from serve_app.api.protocol.bounds import Bounded
from serve_app.api.protocol.chat import ChatMessage
from serve_app.api.protocol.sampling import MAX_NAME_CHARS


class TokenizeRequest(RequestModel):
    """Body of POST /tokenize: either `prompt` or `messages`."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {
        "tools": is_empty,
        "mm_processor_kwargs": is_empty,
    }

    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
    prompt: str | None = None
    messages: Annotated[tuple[ChatMessage, ...], Bounded()] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(
        None, description="Default: true for prompt, false for messages."
    )
    parse_special: bool = Field(False, description="Read special tokens written in the prompt.")
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages should be given")
        return self


class TokenizeAnswer(ResponseModel):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Body of POST /detokenize."""

    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
    tokens: Annotated[tuple[int, ...], Bounded(None)]


class DetokenizeAnswer(ResponseModel):
    """Answer of POST /detokenize."""

    prompt: str


class TokenizerInfo(ResponseModel):
    """Answer of GET /tokenizer_info."""

    model: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    has_chat_template: bool
    is_reasoning: bool
