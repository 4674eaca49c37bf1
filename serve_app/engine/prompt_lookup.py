"""Drafts by prompt lookup: a text that repeats itself foretells its next tokens.

The last n tokens are looked for in what stands before them, prompt and answer alike, and what
followed there is the draft (Saxena 2023, "Prompt Lookup Decoding"). It is checked by the step that
computes it, so a wrong draft costs rows of a step and changes nothing else; a sequence whose drafts
fail gets short ones, and few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from operator import eq

import numpy as np
import numpy.typing as npt

from serve_app.config.sections_speculative import SpeculativeSection

_ASSUMED_HELD = 1.2
_ASSUMED_FAILED = 0.8
_FADE_PER_DRAFT = 0.8
_FADE_PER_TOKEN = 0.97
_PROMISING = 0.5
"""From here on a draft yields more than one token: as many as the step that waiting costs."""


@dataclass(frozen=True, slots=True)
class LookupOptions:
    """Most tokens of a draft, and the lengths of the match that it follows."""

    num_tokens: int
    min_ngram: int
    max_ngram: int

    @classmethod
    def of(cls, section: SpeculativeSection) -> LookupOptions | None:
        """Return the config's, None where it has drafts off."""
        if not section.is_on:
            return None
        return cls(section.num_tokens, section.min_ngram, section.max_ngram)


class Acceptance:
    """How likely each token of a sequence's next draft holds, by how its last ones did.

    What is known fades, faster with drafts than with plain tokens, towards what is assumed of a
    text at its beginning: drafts that failed are tried again after a while.
    """

    __slots__ = ("_num_failed", "_num_held")

    def __init__(self) -> None:
        self._num_held = 0.0
        self._num_failed = 0.0

    @property
    def probability(self) -> float:
        """Probability (0 to 1) that a token holds if those before it did."""
        held = self._num_held + _ASSUMED_HELD
        return held / (held + self._num_failed + _ASSUMED_FAILED)

    def count_token(self) -> None:
        """A token came without a draft."""
        self._fade(_FADE_PER_TOKEN)

    def count_draft(self, num_drafted: int, num_accepted: int) -> None:
        """A draft was verified: so many of its tokens held, and the next one, if any, failed."""
        self._fade(_FADE_PER_DRAFT)
        self._num_held += num_accepted
        self._num_failed += num_accepted < num_drafted

    def longest(self, break_even: float) -> int:
        """Tokens of a draft that all hold with a probability of at least `break_even` > 0."""
        probability = self.probability
        if break_even >= 1.0:
            return 0
        return int(math.log(break_even) / math.log(probability))

    def _fade(self, share: float) -> None:
        self._num_held *= share
        self._num_failed *= share


class PromptLookup:
    """One sequence's tokens in searchable form, and how its drafts did."""

    __slots__ = ("_found", "_ids", "_num_ids", "_num_searched", "_options", "acceptance")

    def __init__(self, options: LookupOptions) -> None:
        self._options = options
        self._ids: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._num_ids = 0
        self._num_searched = 0
        self._found: int | None = None
        self.acceptance = Acceptance()

    def draft(self, token_ids: SequenceOf[int], num_known: int, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that may follow the first `num_known` of `token_ids`.

        Known tokens never change, so only those that are new since the last call are read.
        """
        limit = min(limit, self._options.num_tokens)
        start = self._find(token_ids, num_known) if limit > 0 else None
        if start is None:
            return ()
        # Past the end the draft repeats itself, as the text then would.
        period = num_known - start
        return tuple(int(self._ids[start + i % period]) for i in range(limit))

    def learn(self, draft: SequenceOf[int], token_ids: SequenceOf[int]) -> None:
        """Take note of what a step yielded where `draft` was foretold; empty: nothing was."""
        if draft:
            self.acceptance.count_draft(len(draft), sum(map(eq, draft, token_ids)))
        else:
            self.acceptance.count_token()

    def is_promising(self, token_ids: SequenceOf[int], num_known: int) -> bool:
        """Whether it is worth to wait for the token that a step in flight is choosing.

        It is where the tokens known so far foretell that one, and drafts did not fail of late.
        """
        is_good = self.acceptance.probability >= _PROMISING
        return is_good and self._find(token_ids, num_known) is not None

    def _find(self, token_ids: SequenceOf[int], num_known: int) -> int | None:
        """Where the continuation of the longest match begins; of several, the latest."""
        if num_known != self._num_searched:
            self._take(token_ids, num_known)
            self._found = self._search(num_known)
            self._num_searched = num_known
        return self._found

    def _search(self, num_known: int) -> int | None:
        ids, end = self._ids, num_known
        # Places right behind an earlier occurrence of the last token, then of the last two, …
        places = np.flatnonzero(ids[: end - 1] == ids[end - 1]) + 1
        length = 1
        while places.size and length < self._options.max_ngram:
            longer = places[places > length]
            longer = longer[ids[longer - length - 1] == ids[end - length - 1]]
            if not longer.size:
                break
            places, length = longer, length + 1
        if not places.size or length < self._options.min_ngram:
            return None
        return int(places[-1])

    def _take(self, token_ids: SequenceOf[int], num_known: int) -> None:
        if num_known > len(self._ids):
            grown = np.empty(max(256, 2 * num_known), dtype=np.int32)
            grown[: self._num_ids] = self._ids[: self._num_ids]
            self._ids = grown
        if num_known > self._num_ids:
            self._ids[self._num_ids : num_known] = token_ids[self._num_ids : num_known]
            self._num_ids = num_known
