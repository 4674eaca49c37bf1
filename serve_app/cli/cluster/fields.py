"""What the sections of the inventory share: the base class, types of fields, checks of names."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=0)]
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Section(BaseModel):
    """A section: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def checked_name(value: str) -> str:
    """Return a name of DNS labels, ValueError else."""
    if not _NAME.fullmatch(value):
        raise ValueError("expected small letters, digits and '-', at most 63 of them")
    return value


def checked_labels(value: dict[str, str]) -> dict[str, str]:
    """Return labels that Ray accepts, ValueError else."""
    for key, text in value.items():
        if not _LABEL.fullmatch(key) or not _LABEL.fullmatch(text):
            raise ValueError(
                f"label {key}={text}: letters, digits, '-', '_' and '.', at most 63 of them"
            )
    return value


def checked_variables(value: dict[str, str]) -> dict[str, str]:
    """Return variables whose names are such, ValueError else."""
    for name in value:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an environment variable")
    return value
