"""Stop strings in a stream of text: found across any boundary, never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Watches one sequence's text for the first stop string that becomes complete.

    What could still turn out to be the beginning of a stop string is held back. Of several that
    become complete at the same character the longest counts, so the result does not depend on how
    the text was cut into pieces. After a match everything further is dropped.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include_in_output = include_in_output
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._matched

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text; return what may be shown now, and the stop string once it is found."""
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            end, stop = found
            self._held, self._matched = "", stop
            return text[: end if self._include_in_output else end - len(stop)], stop
        shown = len(text) - self._num_held(text)
        self._held = text[shown:]
        return text[:shown], None

    def finish(self) -> str:
        """Return what was held back: the text ended, so it was no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        ends = [
            (start + len(stop), -len(stop), stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if not ends:
            return None
        end, _, stop = min(ends)
        return end, stop

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0:
                if stop.startswith(text[start:]):
                    longest = max(longest, len(text) - start)
                    break
                start = text.find(stop[0], start + 1)
        return longest
