"""Kernels of x · Wᵀ (+ bias), dense, 4-bit and 8-bit: x [T, K] → [T, N] in x's dtype."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F

from serve_app.hardware.cpu import read_cpu_info
from serve_app.models.kernels._triton import has_kernel
from serve_app.models.kernels.cpu_packed import packed_cpu_kernel
from serve_app.models.kernels.gemv import skinny_linear
from serve_app.models.kernels.int4_gemv import arrange_int4, int4_linear
from serve_app.models.kernels.int4_pack import pack_int4
from serve_app.models.quantized import GROUP_SIZE, QuantizedWeight

TILE_SIZES = (32, 16, 8, 4, 1)
"""Rows of a call in `FixedTiles`, best first: 32 take a dense kernel about as long as 1."""

_CPU_INT4_ROW_MULTIPLE = 16
_INNER_K_TILES = 8
_NUM_DRAWS = 3
_MOST_DRAWS = 64
_COMPARED_OUTPUTS = 20_000
"""Outputs of a draw that are compared, where there are so many: sums in another order show, after
they are rounded to bfloat16, in one of some 5,000."""
_PREPACKED_FOR_ROWS = 32
_ALIGNMENT = 64


class Kernel(Protocol):
    """One way to multiply by a weight."""

    nbytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        ...


class DenseKernel:
    """F.linear in the weight's own dtype."""

    __slots__ = ("bias", "nbytes", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = None if bias is None else bias.to(weight.device, weight.dtype)
        self.nbytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class PrepackedKernel:
    """oneDNN's bfloat16 product with a weight that is laid out for it once, not at each call.

    On a CPU with AMX its bits are those of F.linear, in about two thirds of the time (30 layers of
    SmolLM2-135M, 2 cores: 12.8 against 18.4 ms at 8 rows, 24 against 33 ms at 128).
    """

    __slots__ = ("_bias", "_packed", "nbytes")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PREPACKED_FOR_ROWS)
        self._bias = None if bias is None else bias.to(weight.dtype)
        self.nbytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(torch.bfloat16), self._packed, self._bias, "none", [], ""
        )
        return y.to(x.dtype)


class FixedTiles:
    """Calls another kernel on at most `tile_rows` rows at a time.

    So a row's result depends neither on how many rows there are nor on what they hold, as long as
    the kernel treats all rows of one call alike: see `row_invariant`. `pads` fills the last tile
    up, for kernels that choose their code by the number of rows.
    """

    __slots__ = ("_kernel", "nbytes", "pads", "tile_rows")

    def __init__(
        self, kernel: Kernel, tile_rows: int = TILE_SIZES[0], *, pads: bool = True
    ) -> None:
        self._kernel = kernel
        self.tile_rows = tile_rows
        self.pads = pads
        self.nbytes = kernel.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        num_rows = x.shape[0]
        missing = -num_rows % self.tile_rows if self.pads else 0
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        if num_rows <= self.tile_rows:
            y = self._kernel(x if missing else _aligned(x))
            return y[:num_rows] if missing else y
        # A kernel may choose its code by where a row lies in memory.
        tiles = [self._kernel(_aligned(tile)) for tile in torch.split(x, self.tile_rows)]
        return torch.cat(tiles)[:num_rows]


def row_invariant(
    kernel: Kernel, num_columns: int, device: torch.device, dtype: torch.dtype
) -> FixedTiles:
    """`kernel` on the largest tile in which a row's place makes no difference.

    Libraries may cut a tile between threads so that its rows run through different code (MKL's
    float32 does on 16 threads); that shows in the last bits when the rows change places. A tile of
    one row is always fixed. Holds for the number of threads set now.
    """
    num_outputs = kernel(torch.zeros(1, num_columns, device=device, dtype=dtype)).shape[1]
    for tile_rows in TILE_SIZES:
        shape = (tile_rows, num_columns)
        num_draws = _NUM_DRAWS * _COMPARED_OUTPUTS // (tile_rows * num_outputs)
        num_draws = min(max(num_draws, _NUM_DRAWS), _MOST_DRAWS)
        draws = [torch.randn(shape, device=device, dtype=dtype) for _ in range(num_draws)]
        if all(_is_fixed(kernel, x) for x in draws):
            # Every smaller number of rows is tried: where all give the tile's bits, none is padded.
            # A card's time is that of the whole tile anyway.
            pads = device.type != "cpu" or not all(_takes_fewer(kernel, x) for x in draws)
            return FixedTiles(kernel, tile_rows, pads=pads)
    raise AssertionError("a tile of one row cannot depend on the row's place")


def _is_fixed(kernel: Kernel, x: torch.Tensor) -> bool:
    """Whether rows have the same bits in other places of the tile."""
    y = kernel(x)
    # Two shifts link each place to its neighbours, and with them all places.
    return all(torch.equal(kernel(x.roll(shift, 0)), y.roll(shift, 0)) for shift in (1, 7))


def _takes_fewer(kernel: Kernel, x: torch.Tensor) -> bool:
    """Whether rows have the same bits among fewer of them."""
    y = kernel(x)
    num_compared = min(len(x), -(-_COMPARED_OUTPUTS // y.shape[1]))
    return all(
        torch.equal(kernel(_aligned(x[start : start + num_rows])), y[start : start + num_rows])
        for num_rows in range(1, len(x))
        for start in range(0, max(1, num_compared), num_rows)
    )


def prepacked_kernel(weight: torch.Tensor, bias: torch.Tensor | None) -> Kernel | None:
    """`PrepackedKernel` where this build and CPU have it for the weight, or None."""
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or not _has_prepacked():
        return None
    return PrepackedKernel(weight, bias)


@cache
def _has_prepacked() -> bool:
    """Whether oneDNN multiplies a small prepacked matrix correctly; tried once per process."""
    if not read_cpu_info().has_fast_bfloat16:
        return False
    weight = (torch.arange(64 * 64) % 7 - 3.0).view(64, 64).to(torch.bfloat16)
    x = (torch.arange(3 * 64) % 5 - 2.0).view(3, 64).to(torch.bfloat16)
    try:
        y = PrepackedKernel(weight)(x)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool(torch.allclose(y.float(), x.float() @ weight.float().T, rtol=0.02))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


class Int4CpuKernel:
    """ATen's CPU kernel for 4-bit groups. Rows do not influence each other, whatever their number.

    It computes (code - 8) · scale + zero with bfloat16 scales, zeros and activations; activations
    in float32 would take a scalar path.
    """

    __slots__ = ("_bias", "_packed", "_scales_zeros", "nbytes")

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
        codes = weight.codes.to(torch.int32)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._scales_zeros = _scales_zeros(weight.scales, weight.offsets + 8 * weight.scales)
        self._bias = None if bias is None else bias.to(torch.bfloat16)
        self.nbytes = self._packed.nbytes + self._scales_zeros.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16), self._packed, GROUP_SIZE, self._scales_zeros
        )
        if self._bias is not None:
            y += self._bias
        return y.to(x.dtype)


class Int8CpuKernel:
    """8-bit groups, exactly, as two planes of 4-bit codes side by side along K: 16 · high + low.

    ATen's own 8-bit kernel knows one scale per row only, which costs 1.2 % on Q8_0 weights.
    """

    __slots__ = ("_planes", "nbytes")

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
        high, low = (weight.codes >> 4) + 8, weight.codes & 15
        scales = torch.cat((16 * weight.scales, weight.scales), dim=1)
        # (high - 8) · 16 s needs no zero; low · s + offset is (low - 8) · s + (8 s + offset),
        # and the kernel adds 8 s itself where the group's offset is stated.
        offsets = torch.cat((-128 * weight.scales, weight.offsets), dim=1)
        planes = QuantizedWeight(4, torch.cat((high, low), dim=1), scales, offsets)
        self._planes = Int4CpuKernel(planes, bias)
        self.nbytes = self._planes.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        return self._planes(torch.cat((x, x), dim=1))


class SkinnyKernel:
    """Reads a dense weight once for few rows, where the card has our kernel for it."""

    __slots__ = ("_bias", "_weight", "nbytes")

    def __init__(self, dense: DenseKernel) -> None:
        self._weight = dense.weight
        self._bias = dense.bias
        self.nbytes = 0  # the weight is `dense`'s, and counted there

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        return skinny_linear(x, self._weight, self._bias)


class Int4GroupKernel:
    """Our 4-bit kernel for cards, float16 scales, in groups as wide as the checkpoint has them."""

    __slots__ = ("_bias", "_weight", "nbytes")

    def __init__(
        self, weight: QuantizedWeight, device: torch.device, bias: torch.Tensor | None = None
    ) -> None:
        each = weight.shared_groups()  # of their scales one is kept: fewer bytes to read
        scales = weight.scales[:, ::each].to(device)
        # A group without a step holds one value: codes of 0 with that value as zero say so.
        is_flat = scales == 0
        steps = scales.masked_fill(is_flat, 1.0)
        zeros = -weight.offsets[:, ::each].to(device) / steps
        codes = weight.codes.to(device).view(*scales.shape, -1).masked_fill(is_flat[..., None], 0)
        self._weight = arrange_int4(pack_int4(codes.flatten(1), steps.T, zeros.T))
        self._bias = None if bias is None else bias.to(device, torch.bfloat16)
        self.nbytes = self._weight.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        bias = self._bias if self._bias is None else self._bias.to(x.dtype)
        return int4_linear(x, self._weight, bias)


class Int4DeviceKernel:
    """ATen's 4-bit kernel of CUDA (and of XPU where torch has it), bfloat16."""

    __slots__ = ("_bias", "_packed", "_scales_zeros", "nbytes")

    def __init__(
        self, weight: QuantizedWeight, device: torch.device, bias: torch.Tensor | None = None
    ) -> None:
        codes = weight.codes.to(device).view(torch.uint8)
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
        self._packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES)
        zeros = weight.offsets + 8 * weight.scales
        self._scales_zeros = _scales_zeros(weight.scales, zeros).to(device)
        self._bias = None if bias is None else bias.to(device, torch.bfloat16)
        self.nbytes = self._packed.nbytes + self._scales_zeros.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N]."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
            x.to(torch.bfloat16), self._packed, GROUP_SIZE, self._scales_zeros
        )
        if self._bias is not None:
            y += self._bias
        return y.to(x.dtype)


def int_kernel(
    weight: QuantizedWeight, device: torch.device, bias: torch.Tensor | None
) -> Kernel | None:
    """The kernel that multiplies by `weight` as it is packed, or None where the device has none."""
    num_rows, num_columns = weight.shape
    if device.type == "cpu":
        if (kernel := packed_cpu_kernel(weight, bias)) is not None:
            return kernel
        if num_rows % _CPU_INT4_ROW_MULTIPLE or num_columns % GROUP_SIZE:
            return None
        return (Int4CpuKernel if weight.bits == 4 else Int8CpuKernel)(weight, bias)
    if weight.bits == 4 and num_columns % GROUP_SIZE == 0 and _has_card_kernel("int4", device):
        try:
            return Int4GroupKernel(weight, device, bias)
        except ValueError:  # a zero beyond float16: a group far from 0 and almost constant
            return None
    fits = num_rows % 8 == 0 and num_columns % (16 * _INNER_K_TILES) == 0
    if weight.bits == 4 and fits and _has_int4(device):
        return Int4DeviceKernel(weight, device, bias)
    return None


def skinny_kernel(dense: DenseKernel) -> Kernel | None:
    """The kernel that is faster than `dense` at one row, or None where the device has none."""
    is_held_as_is = dense.weight.dtype in (torch.bfloat16, torch.float16)
    if is_held_as_is and _has_card_kernel("gemv", dense.weight.device):
        return SkinnyKernel(dense)
    return None


def _has_card_kernel(name: str, device: torch.device) -> bool:
    return has_kernel(name, torch.empty(0, device=device))


_INT4_DEVICES: dict[str, bool] = {}


def _has_int4(device: torch.device) -> bool:
    """Whether the device multiplies a small 4-bit matrix correctly; tried once per device type."""
    if device.type not in _INT4_DEVICES:
        _INT4_DEVICES[device.type] = _try_int4(device)
    return _INT4_DEVICES[device.type]


def _try_int4(device: torch.device) -> bool:
    codes = (torch.arange(64 * 256) * 7 % 16).view(64, 256).to(torch.int8)
    scales = torch.full((64, 256 // GROUP_SIZE), 0.125)
    weight = QuantizedWeight(4, codes, scales, -scales)
    x = (torch.arange(4 * 256) % 5 - 2.0).view(4, 256)
    expected = x @ weight.dequantize(torch.float32).T
    try:
        y = Int4DeviceKernel(weight, device)(x.to(device, torch.bfloat16)).float().cpu()
    except (RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(y, expected, rtol=0.02, atol=0.5))


def _scales_zeros(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """bfloat16 [K / 32, N, 2], the layout of ATen's 4-bit kernels."""
    pairs = torch.stack((scales, zeros), dim=-1)
    return pairs.transpose(0, 1).to(torch.bfloat16).contiguous()
