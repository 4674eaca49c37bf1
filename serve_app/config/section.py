"""What all config sections share: frozen, unknown keys refused; types of numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


def _off_for_false(value: Any) -> Any:
    return "off" if value is False else value


OFF_IS_A_WORD = BeforeValidator(_off_for_false)
"""For choices with the word off: YAML reads a bare `off` as false."""


class Section(BaseModel):
    """Base of every section."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
