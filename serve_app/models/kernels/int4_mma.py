"""The INT4 product of few rows on NVIDIA's tensor cores, for bfloat16 and float16 activations.

Each lane of a warp reads whole runs of the weight (16 bytes) and leaves them where they are: in one
`mma.m16n8k16` the four lanes of a quad hold four different runs, and the other operand is zero but
for (run, column) pairs that belong together. So column 2t + m of the product is the run of quad
lane t times row m of the activations; it ends in the lane that reads that run's scale and zero.
A nibble pair becomes two elements by one instruction: set as the low mantissa bits of 128 (1024 in
float16) it reads 128 + q, exactly; what is too much goes off once per run with the zero.
"""

import torch

from serve_app.models.kernels._triton import (
    IS_INTERPRETED,
    cdiv,
    num_compute_units,
    overlap_options,
    tl,
    triton,
    wait_for_inputs,
)
from serve_app.models.kernels.int4_pack import Int4Weight

MAX_MMA_ROWS = 4
_LONG_DEPTH = 8192
_MMA = """{
mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {$0, $1, $2, $3},
 {$4, $8, $12, $16}, {$20, $24}, {$28, $29, $30, $31};
mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {$0, $1, $2, $3},
 {$5, $9, $13, $17}, {$21, $25}, {$0, $1, $2, $3};
mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {$0, $1, $2, $3},
 {$6, $10, $14, $18}, {$22, $26}, {$0, $1, $2, $3};
mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {$0, $1, $2, $3},
 {$7, $11, $15, $19}, {$23, $27}, {$0, $1, $2, $3};
}"""
_ASM_BF16 = _MMA.replace("TYPE", "bf16")
_ASM_FP16 = _MMA.replace("TYPE", "f16")
_CONSTRAINTS = ",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * 4)


def has_mma(device: torch.device) -> bool:
    """Whether the device has these tensor cores: NVIDIA's from Ampere on."""
    if device.type != "cuda" or IS_INTERPRETED or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def can_use_mma(hidden: torch.Tensor) -> bool:
    """Whether `int4_mma` takes these activations [M, K]: at most 4 rows of two-byte elements."""
    is_short = hidden.dtype in (torch.bfloat16, torch.float16)
    return is_short and hidden.shape[0] <= MAX_MMA_ROWS and has_mma(hidden.device)


def int4_mma(
    hidden: torch.Tensor,
    weight: Int4Weight,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[M, K] · [N, K]ᵀ + [N] → [M, N] in hidden's dtype, sums in float32; no twin behind it."""
    num_rows, size = hidden.shape[0], weight.out_features
    output = torch.empty((num_rows, size), dtype=hidden.dtype, device=hidden.device)
    if num_rows == 0:
        return output
    is_bf16 = hidden.dtype == torch.bfloat16
    tiles, warps, ahead = choose_shape(
        num_rows, size, weight.in_features, num_compute_units(hidden.device)
    )
    inputs = _words_of(hidden) if weight.is_tiled else hidden.view(torch.int16)
    _int4_mma_kernel[(cdiv(size, 16 * tiles),)](
        inputs, weight.words, weight.scale_zero,
        output if bias is None else bias, output,
        size, weight.in_features, inputs.stride(0), 0x43004300 if is_bf16 else 0x64006400,
        weight.scale_zero.stride(1),
        M=num_rows, HAS_BIAS=bias is not None, RUNS_PER_GROUP=weight.group_size // 32,
        TILES=tiles, WARPS=warps, AHEAD=ahead, TILED=weight.is_tiled, IS_BF16=is_bf16,
        ASM=_ASM_BF16 if is_bf16 else _ASM_FP16, CONSTRAINTS=_CONSTRAINTS, num_warps=warps,
        **overlap_options(hidden),
    )  # fmt: skip
    return output


def _words_of(hidden: torch.Tensor) -> torch.Tensor:
    """Two neighbouring elements as one int32: [M, K] → [M, K/2]."""
    if hidden.stride(0) % 2 or hidden.storage_offset() % 2:
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    return hidden.view(torch.int32)


def choose_shape(num_rows: int, size: int, depth: int, num_units: int) -> tuple[int, int, int]:
    """Return a program's tiles of 16 rows, its warps, and how many steps ahead it loads weights.

    As measured for the shapes of a 7B network: many programs hide each other's loads; where they
    all run at once, one a unit, each takes more warps; where a few units would have a second one,
    programs are halved.
    """
    num_programs = cdiv(size, 32)
    if num_programs >= 4 * num_units:
        return 2, 4, 1
    if num_rows > 2:
        return 2, *((8, 2) if num_programs <= num_units else (4, 2))
    if num_programs > num_units:
        return 1, 8, 1
    return 2, 16 if num_rows == 2 or depth >= _LONG_DEPTH else 8, 1


@triton.jit
def _mma(c, a0, a1, a2, a3, b0, b1, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr):
    # c [T, tiles, 4] float32: the four accumulators; a, b int32, a pair of elements per word
    return tl.inline_asm_elementwise(
        ASM, CONSTRAINTS, [a0, a1, a2, a3, b0, b1, c], dtype=tl.float32, is_pure=True, pack=4
    )


@triton.jit
def _pairs_of(hidden_ptr, places, mask, INDEX: tl.constexpr, TILED: tl.constexpr):
    # the elements of nibbles i and i + 4 of word j: neighbours, or 4i + j and 4i + 16 + j of a run
    if TILED:
        return tl.load(hidden_ptr + places + 4 * INDEX, mask=mask, other=0)
    low = tl.load(hidden_ptr + places + 4 * INDEX, mask=mask, other=0).to(tl.int32) & 0xFFFF
    high = tl.load(hidden_ptr + places + 4 * INDEX + 16, mask=mask, other=0).to(tl.int32)
    return low | (high << 16)


@triton.jit
def _nibbles(words, base, SHIFT: tl.constexpr):
    return ((words >> SHIFT) & 0x000F000F) | base


@triton.jit
def _half(pairs, shift: tl.constexpr):
    return (pairs >> shift).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_inputs(hidden, run, FIRST: tl.constexpr, M: tl.constexpr, TILED: tl.constexpr):
    # rows FIRST and FIRST + 1 of the activations, in the lanes whose column they are, else zeros:
    # four int32 [T, 1, 4], for the words of `run`
    hidden_ptr, hidden_stride, group, lane, num_runs = hidden
    token = FIRST + group % 2
    mask = (run < num_runs) & (group // 2 == lane) & (token < M)
    run_size: tl.constexpr = 16 if TILED else 32  # words of two elements, or elements
    places = token * hidden_stride + run * run_size + tl.arange(0, 4)[None, None, :]
    x0 = _pairs_of(hidden_ptr, places, mask, 0, TILED)
    x1 = _pairs_of(hidden_ptr, places, mask, 1, TILED)
    x2 = _pairs_of(hidden_ptr, places, mask, 2, TILED)
    x3 = _pairs_of(hidden_ptr, places, mask, 3, TILED)
    return x0, x1, x2, x3


@triton.jit
def _weight_places(
    words_ptr, pairs_ptr, low_rows, group, lane, row_words, row_pairs, pair_stride,
    RUNS_PER_GROUP: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    # where each lane's first words and pairs of scale and zero lie
    word = tl.arange(0, 4)[None, None, :]
    if TILED:
        tile = (low_rows // 16).to(tl.int64)
        words = words_ptr + tile * (16 * row_words) + (group * 4 + lane) * 4 + word
        in_tile = group * (4 // RUNS_PER_GROUP) + lane // RUNS_PER_GROUP
        pairs = pairs_ptr + tile * (16 * row_pairs) + in_tile * pair_stride
    else:
        words = words_ptr + low_rows.to(tl.int64) * row_words + word
        pairs = pairs_ptr + low_rows.to(tl.int64) * row_pairs
    return words, pairs


@triton.jit
def _load_runs(weight, step, own_run, RUNS_PER_GROUP: tl.constexpr, TILED: tl.constexpr):
    # step: the 4 runs of columns that this warp takes; own_run: this lane's run among all
    words, pairs, row_words, row_pairs, pair_stride, num_runs, low_ok, high_ok = weight
    valid = own_run < num_runs
    low_mask, high_mask = valid & low_ok, valid & high_ok
    if TILED:
        place = step * 256
        pair_place = step * (64 // RUNS_PER_GROUP) * pair_stride
        high_place: tl.constexpr = 128
        high_pair_place: tl.constexpr = 32 // RUNS_PER_GROUP
    else:
        place = own_run * 4
        pair_place = own_run // RUNS_PER_GROUP * pair_stride
        high_place = 8 * row_words
        high_pair_place = 8 * row_pairs
    low = tl.load(words + place, mask=low_mask, other=0, cache_modifier=".cg")
    high = tl.load(words + high_place + place, mask=high_mask, other=0, cache_modifier=".cg")
    low_pair = tl.load(pairs + pair_place, mask=low_mask, other=0)
    high_pair = tl.load(pairs + high_pair_place + pair_place, mask=high_mask, other=0)
    return low, high, low_pair, high_pair


@triton.jit
def _accumulate(
    sums, runs, inputs, base,
    IS_BF16: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    # two halves with sums of their own, for shorter chains
    low, high, low_pair, high_pair = runs
    x0, x1, x2, x3 = inputs
    word = tl.arange(0, 4)[None, None, :]
    scale = tl.where(word < 2, _half(low_pair, 0), _half(high_pair, 0))
    zero = tl.where(word < 2, _half(low_pair, 16), _half(high_pair, 16))
    one = tl.full(x0.shape, 0x3F803F80 if IS_BF16 else 0x3C003C00, tl.int32)
    none = tl.zeros(x0.shape, tl.float32)
    total = _mma(none, one, one, one, one, x0, x1, ASM, CONSTRAINTS)
    total += _mma(none, one, one, one, one, x2, x3, ASM, CONSTRAINTS)
    none = tl.zeros(low.shape, tl.float32)
    product = _mma(
        none, _nibbles(low, base, 0), _nibbles(high, base, 0),
        _nibbles(low, base, 4), _nibbles(high, base, 4),
        tl.broadcast_to(x0, low.shape), tl.broadcast_to(x1, low.shape), ASM, CONSTRAINTS,
    )  # fmt: skip
    product += _mma(
        none, _nibbles(low, base, 8), _nibbles(high, base, 8),
        _nibbles(low, base, 12), _nibbles(high, base, 12),
        tl.broadcast_to(x2, low.shape), tl.broadcast_to(x3, low.shape), ASM, CONSTRAINTS,
    )  # fmt: skip
    constant: tl.constexpr = 128.0 if IS_BF16 else 1024.0
    return sums + scale * (product - (zero + constant) * total)


@triton.jit
def _store_pair(
    sums, bias_ptr, output_ptr, size, first_row,
    FIRST: tl.constexpr, M: tl.constexpr, HAS_BIAS: tl.constexpr,
    WARPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    sums = tl.reshape(sums, [WARPS, 8, 4, TILES, 4])
    sums = tl.sum(tl.sum(sums, axis=2), axis=0)
    place = tl.arange(0, 4)[None, None, :]
    tile = tl.arange(0, TILES)[None, :, None] * 16
    rows = first_row + tile + tl.arange(0, 8)[:, None, None] + place // 2 * 8
    token = FIRST + place % 2
    mask = (rows < size) & (token < M)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + token * size + rows, sums.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["base", "pair_stride"])
def _int4_mma_kernel(
    hidden_ptr, words_ptr, pairs_ptr, bias_ptr, output_ptr,
    size, depth, hidden_stride, base, pair_stride,
    M: tl.constexpr, HAS_BIAS: tl.constexpr, RUNS_PER_GROUP: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, TILED: tl.constexpr,
    IS_BF16: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    # threads come first in the shape: a warp lies along them, one run of 4 words in each
    thread = tl.arange(0, 32 * WARPS)[:, None, None]
    group, lane = thread % 32 // 4, thread % 4
    first_row = tl.program_id(0) * (16 * TILES)
    low_rows = first_row + group + tl.arange(0, TILES)[None, :, None] * 16
    num_runs = depth // 32
    row_words, row_pairs = num_runs * 4, num_runs // RUNS_PER_GROUP
    words, pairs = _weight_places(
        words_ptr, pairs_ptr, low_rows, group, lane, row_words, row_pairs, pair_stride,
        RUNS_PER_GROUP, TILED,
    )  # fmt: skip
    low_ok, high_ok = low_rows < size, low_rows + 8 < size
    weight = (words, pairs, row_words, row_pairs, pair_stride, num_runs, low_ok, high_ok)
    hidden = (hidden_ptr, hidden_stride, group, lane, num_runs)
    own_run = thread // 32 * 4 + lane
    sums0 = tl.zeros([32 * WARPS, TILES, 4], tl.float32)
    sums1 = sums0
    runs = _load_runs(weight, thread // 32, own_run, RUNS_PER_GROUP, TILED)
    next_runs = runs
    if AHEAD > 1:
        run = own_run + 4 * WARPS
        next_runs = _load_runs(weight, run // 4, run, RUNS_PER_GROUP, TILED)
    wait_for_inputs(OVERLAPS)  # the first weights are on their way while the inputs are made
    inputs = _load_inputs(hidden, own_run, 0, M, TILED)
    for first in range(0, num_runs, 4 * WARPS):
        run = first + 4 * WARPS * AHEAD + own_run
        new_runs = _load_runs(weight, run // 4, run, RUNS_PER_GROUP, TILED)
        if M > 2:  # registers are short: the inputs are loaded as they are needed
            inputs = _load_inputs(hidden, first + own_run, 0, M, TILED)
        new_inputs = inputs
        if M <= 2:
            new_inputs = _load_inputs(hidden, first + 4 * WARPS + own_run, 0, M, TILED)
        sums0 = _accumulate(sums0, runs, inputs, base, IS_BF16, ASM, CONSTRAINTS)
        if M > 2:
            more = _load_inputs(hidden, first + own_run, 2, M, TILED)
            sums1 = _accumulate(sums1, runs, more, base, IS_BF16, ASM, CONSTRAINTS)
        inputs = new_inputs
        if AHEAD > 1:
            runs = next_runs
            next_runs = new_runs
        else:
            runs = new_runs
    _store_pair(sums0, bias_ptr, output_ptr, size, first_row, 0, M, HAS_BIAS, WARPS, TILES)
    if M > 2:
        _store_pair(sums1, bias_ptr, output_ptr, size, first_row, 2, M, HAS_BIAS, WARPS, TILES)
