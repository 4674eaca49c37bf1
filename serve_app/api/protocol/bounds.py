"""Bounds on lists and objects that clients send, so that a bad one costs little to refuse.

Without them a body of 4 MiB can hold two million faults, and telling them takes seconds and
gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from pydantic import GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from serve_app.core.errors import ClientError

MAX_ITEMS = 4096
"""Most entries of a list of objects or texts: turns, content parts, input items, prompts."""
MAX_MARKS: Mapping[bytes, tuple[int, str]] = {
    b"{": (2**16, "objects"),
    b"[": (2**16, "lists"),
    b":": (2**17, "keys"),
    b",": (2**20, "values"),
}
"""How often JSON's marks may be in a body, outside of its strings, and what each stands for."""


@dataclass(frozen=True, slots=True)
class Bounded:
    """Annotation of `tuple[X, ...]` or `dict[K, V]`: at most `count` entries, None for any number.

    A tuple is refused at its first faulty entry, a dict with too many before it is looked into.
    """

    count: int | None = MAX_ITEMS

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Return the type's schema with the bounds in it."""
        schema: Any = handler(source)
        if schema["type"] == "tuple":
            schema["fail_fast"] = True
            if self.count is not None:
                schema["max_length"] = self.count
        elif schema["type"] == "dict" and self.count is not None:
            schema = core_schema.no_info_before_validator_function(_at_most(self.count), schema)
        return cast(core_schema.CoreSchema, schema)


def check_size(body: bytes) -> None:
    """Refuse JSON of more objects, lists, keys or values than any request needs, unparsed.

    Raises ClientError. Text may hold brackets and commas in any number.
    """
    if all(body.count(mark) <= most for mark, (most, _) in MAX_MARKS.items()):
        return
    # Without its escapes, every second piece between quotes is outside of strings.
    pieces = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    bare = b"".join(pieces[::2])
    for mark, (most, name) in MAX_MARKS.items():
        if bare.count(mark) > most:
            raise ClientError(f"The body holds more than {most} {name}.")


def _at_most(count: int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise PydanticCustomError(
                "too_many", "Object should have at most {count} entries", {"count": count}
            )
        return value

    return check
