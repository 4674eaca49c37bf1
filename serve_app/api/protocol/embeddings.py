"""Embeddings: the request and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from serve_app.api.protocol.base import Harmless, RequestModel, ResponseModel, is_empty, never
from serve_app.api.protocol.completions import Prompt
from serve_app.api.protocol.sampling import MAX_NAME_CHARS

MAX_INPUTS = 2048
"""The specification's limit on the inputs of one request."""


class EmbeddingRequest(RequestModel):
    """Body of POST /v1/embeddings."""

    unsupported: ClassVar[Mapping[str, Harmless]] = {
        "truncate_prompt_tokens": never,
        "messages": is_empty,
    }

    input: Prompt = Field(description="A text, texts, a list of token ids, or lists of them.")
    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: the vector's float32 values, little-endian."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Values of each vector, where the model's may be shortened."
    )
    user: str | None = Field(None, max_length=MAX_NAME_CHARS)


class EmbeddingEntry(ResponseModel):
    """The vector of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(ResponseModel):
    """Answer of POST /v1/embeddings; `data` is in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage
