"""What the scheduler hands to a step: chunks of sequences, and the tokens drafted for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import eq

from serve_app.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens [start, start + length) of a sequence; `samples`: the last yields a new token.

    `draft`: tokens that may follow, of a decode only. Each has a row of its own behind the chunk's,
    and yields what would come after it.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Tokens of the sequence that are computed once this chunk has run, drafts left out."""
        return self.start + self.length

    @property
    def num_rows(self) -> int:
        """Rows of the step, drafts included."""
        return self.length + len(self.draft)

    def num_accepted(self, token_ids: tuple[int, ...]) -> int:
        """Tokens of the draft that held, where the chunk's rows yielded `token_ids` in the end."""
        return sum(map(eq, self.draft, token_ids))

    @property
    def context_len(self) -> int:
        """Tokens that the chunk's last row sees, drafts included."""
        return self.end + len(self.draft)


@dataclass(slots=True)
class ScheduledBatch:
    """What one step computes: decodes (one token and its draft each), then prefill chunks.

    `admitted` are the sequences that start running with this step; their slots are new.
    """

    decodes: list[ScheduledChunk] = field(default_factory=list)
    prefills: list[ScheduledChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_preempted: int = 0

    @property
    def chunks(self) -> list[ScheduledChunk]:
        """All chunks in row order."""
        return self.decodes + self.prefills

    @property
    def num_decode_rows(self) -> int:
        """Rows of the decodes, drafts included."""
        return sum(chunk.num_rows for chunk in self.decodes)

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return sum(chunk.num_rows for chunk in self.chunks)

    def decode_rows(self) -> Iterator[tuple[int, ScheduledChunk]]:
        """Each decode with the number of its first row."""
        row = 0
        for chunk in self.decodes:
            yield row, chunk
            row += chunk.num_rows

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)
