"""The layers of a Llama network's decode step on a CPU, as one call.

The same kernels on the same numbers as layer by layer from Python, so the same bits; what it saves
is Python's part, a third of a small model's step at one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from serve_app.models.config import NetworkConfig
from serve_app.models.interface import AttentionMetadata
from serve_app.models.kernels._triton import disabled_kernels
from serve_app.models.kernels.cpu import CHUNK_TOKENS, CpuKernels, cpu_kernels
from serve_app.models.kernels.cpu_calls import CallKind, CallTable, Column, calls_library
from serve_app.models.kernels.cpu_packed import PackedCpuKernel, workspace_size
from serve_app.models.layers import RMSNorm
from serve_app.models.linear import Linear

if TYPE_CHECKING:
    from serve_app.models.llama import DecoderLayer

_ROWS = {
    CallKind.ADD_RMS_NORM: 5,
    CallKind.SILU_AND_MUL: 2,
    CallKind.ROTATE_AND_CACHE: 6,
    CallKind.DECODE_ATTENTION: 8,
    CallKind.PACKED_LINEAR: 7,
}
"""Which argument is the number of rows."""


class CpuDecodeStep:
    """Decode rows through all layers and the final norm. Not for several threads at once.

    `is_on` is False while a profile wants to see each operator.

    Args:
        config: one that `takes` allows.
        layers: each has `packed_rows` for `max_rows`.
        final_norm: it yields the activations' type, as all norms do.
        kv_cache: [L, 2, num_blocks, block_size, Hkv, D], kept alive by the caller.
        max_rows: the most rows of a step.
    """

    is_on: ClassVar[bool] = True

    @staticmethod
    def takes(config: NetworkConfig) -> bool:
        """Whether its kernels are there, and take rows and heads of these sizes."""
        is_fit = CpuKernels.takes_heads(config.head_dim) and CpuKernels.takes(config.hidden_size)
        return is_fit and "cpu_step" not in disabled_kernels() and calls_library() is not None

    def __init__(
        self,
        config: NetworkConfig,
        layers: Sequence[DecoderLayer],
        final_norm: RMSNorm,
        kv_cache: torch.Tensor,
        max_rows: int,
    ) -> None:
        kernels, library = cpu_kernels(kv_cache), calls_library()
        assert kernels is not None
        assert library is not None
        self._kernels = kernels
        self._config = config
        self._dtype = kv_cache.dtype
        self._num_threads = torch.get_num_threads()
        self._kv_cache = kv_cache.data_ptr(), kv_cache.shape
        self.max_rows = max_rows
        self._make_buffers(layers)
        self._table = table = CallTable(library, self._num_threads)
        for index, (layer, cache) in enumerate(zip(layers, kv_cache, strict=True)):
            self._add_layer(layer, cache, is_first=index == 0)
        self._add_norm(final_norm, self._products.data_ptr(), is_first=False)
        table.finish()
        self._rows = [table.column(kind, argument) for kind, argument in _ROWS.items()]
        rotations = [table.column(CallKind.ROTATE_AND_CACHE, argument) for argument in (1, 2, 3)]
        self._cos, self._sin, self._slots = rotations
        attention = {
            name: table.column(CallKind.DECODE_ATTENTION, argument)
            for name, argument in (("tables", 4), ("width", 5), ("lens", 6), ("chunks", 12))
        }
        self._attention: dict[str, Column] = attention
        self._partials = table.column(CallKind.DECODE_ATTENTION, 13)
        self._input, self._output = table.cell(0, 0), table.cell(-1, 3)

    def fits(self, kv_cache: torch.Tensor) -> bool:
        """Whether it was made for this cache and the number of threads set now."""
        is_same = (kv_cache.data_ptr(), kv_cache.shape) == self._kv_cache
        return is_same and torch.get_num_threads() == self._num_threads

    def run(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Embedded rows [T, hidden], their rows of the rotary table [T, D] → hidden states.

        Keys and values are written; all rows are decode rows, `max_rows` at most.
        """
        num_rows = x.shape[0]
        x, out = x.contiguous(), torch.empty_like(x)
        slots, lens = metadata.slot_mapping, metadata.decode_context_lens
        tables = metadata.decode_block_tables.contiguous()
        max_chunks = -(-max(metadata.max_decode_context_len, 1) // CHUNK_TOKENS)
        head_size = self._config.head_dim + 2
        partials = torch.empty(num_rows * max_chunks * self._config.num_heads * head_size)
        for column in self._rows:
            column.set(num_rows)
        self._input.set(x.data_ptr())
        self._output.set(out.data_ptr())
        self._cos.set(cos.data_ptr())
        self._sin.set(sin.data_ptr())
        self._slots.set(slots.data_ptr())
        self._attention["tables"].set(tables.data_ptr())
        self._attention["width"].set(tables.shape[1])
        self._attention["lens"].set(lens.data_ptr())
        self._attention["chunks"].set(max_chunks)
        self._partials.set(partials.data_ptr())
        self._table.run()
        return out

    def _make_buffers(self, layers: Sequence[DecoderLayer]) -> None:
        """Activations between two calls; each layer uses them anew."""
        config, rows = self._config, self.max_rows
        heads = config.num_heads + 2 * config.num_kv_heads
        inner = max(_packed(layer.down).shape[1] for layer in layers)

        def rows_of(width: int, dtype: torch.dtype = self._dtype) -> torch.Tensor:
            return torch.empty((rows, width), dtype=dtype)

        self._normed, self._products = rows_of(config.hidden_size), rows_of(config.hidden_size)
        self._residual = rows_of(config.hidden_size, torch.float32)
        self._qkv = rows_of(heads * config.head_dim)
        self._attended = rows_of(config.num_heads * config.head_dim)
        self._gate_up, self._activated = rows_of(2 * inner), rows_of(inner)
        widest = max(config.hidden_size, config.num_heads * config.head_dim, inner)
        self._workspace = torch.empty(workspace_size(rows, widest))

    def _add_layer(self, layer: DecoderLayer, cache: torch.Tensor, is_first: bool) -> None:
        products = self._products.data_ptr()
        self._add_norm(layer.input_norm, products, is_first)
        self._add_product(layer.qkv, self._normed, self._qkv)
        self._add_rotation(layer, cache)
        self._add_attention(cache)
        self._add_product(layer.output, self._attended, self._products)
        self._add_norm(layer.mlp_norm, products, is_first=False)
        self._add_product(layer.gate_up, self._normed, self._gate_up)
        self._table.add(
            CallKind.SILU_AND_MUL,
            self._kernels.functions["silu_and_mul"],
            (
                self._gate_up.data_ptr(),
                self._activated.data_ptr(),
                0,
                _packed(layer.down).shape[1],
                self._num_threads,
            ),
        )
        self._add_product(layer.down, self._activated, self._products)

    def _add_norm(self, norm: RMSNorm, x: int, is_first: bool) -> None:
        """The sum takes the place of the residual that it is made of."""
        residual = self._residual.data_ptr()
        self._table.add(
            CallKind.ADD_RMS_NORM,
            self._kernels.functions["add_rms_norm"],
            (
                *(x, None if is_first else residual, norm.wide_weight.data_ptr()),
                *(self._normed.data_ptr(), residual, 0, self._config.hidden_size),
                self._num_threads,
            ),
            norm.eps,
        )

    def _add_product(self, linear: object, x: torch.Tensor, y: torch.Tensor) -> None:
        kernel = _packed(linear)
        arguments = kernel.arguments(
            x.data_ptr(), self._workspace.data_ptr(), y.data_ptr(), 0, x.dtype, rounds=False
        )
        self._table.add(CallKind.PACKED_LINEAR, kernel.function, arguments)

    def _add_rotation(self, layer: DecoderLayer, cache: torch.Tensor) -> None:
        config = self._config
        keys, values = cache[0].data_ptr(), cache[1].data_ptr()
        norms = (layer.query_norm, layer.key_norm)
        self._table.add(
            CallKind.ROTATE_AND_CACHE,
            self._kernels.functions["rotate_and_cache"],
            (
                *(self._qkv.data_ptr(), 0, 0, 0, keys, values),
                *(0, config.num_heads, config.num_kv_heads, config.head_dim),
                *(None if norm is None else norm.wide_weight.data_ptr() for norm in norms),
                self._num_threads,
            ),
            config.rms_eps,
        )

    def _add_attention(self, cache: torch.Tensor) -> None:
        config = self._config
        self._table.add(
            CallKind.DECODE_ATTENTION,
            self._kernels.functions["decode_attention"],
            (
                *(self._qkv.data_ptr(), self._qkv.shape[1]),
                *(cache[0].data_ptr(), cache[1].data_ptr(), 0, 0, 0, cache.shape[2], 0),
                *(config.num_heads, config.num_kv_heads, config.head_dim, 0, 0),
                *(self._attended.data_ptr(), self._num_threads),
            ),
            config.head_dim**-0.5,
        )


def _packed(linear: object) -> PackedCpuKernel:
    assert isinstance(linear, Linear)
    kernel = linear.packed
    assert kernel is not None
    return kernel
