"""The base of all requests: how bodies are parsed, and how a fault in one is told."""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError

from serve_app.api.protocol.bounds import check_size
from serve_app.core.errors import ClientError, UnsupportedParameterError

_logger = logging.getLogger(__name__)

MAX_REPORTED_FAULTS = 3
MAX_UNKNOWN_KEYS = 256
_MAX_LOGGED_KEYS = 512
_logged_keys: set[tuple[str, str]] = set()

Harmless = Callable[[Any], bool]
"""Tells whether a value of an unsupported parameter asks for nothing, so that it may pass."""


def never(_value: Any) -> bool:
    """No value passes (null always does)."""
    return False


def is_empty(value: Any) -> bool:
    """Whether the value is an empty list, object or string, or false."""
    return not value


class RequestModel(BaseModel):
    """A JSON request. Unknown keys are kept aside: ignored, logged once, or refused by name.

    `unsupported` names parameters that would change the answer and that this server lacks;
    `ignored` names those that clients may send for other servers' bookkeeping.
    """

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=(), frozen=True
    )
    unsupported: ClassVar[Mapping[str, Harmless]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    def check_extras(self, path: str = "") -> None:
        """Refuse unsupported parameters by name and log unknown ones once per kind of object.

        `path` is where this object lies in the request, with a dot at its end.
        """
        extras = self.model_extra or {}
        if len(extras) > MAX_UNKNOWN_KEYS:
            raise ClientError(
                f"There are more than {MAX_UNKNOWN_KEYS} unknown parameters.",
                param=path.removesuffix(".") or None,
            )
        for key, value in extras.items():
            harmless = self.unsupported.get(key)
            if harmless is not None:
                if value is not None and not harmless(value):
                    param = path + key
                    raise UnsupportedParameterError(
                        f"{param} is not supported by this server", param=param
                    )
            elif key not in self.ignored:
                _log_unknown(type(self).__name__, key)
        for name in self.model_fields_set & type(self).model_fields.keys():
            value = getattr(self, name)
            if isinstance(value, RequestModel):
                value.check_extras(f"{path}{name}.")
            elif isinstance(value, tuple) and value and isinstance(value[0], RequestModel):
                for place, item in enumerate(value):
                    item.check_extras(f"{path}{name}.{place}.")


def text_or_list(of: str) -> Discriminator:
    """Return what tells a text, tagged (text), from a list `of` something, tagged (list)."""

    def tag(value: Any) -> str | None:
        if isinstance(value, str):
            return "(text)"
        return "(list)" if isinstance(value, list | tuple) else None

    return Discriminator(
        tag,
        custom_error_type="text_or_list",
        custom_error_message=f"Input should be a string or a list of {of}",
    )


class ResponseModel(BaseModel):
    """A JSON answer: exactly the documented keys."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)


_M = TypeVar("_M", bound=RequestModel)


def parse_request(model: type[_M], body: bytes) -> _M:
    """Parse a JSON body. Raises ClientError naming the faulty parameter as a dotted path."""
    body = body.removeprefix(codecs.BOM_UTF8)  # some shells of Windows write one
    if not body.strip():
        raise ClientError("The request body is empty; send a JSON object.")
    check_size(body)
    try:
        parsed = model.model_validate_json(body)
    except ValidationError as error:
        raise client_error(error) from None
    parsed.check_extras()
    return parsed


def parse_query(model: type[_M], query: Mapping[str, str]) -> _M:
    """Parse query parameters: text stays text, everything else is written as in JSON."""
    values: dict[str, Any] = {}
    for key, value in query.items():
        values[key] = value
        if key not in _TEXT_KEYS:
            try:
                values[key] = json.loads(value)
            except (ValueError, RecursionError):
                values[key] = value
    return parse_request(model, json.dumps(values).encode())


_TEXT_KEYS = frozenset({"prompt", "model", "user", "cache_salt"})


def client_error(error: ValidationError) -> ClientError:
    """Return the first few faults as one ClientError; never with the values that were sent."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    # A list whose items are all at fault also counts as too short; that would only confuse.
    faults = [fault for fault in faults if fault["type"] != "too_short"] or faults
    parts: list[str] = []
    for fault in faults[:MAX_REPORTED_FAULTS]:
        path = dotted_path(fault["loc"])
        message = fault["msg"].removeprefix("Value error, ").replace("Tuple ", "List ")
        parts.append(f"{path}: {message}" if path else message)
    if len(faults) > MAX_REPORTED_FAULTS:
        parts.append(f"and {len(faults) - MAX_REPORTED_FAULTS} more")
    return ClientError("; ".join(parts), param=dotted_path(faults[0]["loc"]) or None)


def dotted_path(loc: tuple[int | str, ...]) -> str:
    """Return `messages.0.content` for pydantic's location; unions' tags, in brackets, drop out."""
    return ".".join(str(part) for part in loc if not (isinstance(part, str) and part[:1] == "("))[
        :200
    ]


def _log_unknown(kind: str, key: str) -> None:
    entry = (kind, key[:64])
    if entry in _logged_keys or len(_logged_keys) >= _MAX_LOGGED_KEYS:
        return
    _logged_keys.add(entry)
    _logger.warning("%s: unknown parameter %r is ignored (logged once)", kind, key[:64])
