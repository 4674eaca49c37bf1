"""Paged KV blocks: who holds which, and which finished content can serve again as a prefix.

Ownership: each block is in exactly one of three states, which `check_integrity` proves::

    free    no content worth keeping               _free
    cached  no holder, content known by its hash   _cached (least recently used first)
    used    held by ≥ 1 live sequence              _num_references[block] ≥ 1

    free ──allocate──> used ──release──> cached (if registered) or free
    cached ──prefix hit──> used          cached ──evict──> used (for other content)
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from serve_app.engine.sequence import Sequence

SCRATCH_BLOCK = 0
"""The block that padding rows write to; never handed out, never counted."""


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Hash of a full block: 128-bit BLAKE2b over its parent's hash and its ids as int64."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


def hash_root(cache_salt: str | None) -> bytes:
    """Parent hash of a sequence's first block: equal only for equal salts."""
    return hashlib.blake2b((cache_salt or "").encode(), digest_size=16).digest()


class BlockManager:
    """Hands out blocks 1 … num_blocks with reference counts and keeps full ones for prefix hits.

    Args:
        num_blocks: blocks that can be held, the scratch block not counted.
        block_size: tokens per block.
        enable_prefix_caching: keep and share the content of full blocks.
        alignment: prefix hits are cut to multiples of this many tokens (a multiple of block_size).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        alignment: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.alignment = alignment or block_size
        assert self.alignment % block_size == 0, "prefix hits end at block boundaries"
        self._free = list(range(num_blocks, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_references = [0] * (num_blocks + 1)
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody holds, kept for prefix hits."""
        return len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that live sequences hold."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available_blocks(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, sequence: Sequence, limit: int) -> list[int]:
        """Blocks whose content is the beginning of `sequence`, at most `limit` tokens of it.

        Nothing is taken yet; the blocks can be handed to `allocate` at once.
        """
        if not self.enable_prefix_caching:
            return []
        blocks = []
        for block_hash in self._hashes(sequence, limit // self.block_size):
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        blocks_per_unit = self.alignment // self.block_size
        return blocks[: len(blocks) // blocks_per_unit * blocks_per_unit]

    def can_allocate(self, num_tokens: int, prefix: list[int], reserve: int = 0) -> bool:
        """Whether `num_tokens` fit with the prefix blocks shared and `reserve` blocks left over."""
        num_revived = sum(1 for block in prefix if self._num_references[block] == 0)
        num_new = self.num_blocks_for(num_tokens) - len(prefix)
        return num_new + num_revived + reserve <= self.num_available_blocks

    def allocate(self, sequence: Sequence, prefix: list[int]) -> None:
        """Give `sequence` blocks for its tokens, the first ones shared. Needs `can_allocate`."""
        assert not sequence.block_table, "the sequence holds blocks already"
        for block in prefix:
            self._cached.pop(block, None)
            self._num_references[block] += 1
        num_new = self.num_blocks_for(sequence.num_tokens) - len(prefix)
        sequence.block_table = prefix + [self._take() for _ in range(num_new)]
        sequence.num_registered_blocks = len(prefix)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the sequence can hold `num_tokens` tokens."""
        missing = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        return missing <= self.num_available_blocks

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence blocks up to `num_tokens` tokens. Needs `can_grow`."""
        while len(sequence.block_table) < self.num_blocks_for(num_tokens):
            sequence.block_table.append(self._take())

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """Take back the blocks past `num_tokens` tokens, which only a failed draft has filled."""
        while len(sequence.block_table) > self.num_blocks_for(num_tokens):
            block = sequence.block_table.pop()
            assert block not in self._hash_of, "a block of computed tokens is no draft's"
            self._num_references[block] = 0
            self._free.append(block)

    def release(self, sequence: Sequence) -> None:
        """Take the sequence's blocks back, the deepest first, so that it is evicted first."""
        for block in reversed(sequence.block_table):
            self._num_references[block] -= 1
            if self._num_references[block] > 0:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)
        sequence.block_table = []
        sequence.num_registered_blocks = 0

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the full blocks of the first `num_tokens` tokens, computed and known, reusable."""
        if not self.enable_prefix_caching:
            return
        first = sequence.num_registered_blocks
        num_full = min(num_tokens // self.block_size, len(sequence.block_table))
        if num_full <= first:
            return
        hashes = self._hashes(sequence, num_full)
        for i in range(first, num_full):
            block, block_hash = sequence.block_table[i], hashes[i]
            if block not in self._hash_of and block_hash not in self._block_of:
                self._hash_of[block] = block_hash
                self._block_of[block_hash] = block
        sequence.num_registered_blocks = num_full

    def reset_prefix_cache(self) -> None:
        """Forget all content; blocks in use stay in use."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def check_integrity(self, live: Iterable[Sequence]) -> None:
        """Prove that free + cached + used == total and that references match `live`.

        Raises AssertionError, naming the difference, where they do not.
        """
        holders = Counter(block for sequence in live for block in sequence.block_table)
        held = {block for block, count in enumerate(self._num_references) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        states = len(free) + len(cached) + len(held)
        assert states == len(free | cached | held), "a block has two states"
        everything = set(range(1, self.num_blocks + 1))
        assert free | cached | held == everything, f"lost: {everything - free - cached - held}"
        counted = {block: self._num_references[block] for block in held}
        assert counted == dict(holders), f"references {counted} but holders {dict(holders)}"
        assert cached <= self._hash_of.keys(), "a cached block has no hash"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "hash maps differ"

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._num_references[block] = 1
        return block

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        hashes = sequence.block_hashes
        size = self.block_size
        if len(hashes) < num_blocks:
            parent = hashes[-1] if hashes else hash_root(sequence.sampling.cache_salt)
            for i in range(len(hashes), num_blocks):
                parent = hash_block(parent, sequence.token_ids[i * size : (i + 1) * size])
                hashes.append(parent)
        return hashes[:num_blocks]
