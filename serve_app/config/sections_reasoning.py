"""Config section for how long reasoning models may think."""

from __future__ import annotations

from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from serve_app.config.section import NonNegativeInt, Section

_EFFORTS = ("minimal", "low", "medium", "high", "xhigh")


class ReasoningSection(Section):
    """What `reasoning_effort` allows: tokens of thinking before `</think>` is forced.

    null is no limit; effort `none` closes thinking at once.
    """

    minimal: NonNegativeInt | None = Field(256, description="Thinking tokens at effort minimal.")
    low: NonNegativeInt | None = Field(1024, description="Thinking tokens at effort low.")
    medium: NonNegativeInt | None = Field(8192, description="Thinking tokens at effort medium.")
    high: NonNegativeInt | None = Field(None, description="Thinking tokens at effort high.")
    xhigh: NonNegativeInt | None = Field(None, description="Thinking tokens at effort xhigh.")
    max_thinking_tokens: NonNegativeInt | None = Field(
        None, description="Most thinking tokens of any request, whatever it asks for."
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        budgets = [(name, self.budget(name)) for name in _EFFORTS]
        for (less, smaller), (more, larger) in pairwise(budgets):
            if larger is not None and (smaller is None or smaller > larger):
                raise ValueError(f"{less} allows more thinking than {more}; lower it")
        return self

    def budget(self, effort: str) -> int | None:
        """Return the thinking tokens of an effort; None is no limit."""
        if effort == "none":
            return 0
        value: int | None = getattr(self, effort)
        return value
