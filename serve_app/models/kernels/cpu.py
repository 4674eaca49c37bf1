"""The small operators of a decoder layer on a CPU, one call each: `cpu.cpp`, compiled on the spot.

A decode step of a small model spends most of its time calling ATen, not computing: a norm is seven
operators there, attention over a paged cache a copy and a call. The source is compiled once per
processor and compiler (two seconds) and kept in the user's cache folder. Without g++, with another
OpenMP than torch's, or with XERAY_DISABLE_KERNELS=cpu, callers compute with ATen as before.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from serve_app.models.kernels._triton import disabled_kernels
from serve_app.models.kernels.cpu_library import load_library

_SOURCE = Path(__file__).with_name("cpu.cpp")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_HEAD_DIMS = (32, 64, 96, 128)
_LANES = 16
CHUNK_TOKENS = 64
"""Tokens of a context that are attended as one part."""
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_WORKERS = ctypes.c_int, _POINTER  # threads, and a team's member or None
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "add_rms_norm": (*[_POINTER] * 5, _INT, _INT, _FLOAT, *_WORKERS),
    "silu_and_mul": (*[_POINTER] * 2, _INT, _INT, *_WORKERS),
    "rotate_and_cache": (*[_POINTER] * 6, *[_INT] * 4, *[_POINTER] * 2, _FLOAT, *_WORKERS),
    "decode_attention": (
        *(_POINTER, _INT, *[_POINTER] * 3, _INT, _POINTER, *[_INT] * 5),
        *(_FLOAT, _INT, _POINTER, _POINTER, *_WORKERS),
    ),
}


class CpuKernels:
    """The compiled operators for activations of one type; contiguous tensors on the CPU.

    A row's bits depend neither on the other rows nor on the number of threads. `functions`: those
    of `cpu.cpp`, by name.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.functions: dict[str, Any] = {}
        for name, argtypes in _SIGNATURES.items():
            function = getattr(library, f"{name}_{_DTYPES[dtype]}")
            function.argtypes, function.restype = argtypes, None
            self.functions[name] = function
        self._add_rms_norm, self._silu, self._rotate, self._attend = self.functions.values()

    @staticmethod
    def takes(num_columns: int) -> bool:
        """Whether rows of this many elements are whole vectors."""
        return num_columns % _LANES == 0

    @staticmethod
    def takes_heads(head_dim: int) -> bool:
        """Whether heads of this size have a loop of their own."""
        return head_dim in _HEAD_DIMS

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H], float32 [T, H] or None, float32 [H] → (norm of the sum [T, H], float32 sum)."""
        x = x.contiguous()
        out = torch.empty_like(x)
        summed = torch.empty(x.shape, dtype=torch.float32)
        self._add_rms_norm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            summed.data_ptr(),
            x.shape[0],
            x.shape[1],
            eps,
            torch.get_num_threads(),
            None,
        )
        return out, summed

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up for [T, 2I] → [T, I]."""
        gate_up = gate_up.contiguous()
        num_rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((num_rows, inner))
        threads = torch.get_num_threads()
        self._silu(gate_up.data_ptr(), out.data_ptr(), num_rows, inner, threads, None)
        return out

    def rotate_and_cache(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        cache: torch.Tensor,
        num_heads: int,
        *,
        query_weight: torch.Tensor | None = None,
        key_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """[T, (Hq + 2 Hkv) * D] → rotated queries [T, Hq, D], a view; K and V go to `cache`.

        cos, sin: rows of `rotary_table`, [T, D] in x's type. cache: [2, blocks, size, Hkv, D].
        The weights, float32 [D], are of Qwen3's norms of queries and keys.
        """
        num_kv_heads, dim = cache.shape[3:]
        keys, values = _planes(cache)
        self._rotate(
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            keys,
            values,
            qkv.shape[0],
            num_heads,
            num_kv_heads,
            dim,
            None if query_weight is None else query_weight.data_ptr(),
            None if key_weight is None else key_weight.data_ptr(),
            eps,
            torch.get_num_threads(),
            None,
        )
        return qkv.view(qkv.shape[0], -1, dim)[:, :num_heads]

    def decode_attention(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        max_context_len: int,
    ) -> torch.Tensor:
        """One row per sequence, [B, Hq, D] → [B, Hq, D], straight from the blocks of `cache`.

        block_tables: int64 [B, W]; context_lens: int64 [B], 0 counts as 1. Rows of `query` may lie
        apart. A context is summed in parts of 64 tokens, so few rows keep several threads busy.
        """
        num_rows, num_heads, dim = query.shape
        block_size, num_kv_heads = cache.shape[2:4]
        max_chunks = -(-max(max_context_len, 1) // CHUNK_TOKENS)
        partials = torch.empty(num_rows * max_chunks * num_heads * (dim + 2))
        out = torch.empty((num_rows, num_heads, dim), dtype=self._dtype)
        keys, values = _planes(cache)
        self._attend(
            query.data_ptr(),
            query.stride(0),
            keys,
            values,
            block_tables.data_ptr(),
            block_tables.shape[1],
            context_lens.data_ptr(),
            block_size,
            num_rows,
            num_heads,
            num_kv_heads,
            dim,
            dim**-0.5,
            max_chunks,
            partials.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
            None,
        )
        return out


def cpu_kernels(like: torch.Tensor) -> CpuKernels | None:
    """The operators for tensors like this one, or None where there are none."""
    return _kernels(like.dtype) if like.device.type == "cpu" else None


@functools.cache
def _kernels(dtype: torch.dtype) -> CpuKernels | None:
    if dtype not in _DTYPES or "cpu" in disabled_kernels():
        return None
    library = _library()
    return None if library is None else CpuKernels(library, dtype)


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load_library(_SOURCE)


def _planes(cache: torch.Tensor) -> tuple[int, int]:
    """Addresses of the keys and of the values of one layer."""
    keys = cache.data_ptr()
    return keys, keys + cache.stride(0) * cache.element_size()
