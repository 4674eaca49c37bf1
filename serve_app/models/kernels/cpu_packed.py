"""Products with 4- and 8-bit groups on a CPU, read as they are packed: `cpu_packed.cpp`.

Sums are float32 over whole-numbered codes and each group's sum is scaled, so that no weight is
rounded and a row's result depends on nothing but the row. bfloat16 activations are multiplied by
the best that the processor has (`Means`), float32 ones by vectors. With dot products or tiles, and
more than 32 rows, it is faster to round the weights to bfloat16, as a dense copy would have them.
"""

from __future__ import annotations

import copy
import ctypes
import enum
import functools
from pathlib import Path

import torch

from serve_app.models.kernels._triton import disabled_kernels
from serve_app.models.kernels.cpu_library import load_library
from serve_app.models.quantized import GROUP_SIZE, QuantizedWeight

_SOURCE = Path(__file__).with_name("cpu_packed.cpp")
_LANES = 16
_PANEL_ROWS = 128
EXACT_ROWS = 32
"""Rows up to which a weight is never rounded."""


class Means(enum.IntEnum):
    """What multiplies bfloat16: vectors of float32, AVX-512's dot products, or AMX's tiles.

    The fewest rows go through vectors where there are tiles too, with the bits of tiles.
    """

    VECTORS = 0
    DOTS = 1
    TILES = 2


_POINTER, _INT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class PackedCpuKernel:
    """x [T, K] → [T, N] by a packed weight; float32 and bfloat16 activations are not rounded.

    More than `EXACT_ROWS` rows may meet rounded weights, but in `row_invariant()` and for a wide
    output.

    Args:
        weight: [N, K], both fit for `takes`.
        bias: [N] or None.
        has_wide_output: the result is float32, whatever x is.
    """

    __slots__ = (
        "_bias",
        "_bits",
        "_codes",
        "_has_wide_scales",
        "_offsets",
        "_rounds",
        "_scales",
        "_wider",
        "function",
        "has_wide_output",
        "means",
        "nbytes",
        "shape",
    )

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        *,
        has_wide_output: bool,
    ) -> None:
        self.function = library.packed_linear
        self.means = Means(library.best_means())
        self.has_wide_output = has_wide_output
        self._rounds = self.means is not Means.VECTORS and not has_wide_output
        self.shape = weight.shape
        self._bits = weight.bits
        self._codes = _arranged_codes(weight)
        each = weight.shared_groups()
        self._wider = each.bit_length() - 1
        scales, offsets = (_by_blocks(x[:, ::each]) for x in (weight.scales, weight.offsets))
        narrow = scales.half(), offsets.half()
        self._has_wide_scales = not (
            torch.equal(narrow[0].float(), scales) and torch.equal(narrow[1].float(), offsets)
        )
        self._scales, kept = (scales, offsets) if self._has_wide_scales else narrow
        self._offsets = kept if bool(kept.any()) else None
        self._bias = None if bias is None else bias.float().contiguous()
        held = (self._codes, self._scales, self._offsets)
        self.nbytes = sum(part.nbytes for part in held if part is not None)

    @staticmethod
    def takes(weight: QuantizedWeight) -> bool:
        """Whether the rows are whole blocks of 16 and the columns whole groups."""
        return weight.shape[0] % _LANES == 0 and weight.shape[1] % GROUP_SIZE == 0

    def row_invariant(self) -> PackedCpuKernel:
        """The same weight, for which a row has the same bits among any number of rows."""
        kernel = copy.copy(self)
        kernel._rounds = False
        return kernel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] → [T, N], in x's type or float32."""
        dtype = x.dtype
        if dtype is not torch.bfloat16:
            x = x.float()
        x = x.contiguous()
        num_rows, (num_outputs, num_columns) = x.shape[0], self.shape
        is_wide = self.has_wide_output or x.dtype is torch.float32
        y = torch.empty((num_rows, num_outputs), dtype=torch.float32 if is_wide else x.dtype)
        workspace = torch.empty(workspace_size(num_rows, num_columns))
        addresses = (x.data_ptr(), workspace.data_ptr(), y.data_ptr())
        rounds = self._rounds and num_rows > EXACT_ROWS and x.dtype is torch.bfloat16
        self.function(*self.arguments(*addresses, num_rows, x.dtype, rounds=rounds), None)
        return y if self.has_wide_output else y.to(dtype)

    def arguments(
        self, x: int, workspace: int, y: int, num_rows: int, dtype: torch.dtype, *, rounds: bool
    ) -> tuple[int | None, ...]:
        """What `function` takes for x [T, K] of `dtype` at an address, and y [T, N] at another.

        A team's member, or None, comes after it.

        `workspace`: the address of `workspace_size` floats.
        """
        is_float32 = dtype is torch.float32
        return (
            x,
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            None if self._offsets is None else self._offsets.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            workspace,
            y,
            num_rows,
            self.shape[1],
            self.shape[0],
            self._bits,
            self._wider,
            is_float32,
            self.has_wide_output or is_float32,
            self._has_wide_scales,
            self.means,
            rounds,
            torch.get_num_threads(),
        )


def workspace_size(num_rows: int, num_columns: int) -> int:
    """Floats that a product of so many rows and columns needs on its way."""
    num_sums = num_columns // GROUP_SIZE
    panel = min(num_rows, _PANEL_ROWS) * (num_columns + num_sums)
    return max(panel, num_rows * (num_columns // 2 + num_sums))  # all rows as bfloat16: for dots


def packed_cpu_kernel(
    weight: QuantizedWeight, bias: torch.Tensor | None = None, *, has_wide_output: bool = False
) -> PackedCpuKernel | None:
    """The kernel for a weight, or None where its shape or this machine has none."""
    if not PackedCpuKernel.takes(weight) or "cpu_packed" in disabled_kernels():
        return None
    library = _library()
    if library is None:
        return None
    return PackedCpuKernel(library, weight, bias, has_wide_output=has_wide_output)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_library(_SOURCE)
    if library is not None:
        library.packed_linear.restype = None
        library.packed_linear.argtypes = [*[_POINTER] * 7, *[_INT] * 3, *[_FLAG] * 8, _POINTER]
    return library


def _arranged_codes(weight: QuantizedWeight) -> torch.Tensor:
    """Codes in the order of `cpu_packed.cpp`, uint8."""
    num_blocks, num_groups = weight.shape[0] // _LANES, weight.shape[1] // GROUP_SIZE
    blocks = weight.codes.view(num_blocks, _LANES, num_groups, GROUP_SIZE)
    if weight.bits == 8:
        return blocks.permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    # [block, n, group, q, j, p] → [block, group, q, n, p, j]: the four codes of a word together
    codes = blocks.view(*blocks.shape[:3], 4, 4, 2).permute(0, 2, 3, 1, 5, 4)
    pairs = codes.contiguous().view(torch.uint8).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def _by_blocks(groups: torch.Tensor) -> torch.Tensor:
    """[N, G] → [N / 16, G, 16]."""
    return groups.reshape(-1, _LANES, groups.shape[1]).transpose(1, 2).contiguous()
