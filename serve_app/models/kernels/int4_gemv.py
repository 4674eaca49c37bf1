"""Products with a group-wise INT4 weight: few rows straight from the nibbles, many through a dense
copy.

A nibble becomes a float without a conversion: set as mantissa bits 19..22 of 1.0 it reads 1 + q/16,
as bits 15..18 it reads 1 + q/256. A shift serves two nibbles, the constant parts are taken off
once per run of 32.
"""

import torch
import torch.nn.functional as F

from serve_app.models.kernels._triton import (
    cdiv,
    has_kernel,
    next_power_of_2,
    num_compute_units,
    overlap_options,
    tl,
    triton,
    wait_for_inputs,
)
from serve_app.models.kernels.gemv import rows_per_program
from serve_app.models.kernels.int4_mma import can_use_mma, has_mma, int4_mma
from serve_app.models.kernels.int4_pack import (
    Int4Weight,
    can_tile,
    dequantize_int4_torch,
    int4_linear_torch,
    tile_int4,
)

MAX_VECTOR_ROWS = 4
MAX_FUSED_ROWS = 128
_BLOCK_SIZE_N = 64
_BLOCK_WORDS = 16
_ONE_BITS = 0x3F800000  # 1.0 as float32


def arrange_int4(weight: Int4Weight) -> Int4Weight:
    """Return the weight in the order that the kernels of its device read fastest."""
    is_wanted = has_kernel("int4", weight.words) and has_mma(weight.words.device)
    return tile_int4(weight) if is_wanted and can_tile(weight) else weight


def int4_linear(
    hidden: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """[M, K] · [N, K]ᵀ + [N] → [M, N] in hidden's dtype, sums in float32.

    Up to 4 rows go to the tensor cores where those take them, else to a vector product; up to 128
    to a product that unpacks as it goes; more to the dense copy and the library's product.
    """
    if not has_kernel("int4", hidden):
        return int4_linear_torch(hidden, weight, bias)
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if can_use_mma(hidden):
        return int4_mma(hidden, weight, bias)
    if hidden.shape[0] <= MAX_VECTOR_ROWS and not weight.is_tiled:
        return int4_gemv(hidden, weight, bias)
    if hidden.shape[0] <= MAX_FUSED_ROWS:
        return int4_matmul(hidden, weight, bias)
    return F.linear(hidden, dequantize_int4(weight, hidden.dtype), bias)


def int4_gemv(
    hidden: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """int4_linear by the vector kernel: 1 to 4 rows, a weight row by row; no twin behind it."""
    assert not weight.is_tiled
    num_rows, size = hidden.shape[0], weight.out_features
    output = torch.empty((num_rows, size), dtype=hidden.dtype, device=hidden.device)
    if num_rows == 0:
        return output
    most = {1: 8, 2: 4}.get(num_rows, 2)  # as many as the registers hold
    rows = rows_per_program(size, num_compute_units(hidden.device), most)
    lanes = 64 if rows == 8 else 128
    _int4_gemv_kernel[(cdiv(size, rows),)](
        hidden, weight.words, weight.scale_zero, output if bias is None else bias, output,
        size, weight.in_features, hidden.stride(0), weight.scale_zero.stride(1), _ONE_BITS,
        M=num_rows, HAS_BIAS=bias is not None, RUNS_PER_GROUP=weight.group_size // 32,
        ROWS=rows, LANES=lanes, num_warps=lanes // 32, **overlap_options(hidden),
    )  # fmt: skip
    return output


def int4_matmul(
    hidden: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """int4_linear by the matrix kernel: a few to some hundred rows; no twin behind it."""
    num_rows, size = hidden.shape[0], weight.out_features
    output = torch.empty((num_rows, size), dtype=hidden.dtype, device=hidden.device)
    if num_rows == 0:
        return output
    block_rows = min(64, max(16, next_power_of_2(num_rows)))
    blocks = cdiv(size, _BLOCK_SIZE_N) * cdiv(num_rows, block_rows)
    steps = cdiv(weight.in_features, 8 * _BLOCK_WORDS)
    splits = matmul_splits(blocks, steps, num_compute_units(hidden.device))
    partial = output
    if splits > 1:
        partial = torch.empty((splits, num_rows, size), dtype=torch.float32, device=hidden.device)
    has_bias = bias is not None and splits == 1
    grid = (cdiv(size, _BLOCK_SIZE_N), cdiv(num_rows, block_rows), splits)
    _int4_matmul_kernel[grid](
        hidden, weight.words, weight.scale_zero, bias if has_bias else output, partial,
        num_rows, size, weight.in_features, hidden.stride(0), cdiv(steps, splits),
        HAS_BIAS=has_bias, GROUP=weight.group_size, TILED=weight.is_tiled,
        BLOCK_M=block_rows, BLOCK_N=_BLOCK_SIZE_N,
        BLOCK_W=_BLOCK_WORDS, PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=2 if not hidden.is_cuda else 3 if block_rows > 32 else 4,
    )  # fmt: skip
    if splits > 1:
        _sum_splits_kernel[(cdiv(size, 512), num_rows)](
            partial, output if bias is None else bias, output, num_rows * size, size,
            SPLITS=splits, HAS_BIAS=bias is not None, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return output


def matmul_splits(num_blocks: int, num_steps: int, num_units: int) -> int:
    """Return 1, 2, 4 or 8 cuts of K: the fewest with two programs a unit, each of ≥ 4 steps."""
    for splits in (1, 2, 4, 8):
        if num_blocks * splits >= 2 * num_units or num_steps // (2 * splits) < 4:
            return splits
    return 8


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return the dense [N, K]."""
    if not has_kernel("int4", weight.words):
        return dequantize_int4_torch(weight, dtype)
    size, depth = weight.out_features, weight.in_features
    dense = torch.empty((size, depth), dtype=dtype, device=weight.words.device)
    _dequantize_kernel[(size, cdiv(depth, 4096))](
        weight.words, weight.scale_zero, dense, depth, RUNS_PER_GROUP=weight.group_size // 32,
        TILED=weight.is_tiled, LANES=128, num_warps=4,
    )  # fmt: skip
    return dense


@triton.jit
def _nibble(words, one_bits, INDEX: tl.constexpr):
    # odd nibbles: 1 + q/16, even ones: 1 + q/256 (float32 bit patterns)
    if INDEX // 2 == 3:
        moved = words >> 9
    elif INDEX // 2 == 2:
        moved = words >> 1
    elif INDEX // 2 == 1:
        moved = words << 7
    else:
        moved = words << 15
    mask: tl.constexpr = 0x00780000 if INDEX % 2 == 1 else 0x00078000
    bits = (moved & mask) | one_bits
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scale_and_zero(pair):
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def _run_products(words, scale, zero, hidden_ptr, columns, mask, one_bits):
    # scale · Σ (q − zero) · x over each run; 16 and 256 undo the nibbles' places in the mantissa
    odd = tl.zeros(words.shape, tl.float32)
    even = odd
    odd_sum = tl.zeros(columns.shape, tl.float32)
    even_sum = odd_sum
    for index in tl.static_range(0, 8):
        hidden = tl.load(hidden_ptr + columns + 4 * index, mask=mask, other=0.0).to(tl.float32)
        if index % 2 == 1:
            odd += _nibble(words, one_bits, index) * hidden
            odd_sum += hidden
        else:
            even += _nibble(words, one_bits, index) * hidden
            even_sum += hidden
    odd_sum = tl.sum(odd_sum, axis=2, keep_dims=True)
    even_sum = tl.sum(even_sum, axis=2, keep_dims=True)
    constant = odd_sum * 16.0 + even_sum * 256.0 + zero * (odd_sum + even_sum)
    odd = tl.sum(odd, axis=2, keep_dims=True)
    even = tl.sum(even, axis=2, keep_dims=True)
    return scale * (odd * 16.0 + (even * 256.0 - constant))


@triton.jit
def _finish_rows(sums, bias_ptr, output_ptr, rows, in_range, HAS_BIAS: tl.constexpr):
    result = tl.sum(tl.sum(sums, axis=2), axis=0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=in_range, other=0.0).to(tl.float32)
    tl.store(output_ptr + rows, result.to(output_ptr.dtype.element_ty), mask=in_range)


# `one_bits` comes at run time to lie in a register: an instruction takes one literal, the mask.
# The pair's stride is 1, but told at run time: a known 1 would make the compiler load pairs in
# another layout than words, and exchange them through shared memory in each step
@triton.jit(do_not_specialize=["pair_stride", "one_bits"])
def _int4_gemv_kernel(
    hidden_ptr,
    words_ptr,
    pairs_ptr,
    bias_ptr,
    output_ptr,
    size,
    depth,
    hidden_stride,
    pair_stride,
    one_bits,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RUNS_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = rows < size
    wide_rows = rows.to(tl.int64)[None, :, None]
    # lanes come first in the shape: the compiler then lays a warp along them, not across rows
    lanes = tl.arange(0, LANES)[:, None, None]
    inner = tl.arange(0, 4)[None, None, :]
    words_base = words_ptr + wide_rows * (depth // 32) * 4
    pairs_base = pairs_ptr + wide_rows * (depth // (32 * RUNS_PER_GROUP))
    sums0 = tl.zeros([LANES, ROWS, 1], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(0, depth // 32, LANES):
        runs = first + lanes
        mask = runs < depth // 32
        row_mask = mask & in_range[None, :, None]
        words = tl.load(words_base + runs * 4 + inner, mask=row_mask, other=0)
        pair_columns = (runs // RUNS_PER_GROUP) * pair_stride
        pair = tl.load(pairs_base + pair_columns, mask=row_mask, other=0)
        if first == 0:  # the first weights are on their way while the inputs are made
            wait_for_inputs(OVERLAPS)
        scale, zero = _scale_and_zero(pair)
        columns = runs * 32 + inner
        sums0 += _run_products(words, scale, zero, hidden_ptr, columns, mask, one_bits)
        if M > 1:
            second_ptr = hidden_ptr + hidden_stride
            sums1 += _run_products(words, scale, zero, second_ptr, columns, mask, one_bits)
        if M > 2:
            third_ptr = hidden_ptr + 2 * hidden_stride
            sums2 += _run_products(words, scale, zero, third_ptr, columns, mask, one_bits)
        if M > 3:
            fourth_ptr = hidden_ptr + 3 * hidden_stride
            sums3 += _run_products(words, scale, zero, fourth_ptr, columns, mask, one_bits)
    _finish_rows(sums0, bias_ptr, output_ptr, rows, in_range, HAS_BIAS)
    if M > 1:
        _finish_rows(sums1, bias_ptr, output_ptr + size, rows, in_range, HAS_BIAS)
    if M > 2:
        _finish_rows(sums2, bias_ptr, output_ptr + 2 * size, rows, in_range, HAS_BIAS)
    if M > 3:
        _finish_rows(sums3, bias_ptr, output_ptr + 3 * size, rows, in_range, HAS_BIAS)


@triton.jit
def _dense_nibble(words, scale, zero, INDEX: tl.constexpr):
    # (q − zero) · scale as one multiply-add on 1 + q/16 or 1 + q/256
    factor: tl.constexpr = 16.0 if INDEX % 2 == 1 else 256.0
    step = scale * factor
    return _nibble(words, 0x3F800000, INDEX) * step - (step + scale * zero)


@triton.jit
def _places(
    rows, runs, num_runs, row_words, RUNS_PER_GROUP: tl.constexpr, TILED: tl.constexpr
):  # fmt: skip
    # where a run's words and its pair lie; rows int64
    if TILED:
        tile = rows // 16 * (num_runs // 4) + runs // 4
        words = tile * 256 + rows % 16 * 16 + runs % 4 * 4
        per_row: tl.constexpr = 4 // RUNS_PER_GROUP
        pairs = tile * (16 * per_row) + rows % 16 * per_row + runs % 4 // RUNS_PER_GROUP
    else:
        words = rows * row_words + runs * 4
        pairs = rows * (num_runs // RUNS_PER_GROUP) + runs // RUNS_PER_GROUP
    return words, pairs


@triton.jit
def _column_of(INDEX: tl.constexpr, TILED: tl.constexpr):
    # a run's column of nibble INDEX in word 0
    return 8 * (INDEX % 4) + INDEX // 4 if TILED else 4 * INDEX


@triton.jit(do_not_specialize=["num_rows", "steps_per_split"])
def _int4_matmul_kernel(
    hidden_ptr,
    words_ptr,
    pairs_ptr,
    bias_ptr,
    partial_ptr,
    num_rows,
    size,
    depth,
    hidden_stride,
    steps_per_split,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    in_range, in_batch = rows < size, tokens < num_rows
    wide_rows = rows.to(tl.int64)[:, None]
    hidden_base = hidden_ptr + tokens.to(tl.int64)[None, :] * hidden_stride
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(split * steps_per_split, (split + 1) * steps_per_split):
        word = step * BLOCK_W + tl.arange(0, BLOCK_W)
        valid = word < depth // 8
        mask = in_range[:, None] & valid[None, :]
        place, pair_place = _places(
            wide_rows, (word // 4)[None, :], depth // 32, depth // 8, GROUP // 32, TILED
        )
        words = tl.load(words_ptr + place + (word % 4)[None, :], mask=mask, other=0)
        if GROUP >= BLOCK_W * 8:
            run = step * (BLOCK_W // 4)
            _, pair_place = _places(wide_rows, run, depth // 32, depth // 8, GROUP // 32, TILED)
            pair_mask = in_range[:, None] & (run < depth // 32)
            pair = tl.load(pairs_ptr + pair_place, mask=pair_mask, other=0)
        else:
            pair = tl.load(pairs_ptr + pair_place, mask=mask, other=0)
        scale, zero = _scale_and_zero(pair)
        column = word // 4 * 32 + word % 4 * (2 if TILED else 1)
        hidden_mask = valid[:, None] & in_batch[None, :]
        for index in tl.static_range(0, 8):
            places = hidden_base + (column + _column_of(index, TILED))[:, None]
            hidden = tl.load(places, mask=hidden_mask, other=0.0)
            dense = _dense_nibble(words, scale, zero, index).to(hidden.dtype)
            sums = tl.dot(dense, hidden, sums, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows, mask=in_range, other=0.0).to(tl.float32)[:, None]
    target = partial_ptr + (split * num_rows + tokens).to(tl.int64)[None, :] * size + rows[:, None]
    mask = in_range[:, None] & in_batch[None, :]
    tl.store(target, sums.to(partial_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits_kernel(
    partial_ptr,
    bias_ptr,
    output_ptr,
    split_stride,
    size,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = columns < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(0, SPLITS):
        place = partial_ptr + split * split_stride + row * size + columns
        total += tl.load(place, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * size + columns, total.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    words_ptr,
    pairs_ptr,
    dense_ptr,
    depth,
    RUNS_PER_GROUP: tl.constexpr,
    TILED: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    runs = tl.program_id(1) * LANES + tl.arange(0, LANES)[:, None]
    inner = tl.arange(0, 4)[None, :]
    mask = runs < depth // 32
    place, pair_place = _places(row, runs, depth // 32, depth // 8, RUNS_PER_GROUP, TILED)
    words = tl.load(words_ptr + place + inner, mask=mask, other=0)
    scale, zero = _scale_and_zero(tl.load(pairs_ptr + pair_place, mask=mask, other=0))
    target = dense_ptr + row * (depth // 32) * 32 + runs * 32 + inner * (2 if TILED else 1)
    for index in tl.static_range(0, 8):
        dense = _dense_nibble(words, scale, zero, index)
        tl.store(target + _column_of(index, TILED), dense.to(dense_ptr.dtype.element_ty), mask=mask)
