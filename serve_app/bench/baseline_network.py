"""A network whose answers are whole numbers: equal ids on every machine, and only if all is well.

It keeps each token's id in the paged KV cache and answers with a checksum of the context that it
reads back from there. A block that is shared wrongly, freed early or left unwritten changes the
answer; the processor, its instruction set and torch's version do not.
"""

from __future__ import annotations

import torch

from serve_app.models.interface import AttentionMetadata, KVCacheSpec, LoadedModel

_PRIME = 8191
_STRIDE = 131


class ChecksumNetwork:
    """A `CausalLM` on the CPU; one layer, one head of size 1, exact in float32 and int64."""

    def __init__(self, vocab_size: int = 512, max_position: int = 256) -> None:
        self.vocab_size = vocab_size
        self.max_position = max_position
        self.device = torch.device("cpu")
        self.kv_spec = KVCacheSpec(1, 1, 1, torch.float32)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> torch.Tensor:
        """Return the cache, float32 [1, 2, num_blocks, block_size, 1, 1], full of wrong ids."""
        return torch.full((1, 2, num_blocks, block_size, 1, 1), float(self.vocab_size))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """int64 [T], int64 [T] → the next ids as float32 [T, 1]; stores ids and positions."""
        planes = kv_cache.view(2, -1)
        planes[0, metadata.slot_mapping] = input_ids.float()
        planes[1, metadata.slot_mapping] = positions.float()
        sums = torch.zeros_like(input_ids)
        for row in range(metadata.num_decodes):
            length = int(metadata.decode_context_lens[row])
            table = metadata.decode_block_tables[row]
            sums[row] = self._sums(planes, table, length, metadata.block_size)[-1]
        for chunk in metadata.prefill_chunks:
            found = self._sums(planes, chunk.block_table, chunk.context_len, metadata.block_size)
            sums[chunk.start : chunk.start + chunk.length] = found[-chunk.length :]
        return (sums % self.vocab_size).float().unsqueeze(-1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, 1] → float32 logits [S, vocab], largest at the id that `hidden` holds."""
        return -(torch.arange(self.vocab_size, dtype=torch.float32) - hidden).abs()

    def _sums(
        self, planes: torch.Tensor, table: torch.Tensor, length: int, block_size: int
    ) -> torch.Tensor:
        """Return int64 [length]: the checksum of each position's context."""
        places = torch.arange(length)
        slots = table[places // block_size] * block_size + places % block_size
        ids, positions = planes[0, slots].long(), planes[1, slots].long()
        return torch.cumsum((ids + 1) * (positions * _STRIDE % _PRIME + 1) % _PRIME, 0)


def checksum_model() -> LoadedModel:
    """Return the network as a loaded model that never ends by itself."""
    return LoadedModel(
        network=ChecksumNetwork(),
        name="checksum",
        architecture="checksum",
        dtype=torch.float32,
        weights_bytes=0,
        weight_format="dense",
        eos_token_ids=(),
    )
