"""Linear layers: which kernel multiplies, chosen per device, shape and number of rows.

::

    weight of the checkpoint      few rows          many rows        batch-invariant rows
    groups, CPU                   packed            packed           packed
    4-bit groups, CPU, no g++     int4              dense            int4
    8-bit groups, CPU, no g++     int8 planes       dense            fixed tiles of bfloat16, or
                                                                     int8 planes
    4-bit groups, CUDA            int4              dense            fixed tiles of dense
    dense                         dense             dense            fixed tiles of dense

A dense bfloat16 weight on a CPU is held in oneDNN's own layout. "dense" beside a packed kernel is
a second copy of the weight; without memory for it the packed kernel does all. Where "few" ends is
measured once per shape and machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from serve_app.models.kernel_choices import kernel_choices
from serve_app.models.kernels.cpu_packed import (
    EXACT_ROWS,
    PackedCpuKernel,
    packed_cpu_kernel,
)
from serve_app.models.matmul import (
    DenseKernel,
    FixedTiles,
    Int4CpuKernel,
    Int8CpuKernel,
    Kernel,
    int_kernel,
    prepacked_kernel,
    row_invariant,
    skinny_kernel,
)
from serve_app.models.quantized import QuantizedWeight, concatenate
from serve_app.models.wide import wide_kernel

Weight = torch.Tensor | QuantizedWeight
Reduce = Callable[[torch.Tensor], None]
"""Sums a tensor over all ranks of a tensor-parallel network, in place."""

_MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64)
_PREFILL_ROWS = 2
_EVICTOR_ELEMENTS = 4 * 1024 * 1024
_DEFAULT_THRESHOLD = 8
_CARD_INT4_ROWS = 4
_CARD_SKINNY_ROWS = 1
_MEASURING_BUDGET_S = 1.0
_thresholds: dict[tuple[object, ...], int] = {}
_spent_s: dict[str, float] = {}
_tiles: dict[tuple[object, ...], tuple[int, bool]] = {}


@dataclass(frozen=True, slots=True)
class LinearPolicy:
    """How linear layers are made on `device`.

    `dtype` is that of activations. `dense_dtype` is that of dense weights: `dtype`, or float32 on a
    CPU that is slow at bfloat16. `keeps_packed` lets 4- and 8-bit weights stay as they are,
    `keeps_dense` allows a dense copy beside them.
    """

    device: torch.device
    dtype: torch.dtype
    dense_dtype: torch.dtype
    keeps_packed: bool = True
    keeps_dense: bool = True
    batch_invariant: bool = False


class Linear:
    """y = x · Wᵀ (+ bias), [T, K] → [T, N], by the kernel that suits T."""

    __slots__ = ("_few", "_invariant", "_many", "_threshold", "weight_format")

    def __init__(
        self, few: Kernel, many: Kernel, threshold: int, invariant: Kernel, weight_format: str
    ) -> None:
        self._few = few
        self._many = many
        self._threshold = threshold
        self._invariant = invariant
        self.weight_format = weight_format

    @property
    def nbytes(self) -> int:
        """Bytes of all copies of the weight."""
        kernels = {id(kernel): kernel.nbytes for kernel in (self._few, self._many)}
        return sum(kernels.values())

    @property
    def packed(self) -> PackedCpuKernel | None:
        """The kernel of up to `packed_rows` rows, where that is one that reads packed weights."""
        if isinstance(self._invariant, PackedCpuKernel):
            return self._invariant
        return self._few if isinstance(self._few, PackedCpuKernel) else None

    @property
    def packed_rows(self) -> int:
        """How many decode rows `packed` serves, of those that it computes exactly."""
        if self.packed is None:
            return 0
        serves_many = self._many is self._few or self._invariant is self.packed
        return EXACT_ROWS if serves_many else min(self._threshold, EXACT_ROWS)

    @property
    def has_two_widths(self) -> bool:
        """Whether a row's bits depend on the number of rows only by its being above `EXACT_ROWS`.

        Up to there they are also those of `row_invariant`.
        """
        kernel = self._many
        return self._few is kernel and isinstance(kernel, PackedCpuKernel)

    def read_bytes(self, num_rows: int) -> int:
        """Bytes of the weight that a product of `num_rows` rows reads."""
        kernel = self._few if num_rows <= self._threshold else self._many
        # a kernel without bytes of its own reads those of the copy beside it
        return kernel.nbytes or self.nbytes

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether a kernel multiplies by `weight` itself, not by a copy in another layout."""
        kernels = (self._few, self._many)
        return any(isinstance(k, DenseKernel) and k.weight is weight for k in kernels)

    def __call__(self, x: torch.Tensor, row_invariant: bool = False) -> torch.Tensor:
        """[T, K] → [T, N]; with `row_invariant` a row's result is the same bits in any batch."""
        if row_invariant:
            return self._invariant(x)
        if x.shape[0] <= self._threshold:
            return self._few(x)
        return self._many(x)


class RowParallelLinear:
    """A layer cut by columns: each rank's product is a part of the sum over all ranks.

    The sum is float32 and rounded at its end, as one card's product is; so are the parts where a
    kernel keeps them (`wide_kernel`), else they are rounded once before.
    """

    __slots__ = ("_linear", "_num_narrow_rows", "_reduce", "_wide", "weight_format")

    def __init__(self, linear: Linear, reduce: Reduce) -> None:
        self._linear = linear
        self._reduce = reduce
        self.weight_format = linear.weight_format
        dense = linear._many
        is_dense = isinstance(dense, DenseKernel)
        self._wide = wide_kernel(dense.weight, dense.bias) if is_dense else None
        is_packed = linear.weight_format != "dense"
        self._num_narrow_rows = linear._threshold if is_packed else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all copies of this rank's weight."""
        return self._linear.nbytes

    def read_bytes(self, num_rows: int) -> int:
        """Bytes of this rank's weight that a product of `num_rows` rows reads."""
        return self._linear.read_bytes(num_rows)

    def __call__(self, x: torch.Tensor, row_invariant: bool = False) -> torch.Tensor:
        """[T, K / ranks] → [T, N], the same on every rank."""
        if self._wide is not None and x.shape[0] > self._num_narrow_rows and not row_invariant:
            y = self._wide(x)
        else:
            y = self._linear(x, row_invariant).float()
        self._reduce(y)
        return y.to(x.dtype)


def make_linear(
    parts: Sequence[Weight], biases: Sequence[torch.Tensor | None], policy: LinearPolicy
) -> Linear:
    """Return one layer for weights [N_i, K] stacked by rows (as q, k, v or gate, up are)."""
    bias = _stack_biases(parts, biases)
    packed, weight_format = _packed_kernel(parts, bias, policy)
    dense: Kernel | None = None
    if packed is None or (policy.keeps_dense and not isinstance(packed, PackedCpuKernel)):
        stacked = _stack_dense(parts, policy)
        dense = prepacked_kernel(stacked, bias) or DenseKernel(stacked, bias)
    return _choose(packed, dense, parts[0].shape[1], weight_format, policy)


def make_packed_head(weight: Weight, policy: LinearPolicy) -> Linear | None:
    """Return an output layer that reads `weight` as it is packed, to exact float32 logits.

    None where the weight or the machine has no such kernel.
    """
    if policy.device.type != "cpu" or not policy.keeps_packed:
        return None
    if not isinstance(weight, QuantizedWeight):
        return None
    kernel = packed_cpu_kernel(weight, has_wide_output=True)
    if kernel is None:
        return None
    return _choose(kernel, None, weight.shape[1], f"int{weight.bits}", policy)


def make_head(weight: Weight, dense: torch.Tensor, policy: LinearPolicy) -> Linear:
    """Return the output layer, where `dense` is its dense form (shared with a tied embedding)."""
    prepacked = prepacked_kernel(dense, None) if policy.keeps_dense else None
    if prepacked is not None and not (isinstance(weight, QuantizedWeight) and weight.bits == 4):
        # As fast at one row as two planes of 4 bits, and faster beyond.
        return _choose(None, prepacked, weight.shape[1], "dense", policy)
    packed, weight_format = _packed_kernel([weight], None, policy)
    return _choose(packed, prepacked or DenseKernel(dense), weight.shape[1], weight_format, policy)


def _choose(
    packed: Kernel | None,
    dense: Kernel | None,
    num_columns: int,
    weight_format: str,
    policy: LinearPolicy,
) -> Linear:
    few: Kernel | None = packed or dense
    many: Kernel | None = dense or packed
    if packed is None and isinstance(dense, DenseKernel) and not policy.batch_invariant:
        few = skinny_kernel(dense) or dense
    assert few is not None
    assert many is not None
    if few is many:
        threshold = 0
    elif policy.device.type != "cpu":
        # Launches from Python hide a card's kernel times: what its benchmark shows stands here.
        threshold = _CARD_INT4_ROWS if packed is few else _CARD_SKINNY_ROWS
    elif policy.batch_invariant:
        # A measured choice could differ between two starts or replicas; this one cannot.
        threshold = _PREFILL_ROWS
    else:
        threshold = _measure_threshold(few, many, num_columns, policy)
    invariant = many
    if policy.batch_invariant:
        is_slow = policy.dense_dtype is torch.float32
        if isinstance(packed, PackedCpuKernel):
            invariant = packed.row_invariant()
        elif isinstance(packed, Int4CpuKernel) or (
            isinstance(packed, Int8CpuKernel) and (dense is None or is_slow)
        ):
            invariant = packed
        else:
            invariant = _fixed_tiles(many, num_columns, policy)
    return Linear(few, many, threshold, invariant, weight_format)


def _fixed_tiles(kernel: Kernel, num_columns: int, policy: LinearPolicy) -> FixedTiles:
    """`row_invariant`, tried once per shape."""
    key = (
        str(policy.device),
        policy.dtype,
        type(kernel),
        kernel.nbytes,
        num_columns,
        torch.get_num_threads(),
    )
    if key not in _tiles:
        tiles = row_invariant(kernel, num_columns, policy.device, policy.dtype)
        _tiles[key] = tiles.tile_rows, tiles.pads
    tile_rows, pads = _tiles[key]
    return FixedTiles(kernel, tile_rows, pads=pads)


def _packed_kernel(
    parts: Sequence[Weight], bias: torch.Tensor | None, policy: LinearPolicy
) -> tuple[Kernel | None, str]:
    """The kernel that multiplies quantised parts as they are, if there is one, and its format."""
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if not policy.keeps_packed or len(quantized) < len(parts):
        return None, "dense"
    weight = concatenate(quantized) if len(quantized) > 1 else quantized[0]
    kernel = int_kernel(weight, policy.device, bias)
    return kernel, "dense" if kernel is None else f"int{weight.bits}"


def _stack_dense(parts: Sequence[Weight], policy: LinearPolicy) -> torch.Tensor:
    """One dense matrix; each part is copied once, straight from the file's mapping."""
    if len(parts) == 1 and isinstance(parts[0], torch.Tensor):
        return parts[0].to(policy.device, policy.dense_dtype)
    num_rows = sum(part.shape[0] for part in parts)
    stacked = torch.empty(
        num_rows, parts[0].shape[1], dtype=policy.dense_dtype, device=policy.device
    )
    start = 0
    for part in parts:
        end = start + part.shape[0]
        if isinstance(part, QuantizedWeight):
            part = part.dequantize(policy.dense_dtype)
        stacked[start:end] = part
        start = end
    return stacked


def _stack_biases(
    parts: Sequence[Weight], biases: Sequence[torch.Tensor | None]
) -> torch.Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    device = given[0].device
    return torch.cat(
        [
            torch.zeros(part.shape[0], device=device) if bias is None else bias.float()
            for part, bias in zip(parts, biases, strict=True)
        ]
    )


def _measure_threshold(
    packed: Kernel, dense: Kernel, num_columns: int, policy: LinearPolicy
) -> int:
    """The most rows at which `packed` is faster than `dense` (0: never).

    On a machine too busy to measure within the budget, what an idle one mostly gives.
    """
    key = (
        str(policy.device),
        policy.dtype,
        policy.dense_dtype,
        type(packed),
        packed.nbytes,
        num_columns,
        torch.get_num_threads(),
    )
    if key in _thresholds:
        return _thresholds[key]
    choices = kernel_choices() if policy.device.type == "cpu" else None
    name = " ".join(map(str, (*key[:3], type(packed).__name__, type(dense).__name__, *key[4:])))
    if choices is not None and (known := choices.get(name)) is not None:
        _thresholds[key] = known
        return known
    if _spent_s.get("measuring", 0.0) > _MEASURING_BUDGET_S:
        return _DEFAULT_THRESHOLD
    start = time.perf_counter()
    _thresholds[key] = _search_threshold(packed, dense, num_columns, policy)
    _spent_s["measuring"] = _spent_s.get("measuring", 0.0) + time.perf_counter() - start
    if choices is not None:
        choices.put(name, _thresholds[key])
    return _thresholds[key]


def _search_threshold(packed: Kernel, dense: Kernel, num_columns: int, policy: LinearPolicy) -> int:
    """Bisect `_MEASURED_ROWS`: once dense wins it keeps winning, as it grows slower with rows."""
    low, high = 0, len(_MEASURED_ROWS)
    while low < high:
        middle = (low + high) // 2
        shape = (_MEASURED_ROWS[middle], num_columns)
        x = torch.randn(shape, device=policy.device, dtype=policy.dtype)
        if _seconds(packed, x) <= _seconds(dense, x):
            low = middle + 1
        else:
            high = middle
    return _MEASURED_ROWS[low - 1] if low else 0


def _seconds(kernel: Kernel, x: torch.Tensor, num_runs: int = 3) -> float:
    """The shortest of a few runs; on a CPU with cold caches, as between layers of a model."""
    kernel(x)
    is_cpu = x.device.type == "cpu"
    evictor = torch.zeros(_EVICTOR_ELEMENTS if is_cpu else 0)
    best = float("inf")
    for _ in range(num_runs):
        evictor += 1
        _synchronize(x.device)
        start = time.perf_counter()
        kernel(x)
        _synchronize(x.device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
