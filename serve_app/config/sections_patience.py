"""Fields of the ingress section: how long a client may take."""

from __future__ import annotations

from typing import Any

from pydantic import Field

RECEIVE_TIMEOUT_S: Any = Field(
    60.0, description="Longest time for a request's body to come; then 408."
)
SEND_TIMEOUT_S: Any = Field(
    60.0,
    description="Longest time that a piece of an answer waits for a client that does not read;"
    " then its sequence ends, as if it had left.",
)
