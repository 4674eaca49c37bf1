"""Config keys of `ingress` for streams that lose their replica."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from serve_app.config.section import OFF_IS_A_WORD

ContinueStreams = Annotated[Literal["off", "deterministic", "all"], OFF_IS_A_WORD]

CONTINUE_STREAMS: Any = Field(
    "deterministic",
    description="Which streams go on at another replica when theirs is lost after the first token:"
    " deterministic: greedy or seeded ones, with the same text; all: sampled ones too; off: none.",
)
CONTINUE_TIMEOUT_S: Any = Field(
    30.0, description="How long such a stream may wait for a replica before it ends in an error."
)
