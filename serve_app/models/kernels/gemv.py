"""Dense products of at most four rows with a weight matrix, bound by the reading of the weights.

Each program keeps a few rows of the weight and lets its threads span the K dimension, so that each
load is 16 bytes a thread and no second kernel joins partial sums.
"""

import torch
import torch.nn.functional as F

from serve_app.models.kernels._triton import (
    cdiv,
    has_kernel,
    num_compute_units,
    overlap_options,
    tl,
    triton,
    wait_for_inputs,
)

MAX_ROWS = 4
_VECTOR = 8  # two-byte elements in a 16-byte load


def skinny_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[M, K] · [N, K]ᵀ + [N] → [M, N], one dtype, sums in float32, which `out_dtype` can keep.

    More than four rows, a K that 8 doesn't divide and rows that aren't dense go to F.linear.
    """
    num_rows, depth = hidden.shape
    is_dense = depth % _VECTOR == 0 and hidden.stride(1) == weight.stride(1) == 1
    if not 1 <= num_rows <= MAX_ROWS or not is_dense or not has_kernel("gemv", hidden):
        return F.linear(hidden, weight, bias).to(out_dtype or hidden.dtype)
    size = weight.shape[0]
    output = torch.empty((num_rows, size), dtype=out_dtype or hidden.dtype, device=hidden.device)
    rows = rows_per_program(size, num_compute_units(hidden.device), 4)
    _gemv_kernel[(cdiv(size, rows),)](
        hidden, weight, weight if bias is None else bias, output,
        size, depth, hidden.stride(0), weight.stride(0),
        M=num_rows, HAS_BIAS=bias is not None, ROWS=rows, LANES=128, VECTOR=_VECTOR, num_warps=4,
        **overlap_options(hidden),
    )  # fmt: skip
    return output


def rows_per_program(size: int, num_units: int, most: int) -> int:
    """Return a power of two ≤ most of weight rows a program, the most with four programs a unit."""
    rows = most
    while rows > 1 and size // rows < 4 * num_units:
        rows //= 2
    return rows


@triton.jit
def _partial(weight, hidden_ptr, columns, mask):
    hidden = tl.load(hidden_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(weight * hidden, axis=2)


@triton.jit
def _finish(sums, bias_ptr, output_ptr, rows, in_range, HAS_BIAS: tl.constexpr):
    result = tl.sum(sums, axis=0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=in_range, other=0.0).to(tl.float32)
    tl.store(output_ptr + rows, result.to(output_ptr.dtype.element_ty), mask=in_range)


@triton.jit
def _gemv_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    size,
    depth,
    hidden_stride,
    weight_stride,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = rows < size
    # lanes come first in the shape: the compiler then lays a warp along them, not across rows
    lanes = tl.arange(0, LANES)[:, None, None] * VECTOR
    inner = lanes + tl.arange(0, VECTOR)[None, None, :]
    base = weight_ptr + rows.to(tl.int64)[None, :, None] * weight_stride
    sums0 = tl.zeros([LANES, ROWS], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(0, depth, LANES * VECTOR):
        columns = first + inner
        # `lanes` is what the mask asks about, a whole vector at a time, so loads stay 16 bytes
        mask = first + lanes < depth
        weight_mask = mask & in_range[None, :, None]
        weight = tl.load(base + columns, mask=weight_mask, other=0.0).to(tl.float32)
        if first == 0:  # the first weights are on their way while the inputs are made
            wait_for_inputs(OVERLAPS)
        sums0 += _partial(weight, hidden_ptr, columns, mask)
        if M > 1:
            sums1 += _partial(weight, hidden_ptr + hidden_stride, columns, mask)
        if M > 2:
            sums2 += _partial(weight, hidden_ptr + 2 * hidden_stride, columns, mask)
        if M > 3:
            sums3 += _partial(weight, hidden_ptr + 3 * hidden_stride, columns, mask)
    _finish(sums0, bias_ptr, output_ptr, rows, in_range, HAS_BIAS)
    if M > 1:
        _finish(sums1, bias_ptr, output_ptr + size, rows, in_range, HAS_BIAS)
    if M > 2:
        _finish(sums2, bias_ptr, output_ptr + 2 * size, rows, in_range, HAS_BIAS)
    if M > 3:
        _finish(sums3, bias_ptr, output_ptr + 3 * size, rows, in_range, HAS_BIAS)
