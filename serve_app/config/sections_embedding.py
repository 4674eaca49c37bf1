"""Config section for models that turn text into vectors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from serve_app.config.section import Section

ModelTask = Literal["auto", "generate", "embed"]

MAX_EMBEDDING_TOKENS: Any = Field(
    300_000, description="Most tokens of all inputs of one /v1/embeddings request."
)
"""`ingress.max_embedding_tokens`."""


class EmbeddingSection(Section):
    """How an embedding model's hidden states become one vector; by default as its files say."""

    pooling: Literal["auto", "last", "mean", "cls"] = Field(
        "auto",
        description="Hidden state of the last token, mean of all, or that of the first; auto: by"
        " 1_Pooling/config.json or the GGUF's pooling_type, else last.",
    )
    normalize: bool | None = Field(
        None, description="Scale vectors to length 1; default: by modules.json, else true."
    )
    allow_dimensions: bool | None = Field(
        None,
        description="Let clients shorten vectors with `dimensions`, as Matryoshka training allows;"
        " default: by is_matryoshka or matryoshka_dimensions in config.json.",
    )
