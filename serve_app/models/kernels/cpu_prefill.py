"""Attention of prompts' chunks straight from the paged cache, on CPUs with AMX: `cpu_prefill.cpp`.

PyTorch's attention takes one chunk at a time, wants a mask where a context came before it, and
computes what the mask hides. Here all chunks of a step are one call per layer. bfloat16 alone;
elsewhere, or with XERAY_DISABLE_KERNELS=cpu_prefill, PyTorch computes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from serve_app.models.interface import PrefillChunk
from serve_app.models.kernels._triton import disabled_kernels
from serve_app.models.kernels.cpu_library import load_library

_SOURCE = Path(__file__).with_name("cpu_prefill.cpp")
_HEAD_DIMS = (32, 64, 96, 128)
_TILE_TOKENS = 16
_STEP_TOKENS = 32
_POINTER, _INT, _FLOAT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = (
    *(_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER),
    *(*[_INT] * 4, _FLOAT, _POINTER, _POINTER, _THREADS),
)
_MAX_WORKSPACE_TOKENS = 64 * 1024
"""Contexts whose values are transposed together; a longer one goes alone."""


class CpuPrefill:
    """The chunks of one forward pass, described once for all of its layers.

    A row's bits depend on the row and its context alone: not on the chunk that it came in, on other
    sequences or on the number of threads.
    """

    def __init__(self, library: ctypes.CDLL, chunks: Sequence[PrefillChunk]) -> None:
        self._function = library.prefill_attention
        self._function.argtypes, self._function.restype = _ARGUMENTS, None
        self._tables = torch.cat([chunk.block_table for chunk in chunks])
        rows: list[tuple[int, ...]] = []
        table = 0
        for chunk in chunks:
            rows.append((chunk.start, chunk.length, chunk.context_len, table))
            table += chunk.block_table.shape[0]
        self._chunks = torch.tensor(rows)
        self._parts = _parts([_padded(chunk.context_len) for chunk in chunks])

    def attend(self, query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        """Write the chunks' rows of `out`, [T, Hq, D], contiguous; other rows stay as they are.

        query: [T, Hq, D], whose rows may lie apart. cache: one layer's, [2, blocks, size, Hkv, D].
        """
        num_heads, dim = query.shape[1:]
        block_size, num_kv_heads = cache.shape[2:4]
        keys = cache.data_ptr()
        values = keys + cache.stride(0) * cache.element_size()
        for first, count, num_tokens in self._parts:
            workspace = torch.empty(num_tokens * num_kv_heads * dim, dtype=torch.bfloat16)
            self._function(
                query.data_ptr(),
                query.stride(0),
                keys,
                values,
                self._chunks[first].data_ptr(),
                count,
                self._tables.data_ptr(),
                block_size,
                num_heads,
                num_kv_heads,
                dim,
                dim**-0.5,
                workspace.data_ptr(),
                out.data_ptr(),
                torch.get_num_threads(),
            )


def plan_cpu_prefill(
    chunks: Sequence[PrefillChunk],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
) -> CpuPrefill | None:
    """Prepare the kernel for these chunks; None where it does not run or does not take them."""
    if not chunks or device.type != "cpu" or dtype is not torch.bfloat16:
        return None
    if (
        head_dim not in _HEAD_DIMS
        or block_size % _TILE_TOKENS
        or "cpu_prefill" in disabled_kernels()
    ):
        return None
    library = _library()
    return None if library is None else CpuPrefill(library, chunks)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_library(_SOURCE)
    return library if library is not None and library.has_prefill_attention() else None


def _padded(num_tokens: int) -> int:
    return -(-num_tokens // _STEP_TOKENS) * _STEP_TOKENS


def _parts(tokens: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut neighbours into calls of bounded size: (first, count, tokens) each."""
    parts: list[tuple[int, int, int]] = []
    for index, count in enumerate(tokens):
        if parts and parts[-1][2] + count <= _MAX_WORKSPACE_TOKENS:
            first, number, total = parts[-1]
            parts[-1] = first, number + 1, total + count
        else:
            parts.append((index, 1, count))
    return parts
