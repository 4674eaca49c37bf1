"""The running sequences' block tables, kept on the device between steps."""

from __future__ import annotations

import torch


class BlockTables:
    """One row per slot, int64 [num_slots, width], so that no step has to send whole tables.

    A sequence's row is written when it starts running. From then on a step adds at most one
    block to it, that of the token which the step itself computes: each decode row writes that one
    down before the tables are read. What a former holder of the slot left lies past the sequence's
    length, where nothing reads it.
    """

    def __init__(self, num_slots: int, width: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._tables = torch.zeros((num_slots, width), dtype=torch.int64, device=device)

    def load(self, slot: int, blocks: torch.Tensor) -> None:
        """Write the first blocks of a slot's row; int64 [n] on the device."""
        self._tables[slot, : blocks.shape[0]] = blocks

    def extend(
        self, slots: torch.Tensor, positions: torch.Tensor, slot_mapping: torch.Tensor, width: int
    ) -> torch.Tensor:
        """Note the decode rows' newest blocks (all int64 [B]); return their tables [B, width]."""
        block_size = self._block_size
        columns = torch.div(positions, block_size, rounding_mode="floor")
        blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
        self._tables.index_put_((slots, columns), blocks)
        return self._tables[:, :width].index_select(0, slots)
