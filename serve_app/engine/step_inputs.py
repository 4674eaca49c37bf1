"""A step's integers, packed into one tensor so that they reach the device in one copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.block_tables import BlockTables
from serve_app.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from serve_app.models.interface import AttentionMetadata, PrefillChunk

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes that fix the layout of a step's inputs; equal shapes share buffers and captured graphs.

    `num_decodes` counts decode rows, padding included; `width` is the width of their block tables,
    0 where the tables are kept on the device; `num_samples` counts the rows that are sampled: all
    decode rows, then finished prefills.
    """

    num_decodes: int
    width: int
    num_prefill_tokens: int = 0
    num_samples: int = 0
    num_chunk_blocks: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the forward pass."""
        return self.num_decodes + self.num_prefill_tokens

    @property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the packed parts, in the order of `StepInputs`' fields."""
        rows, decodes, samples = self.num_rows, self.num_decodes, self.num_samples
        tables = decodes * self.width
        sampling = (samples, samples, samples)
        return (rows, rows, rows, decodes, decodes, tables, *sampling, self.num_chunk_blocks)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views, all int64, into one packed tensor on the device; see `StepShape` for the sizes.

    token_ids [T] (negative: the slot's newest id on the device), positions [T], slot_mapping [T];
    decode_slots [B], context_lens [B], block_tables [B, W]; sample_rows, sample_slots and
    sample_positions [S]; chunk_tables, the prefill chunks' block tables one after the other.
    """

    packed: torch.Tensor
    shape: StepShape
    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    decode_slots: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    sample_rows: torch.Tensor
    sample_slots: torch.Tensor
    sample_positions: torch.Tensor
    chunk_tables: torch.Tensor

    @classmethod
    def over(cls, packed: torch.Tensor, shape: StepShape) -> StepInputs:
        """The views of `packed`."""
        parts = list(torch.split(packed, list(shape.segments)))
        parts[5] = parts[5].view(shape.num_decodes, shape.width)
        return cls(packed, shape, *parts)


class InputPacker:
    """Packs scheduled batches. `scratch_slot` marks rows whose sample nobody wants."""

    def __init__(self, block_size: int, scratch_slot: int) -> None:
        self.block_size = block_size
        self.scratch_slot = scratch_slot

    def shape_of(self, batch: ScheduledBatch, num_decodes: int, width: int) -> StepShape:
        """The shape of `batch`, decode rows padded to `num_decodes`, tables `width` wide."""
        return StepShape(
            num_decodes=num_decodes,
            width=width,
            num_prefill_tokens=sum(chunk.length for chunk in batch.prefills),
            num_samples=num_decodes + sum(chunk.samples for chunk in batch.prefills),
            num_chunk_blocks=sum(self.num_blocks(chunk.end) for chunk in batch.prefills),
        )

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def pack(self, batch: ScheduledBatch, shape: StepShape) -> torch.Tensor:
        """int64 [sum(shape.segments)] on the host. Padding rows write to the scratch block."""
        packed = np.zeros(sum(shape.segments), dtype=np.int64)
        parts = np.split(packed, np.cumsum(shape.segments)[:-1])
        ids, positions, mapping, slots, context_lens, tables, rows, row_slots, row_positions, _ = (
            parts
        )
        tables = tables.reshape(shape.num_decodes, shape.width)
        slots.fill(self.scratch_slot)
        row_slots.fill(self.scratch_slot)
        context_lens.fill(1)
        rows[: shape.num_decodes] = np.arange(shape.num_decodes)
        # A draft's rows are decode rows of the same sequence, one place further each.
        num, size = batch.num_decode_rows, self.block_size
        chunks = [chunk for chunk in batch.decodes for _ in range(chunk.num_rows)]
        sequences = [chunk.sequence for chunk in chunks]
        places = [chunk.start + i for chunk in batch.decodes for i in range(chunk.num_rows)]
        pairs = list(zip(sequences, places, strict=True))
        ids[:num] = [
            token_id
            for chunk in batch.decodes
            for token_id in (chunk.sequence.token_ids[chunk.start], *chunk.draft)
        ]
        positions[:num] = places
        mapping[:num] = [sequence.block_table[place // size] for sequence, place in pairs]
        mapping[:num] = mapping[:num] * size + positions[:num] % size
        slots[:num] = [sequence.slot for sequence in sequences]
        context_lens[:num] = row_positions[:num] = positions[:num] + 1
        is_sampled = np.array([chunk.samples for chunk in chunks], dtype=bool)
        row_slots[:num] = np.where(is_sampled, slots[:num], self.scratch_slot)
        if shape.width:
            for i, sequence in enumerate(sequences):
                used = min(len(sequence.block_table), shape.width)
                tables[i, :used] = sequence.block_table[:used]
        self._pack_prefills(batch, shape.num_decodes, parts)
        return torch.from_numpy(packed)

    def _pack_prefills(
        self, batch: ScheduledBatch, num_decodes: int, parts: list[Int64Array]
    ) -> None:
        ids, positions, mapping, _, _, _, rows, row_slots, row_positions, chunk_tables = parts
        row, sample, table = num_decodes, num_decodes, 0
        for chunk in batch.prefills:
            sequence, end_row = chunk.sequence, row + chunk.length
            places = np.arange(chunk.start, chunk.end)
            blocks = np.array(sequence.block_table[: self.num_blocks(chunk.end)], dtype=np.int64)
            ids[row:end_row] = sequence.token_ids[chunk.start : chunk.end]
            positions[row:end_row] = places
            mapping[row:end_row] = (
                blocks[places // self.block_size] * self.block_size + places % self.block_size
            )
            chunk_tables[table : table + len(blocks)] = blocks
            if chunk.samples:
                rows[sample] = end_row - 1
                row_slots[sample] = sequence.slot
                row_positions[sample] = chunk.end
                sample += 1
            row, table = end_row, table + len(blocks)

    def metadata(
        self,
        inputs: StepInputs,
        prefills: list[ScheduledChunk],
        max_decode_context_len: int,
        batch_invariant: bool,
        tables: BlockTables | None = None,
    ) -> AttentionMetadata:
        """What the network's attention needs: views of `inputs`, or rows of `tables`."""
        num_decodes = inputs.shape.num_decodes
        block_tables = inputs.block_tables
        if tables is not None and num_decodes:
            block_tables = tables.extend(
                inputs.decode_slots,
                inputs.positions[:num_decodes],
                inputs.slot_mapping[:num_decodes],
                self.num_blocks(max_decode_context_len),
            )
        return AttentionMetadata(
            num_decodes=num_decodes,
            slot_mapping=inputs.slot_mapping,
            decode_block_tables=block_tables,
            decode_context_lens=inputs.context_lens,
            max_decode_context_len=max_decode_context_len,
            prefill_chunks=tuple(self._chunks(inputs, prefills)),
            block_size=self.block_size,
            batch_invariant=batch_invariant,
        )

    def _chunks(self, inputs: StepInputs, prefills: list[ScheduledChunk]) -> Iterator[PrefillChunk]:
        row, table = inputs.shape.num_decodes, 0
        for chunk in prefills:
            end = table + self.num_blocks(chunk.end)
            yield PrefillChunk(row, chunk.length, chunk.end, inputs.chunk_tables[table:end])
            row, table = row + chunk.length, end
