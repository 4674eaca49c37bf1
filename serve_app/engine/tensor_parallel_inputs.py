"""A forward pass's inputs as one message to the other ranks: plain sizes, and one int64 tensor."""

from __future__ import annotations

from typing import Any

import torch

from serve_app.models.interface import AttentionMetadata, PrefillChunk


def describe(num_rows: int, metadata: AttentionMetadata) -> list[Any]:
    """The sizes that `unpack_inputs` needs, as plain values."""
    chunks = [
        (chunk.start, chunk.length, chunk.context_len, chunk.block_table.shape[0])
        for chunk in metadata.prefill_chunks
    ]
    return [
        num_rows,
        metadata.num_decodes,
        metadata.decode_block_tables.shape[-1] if metadata.num_decodes else 0,
        metadata.max_decode_context_len,
        metadata.block_size,
        metadata.batch_invariant,
        chunks,
    ]


def pack_inputs(
    input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
) -> torch.Tensor:
    """One int64 vector on the device, `num_values` long."""
    parts = [input_ids, positions, metadata.slot_mapping]
    if metadata.num_decodes:
        parts += [metadata.decode_context_lens, metadata.decode_block_tables.reshape(-1)]
    parts += [chunk.block_table for chunk in metadata.prefill_chunks]
    return torch.cat(parts)


def num_values(description: list[Any]) -> int:
    """Length of the packed vector."""
    return sum(_segments(description))


def unpack_inputs(
    description: list[Any], packed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """The ids, positions and metadata that `pack_inputs` was given: views of `packed`."""
    _, num_decodes, width, max_context_len, block_size, batch_invariant, chunks = description
    parts = torch.split(packed, _segments(description))
    ids, positions, slots, context_lens, tables, *chunk_tables = parts
    metadata = AttentionMetadata(
        num_decodes=num_decodes,
        slot_mapping=slots,
        decode_block_tables=tables.view(num_decodes, width),
        decode_context_lens=context_lens,
        max_decode_context_len=max_context_len,
        prefill_chunks=tuple(
            PrefillChunk(start, length, context_len, table)
            for (start, length, context_len, _), table in zip(chunks, chunk_tables, strict=True)
        ),
        block_size=block_size,
        batch_invariant=batch_invariant,
    )
    return ids, positions, metadata


def _segments(description: list[Any]) -> list[int]:
    num_rows, num_decodes, width, _, _, _, chunks = description
    sizes = [num_rows, num_rows, num_rows, num_decodes, num_decodes * width]
    return sizes + [num_blocks for _, _, _, num_blocks in chunks]
