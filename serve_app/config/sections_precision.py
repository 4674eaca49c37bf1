"""Config of dynamic precision: which width of the model takes a request."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from serve_app.config.section import OFF_IS_A_WORD, PositiveInt, Section


class PrecisionSection(Section):
    """Move between pools that hold one model in different widths, widest first. Off by default.

    Each of `pools` is a width, such as one with `engine: {weight_format: int4}`. Under pressure (KV
    cache in use, or sequences over max_num_seqs) new requests go one pool narrower, and back later.
    """

    mode: Annotated[Literal["off", "auto"], OFF_IS_A_WORD] = Field(
        "off", description="off: pools are ranked, the next takes what the first has no room for."
    )
    low: float = Field(0.4, ge=0, description="Pressure at or below which it goes wider.")
    high: float = Field(0.9, gt=0, description="Pressure at or above which it goes narrower.")
    patience_s: float = Field(10.0, ge=0, description="How long either must last, seconds.")
    long_prompt_tokens: PositiveInt | None = Field(
        None, description="Prompts of this length or more go to the narrowest at once; none: never."
    )

    @property
    def is_on(self) -> bool:
        """Whether a pool is chosen by pressure."""
        return self.mode != "off"

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) should be below high ({self.high})")
        return self
