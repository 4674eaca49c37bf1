"""Which replica likely has a prompt's beginning in its cache: what a router remembers of its own.

The chunks are hashed in a chain, as the engine's blocks are (engine.block_manager), but they are
coarser, and fewer of a prompt are looked at: a wrong guess costs time only.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

CHUNK_TOKENS = 32
"""Tokens per entry of the prefix table."""
MAX_CHUNKS = 64
"""Chunks of a prompt that are looked at: shared prefixes longer than this count as this long."""
STALE_PREFIX_S = 900.0
"""An entry not used for this long is not believed: the engine may have restarted or evicted it."""

_HASH_BYTES = 8
_MAX_ENTRIES = 32768


def prefix_chain(token_ids: Sequence[int], cache_salt: str | None = None) -> tuple[bytes, ...]:
    """Return the chained hashes of a prompt's first full chunks, at most MAX_CHUNKS."""
    num_chunks = min(len(token_ids) // CHUNK_TOKENS, MAX_CHUNKS)
    parent = hashlib.blake2b((cache_salt or "").encode(), digest_size=_HASH_BYTES).digest()
    chain = []
    for start in range(0, num_chunks * CHUNK_TOKENS, CHUNK_TOKENS):
        ids = array("q", token_ids[start : start + CHUNK_TOKENS]).tobytes()
        parent = hashlib.blake2b(parent + ids, digest_size=_HASH_BYTES).digest()
        chain.append(parent)
    return tuple(chain)


class PrefixTable:
    """The chunks that each replica has likely cached: least recently used go first, as there."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._chunks: dict[str, OrderedDict[bytes, float]] = {}

    def num_hit_tokens(self, replica_id: str, chain: Sequence[bytes]) -> int:
        """Return how many tokens of the chain the replica likely has."""
        chunks = self._chunks.get(replica_id)
        if not chunks:
            return 0
        oldest_s = self._now() - STALE_PREFIX_S
        num_hits = 0
        for chunk in chain:
            if chunks.get(chunk, -math.inf) < oldest_s:
                break
            num_hits += 1
        return num_hits * CHUNK_TOKENS

    def remember(self, replica_id: str, chain: Sequence[bytes], capacity_tokens: int) -> None:
        """Note that a replica got this prompt, and forget what it had to evict for it."""
        chunks = self._chunks.setdefault(replica_id, OrderedDict())
        now = self._now()
        for chunk in reversed(chain):  # the deepest is evicted first, as in the engine
            chunks[chunk] = now
            chunks.move_to_end(chunk)
        limit = min(_MAX_ENTRIES, max(MAX_CHUNKS, capacity_tokens // CHUNK_TOKENS))
        while len(chunks) > limit:
            chunks.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """Drop what is known of a replica that is gone."""
        self._chunks.pop(replica_id, None)

    def num_entries(self) -> int:
        """Return how many chunks are held, of all replicas."""
        return sum(map(len, self._chunks.values()))
