"""Products of rows with the matrix of the expert that each row chose, in one launch.

A pair is (row, one of its k experts), numbered row · k + slot. Few pairs each take a program tile
of their own; many are sorted by expert into tiles of `TILE_ROWS`, with integer operations on the
device, so that nothing waits for the host and a captured graph can replay it. A pair's bits don't
depend on the tile in which it lies.
"""

from dataclasses import dataclass

import torch

from serve_app.models.kernels._triton import cdiv, has_kernel, next_power_of_2, tl, triton
from serve_app.models.quantized import GROUP_SIZE, QuantizedWeight

TILE_ROWS = 16
_LARGE_TILE_ROWS = 64
_DIRECT_PAIRS = 64
_LARGE_TILE_PAIRS_PER_EXPERT = 32
_RUN = 2 * GROUP_SIZE
_TWIN_PAIRS = 16


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """The stacked matrices of all experts, dense or with 4-bit codes in groups of 32 columns.

    Dense: values [E, N, K], scales and offsets None. 4-bit: values uint8 [E, N, K/2], where byte j
    of a run of 64 columns holds column j in its low and column 32 + j in its high nibble; scales
    and offsets float16 [E, N, K/32], with w = code · scale + offset.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.values.shape[0]

    @property
    def num_columns(self) -> int:
        """K."""
        return self.values.shape[2] * (1 if self.scales is None else 2)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.values, self.scales, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)

    def dense(self, experts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The matrices of int64 `experts` [n], as [n, N, K] in `dtype`."""
        values = self.values[experts]
        if self.scales is None or self.offsets is None:
            return values.to(dtype)
        runs = values.unflatten(2, (-1, GROUP_SIZE))
        codes = torch.stack((runs & 15, runs >> 4), dim=3).flatten(2, 3).float()
        groups = codes * self.scales[experts].float()[..., None]
        return (groups + self.offsets[experts].float()[..., None]).flatten(2).to(dtype)


def can_pack(num_columns: int) -> bool:
    """Whether a matrix [N, num_columns] has the 4-bit layout."""
    return num_columns % _RUN == 0


def pack_rows(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One expert's rows of `GroupedWeight`'s 4-bit layout: values, scales, offsets."""
    assert weight.bits == 4, "only 4-bit codes fit a nibble"
    runs = weight.codes.view(torch.uint8).unflatten(1, (-1, 2, GROUP_SIZE))
    values = (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)
    return values, weight.scales.half(), weight.offsets.half()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Tiles of pairs. experts: int64 [num_tiles], E for a tile that holds none.

    places: int64 [num_tiles · tile_rows] of pair numbers, num_pairs where there is none; None where
    tile i holds pair i alone.
    """

    experts: torch.Tensor
    places: torch.Tensor | None
    num_pairs: int
    tile_rows: int


def align_pairs(indices: torch.Tensor, num_experts: int, row_invariant: bool = False) -> Pairs:
    """Lay the pairs of int64 indices [T, k] in tiles of one expert each.

    With `row_invariant` tiles have `TILE_ROWS` whatever T.
    """
    chosen = indices.flatten()
    num_pairs = chosen.shape[0]
    if num_pairs <= _DIRECT_PAIRS:
        return Pairs(chosen, None, num_pairs, TILE_ROWS)
    is_large = num_pairs >= _LARGE_TILE_PAIRS_PER_EXPERT * num_experts and not row_invariant
    rows = _LARGE_TILE_ROWS if is_large else TILE_ROWS
    order = chosen.argsort(stable=True)
    experts = chosen[order]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    tiles = (counts + rows - 1) // rows
    last_tiles = tiles.cumsum(0)
    # Where a pair lies among its expert's, and where that expert's first tile begins.
    rank = torch.arange(num_pairs, device=chosen.device) - (counts.cumsum(0) - counts)[experts]
    num_tiles = min(num_pairs, num_pairs // rows + num_experts)
    places = torch.full((num_tiles * rows,), num_pairs, device=chosen.device)
    places[(last_tiles - tiles)[experts] * rows + rank] = order
    numbers = torch.arange(num_tiles, device=chosen.device)
    return Pairs(torch.searchsorted(last_tiles, numbers, right=True), places, num_pairs, rows)


def grouped_linear(
    x: torch.Tensor, weight: GroupedWeight, pairs: Pairs, pairs_per_row: int
) -> torch.Tensor:
    """Row (pair // pairs_per_row) of x times its pair's expert: [R, K] → [num_pairs, N].

    x is contiguous, in the dtype of the result; sums are float32.
    """
    if not has_kernel("experts", x):
        return grouped_linear_torch(x, weight, pairs, pairs_per_row)
    x = x.contiguous()
    size, depth = weight.values.shape[1], weight.num_columns
    out = torch.empty(pairs.num_pairs, size, dtype=x.dtype, device=x.device)
    is_packed = weight.scales is not None
    is_wide = x.dtype == torch.float32
    is_large = pairs.tile_rows > TILE_ROWS
    block_columns = min(128 if is_large else 64, max(16, next_power_of_2(size)))
    block_depth = GROUP_SIZE if is_packed else 32 if is_wide else 64 if is_large else 128
    places = pairs.experts if pairs.places is None else pairs.places
    _grouped_kernel[(cdiv(size, block_columns), pairs.experts.shape[0])](
        x, weight.values, weight.scales, weight.offsets, pairs.experts, places, out,
        pairs.num_pairs, pairs_per_row, weight.num_experts,
        SIZE=size, DEPTH=depth, TILE_ROWS=pairs.tile_rows, BLOCK_COLUMNS=block_columns,
        BLOCK_DEPTH=block_depth, IS_DIRECT=pairs.places is None, IS_PACKED=is_packed,
        PRECISION="ieee" if is_wide else "tf32", num_warps=4, num_stages=2 if is_wide else 3,
    )  # fmt: skip
    return out


def grouped_linear_torch(
    x: torch.Tensor, weight: GroupedWeight, pairs: Pairs, pairs_per_row: int
) -> torch.Tensor:
    """Do what grouped_linear does, in PyTorch: it gathers the matrices of a few pairs at a time."""
    if pairs.places is None:
        experts = pairs.experts
    else:
        tiles = pairs.experts.repeat_interleave(pairs.tile_rows)
        experts = tiles.new_zeros(pairs.num_pairs + 1)
        experts[pairs.places] = tiles.clamp(max=weight.num_experts - 1)
        experts = experts[:-1]
    rows = torch.arange(pairs.num_pairs, device=x.device) // pairs_per_row
    out = torch.empty(pairs.num_pairs, weight.values.shape[1], dtype=x.dtype, device=x.device)
    for start in range(0, pairs.num_pairs, _TWIN_PAIRS):
        some = slice(start, start + _TWIN_PAIRS)
        matrices = weight.dense(experts[some], x.dtype)
        out[some] = torch.bmm(matrices, x[rows[some]][..., None])[..., 0]
    return out


@triton.jit
def _times_packed(
    x_rows, values_ptr, scales_ptr, offsets_ptr, matrix_row, valid, in_size, depth, total,
    DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # a byte holds a column of each of two neighbouring groups
    for run in range(0, DEPTH // (2 * BLOCK_DEPTH)):
        start = run * 2 * BLOCK_DEPTH
        packed = tl.load(
            values_ptr + matrix_row[:, None] * (DEPTH // 2) + run * BLOCK_DEPTH + depth[None, :],
            mask=in_size[:, None],
            other=0,
        )
        group = matrix_row * (DEPTH // BLOCK_DEPTH) + run * 2
        for half in tl.static_range(2):
            scale = tl.load(scales_ptr + group + half, mask=in_size, other=0.0).to(tl.float32)
            offset = tl.load(offsets_ptr + group + half, mask=in_size, other=0.0).to(tl.float32)
            codes = ((packed >> (4 * half)) & 15).to(tl.float32)
            matrix = codes * scale[:, None] + offset[:, None]
            x = tl.load(
                x_rows + start + half * BLOCK_DEPTH + depth[None, :],
                mask=valid[:, None],
                other=0.0,
            )
            total = tl.dot(x, tl.trans(matrix.to(x.dtype)), total, input_precision=PRECISION)
    return total


@triton.jit
def _times_dense(
    x_rows, values_ptr, matrix_row, valid, in_size, depth, total,
    DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(0, DEPTH, BLOCK_DEPTH):
        in_depth = start + depth < DEPTH
        x = tl.load(
            x_rows + start + depth[None, :], mask=valid[:, None] & in_depth[None, :], other=0.0
        )
        matrix = tl.load(
            values_ptr + matrix_row[:, None] * DEPTH + start + depth[None, :],
            mask=in_size[:, None] & in_depth[None, :],
            other=0.0,
        )
        total = tl.dot(x, tl.trans(matrix), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    offsets_ptr,
    experts_ptr,
    places_ptr,
    out_ptr,
    num_pairs,
    pairs_per_row,
    num_experts,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    IS_DIRECT: tl.constexpr,
    IS_PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(1)
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    if expert >= num_experts:
        return
    lanes = tl.arange(0, TILE_ROWS)
    if IS_DIRECT:
        pairs = tile + lanes
        valid = lanes == 0
    else:
        pairs = tl.load(places_ptr + tile * TILE_ROWS + lanes).to(tl.int32)
        valid = pairs < num_pairs
    rows = (pairs // pairs_per_row).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_size = columns < SIZE
    matrix_row = expert * SIZE + columns
    total = tl.zeros([TILE_ROWS, BLOCK_COLUMNS], tl.float32)
    depth = tl.arange(0, BLOCK_DEPTH)
    x_rows = x_ptr + rows[:, None] * DEPTH
    if IS_PACKED:
        total = _times_packed(
            x_rows, values_ptr, scales_ptr, offsets_ptr, matrix_row, valid, in_size, depth, total,
            DEPTH, BLOCK_DEPTH, PRECISION,
        )  # fmt: skip
    else:
        total = _times_dense(
            x_rows, values_ptr, matrix_row, valid, in_size, depth, total,
            DEPTH, BLOCK_DEPTH, PRECISION,
        )  # fmt: skip
    place = pairs.to(tl.int64)[:, None] * SIZE + columns[None, :]
    tl.store(
        out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=valid[:, None] & in_size[None, :]
    )
