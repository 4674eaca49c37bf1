"""What a client may send as the id of its request."""

from __future__ import annotations

import re

REQUEST_ID_HEADER = b"x-request-id"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/@=+~-]{1,128}")


def is_request_id(value: bytes) -> bool:
    """Whether a header's value can stand in logs, traces and answers as it is."""
    return _REQUEST_ID.fullmatch(value) is not None
