"""The config section of speculative decoding: drafts that one step of the model verifies."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from serve_app.config.section import OFF_IS_A_WORD, PositiveInt, Section

MAX_DRAFT_TOKENS = 64


class SpeculativeSection(Section):
    """Several tokens of a sequence in one step, where its own text foretells them.

    A draft is what followed the last n tokens when they last stood in the prompt or the answer. The
    model computes it beside the next token, and keeps what it would have chosen itself.
    """

    method: Annotated[Literal["off", "prompt_lookup"], OFF_IS_A_WORD] = Field(
        "off",
        description="prompt_lookup: copy drafts from the prompt and the answer, for answers that"
        " repeat their prompt (edits, extraction, code); native engine only.",
    )
    num_tokens: PositiveInt = Field(
        8, le=MAX_DRAFT_TOKENS, description="Most tokens of a draft; it shortens where they fail."
    )
    min_ngram: PositiveInt = Field(
        2, description="Fewest tokens at the end that must have occurred before."
    )
    max_ngram: PositiveInt = Field(
        5, description="Longest match that is looked for; a longer one foretells better."
    )

    @property
    def is_on(self) -> bool:
        """Whether drafts are made."""
        return self.method != "off"

    @model_validator(mode="after")
    def _check_ngrams(self) -> Self:
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"min_ngram ({self.min_ngram}) is more than max_ngram ({self.max_ngram})"
            )
        return self
