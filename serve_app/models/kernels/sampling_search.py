"""The search for the least logit that top-k, top-p and min_p leave, for `sampling`."""

from __future__ import annotations

import torch

from serve_app.models.kernels._triton import next_power_of_2, tl, triton

CHUNK = 4096
_WAYS = 8
_RANGE_NATS = 32.0
_TOP_P_PASSES, _TOP_K_PASSES = 5, 7
_CROWDED_PASSES = 3
_FEW = 4


class FloorSearch:
    """Fills `floor` [S] with what top-k, then top-p over the rest, then min_p leave above it."""

    def __init__(
        self,
        scaled: torch.Tensor,
        maxima: torch.Tensor,
        slots: torch.Tensor,
        floats: torch.Tensor,
        ints: torch.Tensor,
        floor: torch.Tensor,
    ) -> None:
        self._inputs = (scaled, maxima, slots, floats, ints, floor)
        self._vocab_size = scaled.shape[1]
        self._num_chunks = maxima.shape[1]
        self._strides = (floats.stride(0), ints.stride(0))
        shape = (2, scaled.shape[0], self._num_chunks, _WAYS)
        self._partial = torch.empty(shape, dtype=torch.float32, device=scaled.device)
        self._high = torch.empty((2, scaled.shape[0]), dtype=torch.float32, device=scaled.device)
        self._has_floor = False

    def run(self, is_count: bool, is_last: bool) -> None:
        """Search by number of tokens (top-k) or by their share of the weight (top-p)."""
        step = _RANGE_NATS
        num_passes = _TOP_K_PASSES if is_count else _TOP_P_PASSES
        for turn in range(num_passes):
            step /= _WAYS
            old, new = (turn + 1) % 2, turn % 2
            _search_kernel[(self._num_chunks, self._partial.shape[1])](
                *self._inputs, self._partial[old], self._partial[new], self._high[old],
                self._high[new], self._vocab_size, step, *self._strides,
                IS_FIRST=turn == 0, IS_COUNT=is_count, HAS_FLOOR=self._has_floor,
                IS_CROWDED=turn < _CROWDED_PASSES, CHUNKS=self._num_chunks,
                WIDE=next_power_of_2(self._num_chunks), CHUNK=CHUNK, BLOCK=1024, WAYS=_WAYS,
                FEW=_FEW, num_warps=1,
            )  # fmt: skip
        self._raise_floor(step, (num_passes - 1) % 2, is_count, is_last)

    def skip(self) -> None:
        """Apply min_p alone."""
        self._raise_floor(0.0, 0, is_count=False, is_last=True, is_searched=False)

    def _raise_floor(
        self, step: float, last: int, is_count: bool, is_last: bool, is_searched: bool = True
    ) -> None:
        _, _, slots, floats, ints, floor = self._inputs
        _floor_kernel[(floor.shape[0],)](
            slots, floats, ints, floor, self._partial[last], self._high[last], step,
            *self._strides, HAS_FLOOR=self._has_floor, IS_SEARCHED=is_searched, IS_LAST=is_last,
            IS_COUNT=is_count, CHUNKS=self._num_chunks, WIDE=next_power_of_2(self._num_chunks),
            WAYS=_WAYS, num_warps=1,
        )  # fmt: skip
        self._has_floor = True


@triton.jit
def row_maximum(maxima_ptr, row, CHUNKS: tl.constexpr, WIDE: tl.constexpr):
    """A row's largest logit, from those of its chunks."""
    chunks = tl.arange(0, WIDE)
    maxima = tl.load(maxima_ptr + row * CHUNKS + chunks, mask=chunks < CHUNKS, other=float("-inf"))
    return tl.max(maxima, axis=0)


@triton.jit
def _narrowed(
    partial_ptr,
    high,
    limit,
    step,
    row,
    IS_COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    WAYS: tl.constexpr,
):
    # lane 0 holds the sum of all, lane j that of what lies above high - j * step
    chunks, lanes = tl.arange(0, WIDE), tl.arange(0, WAYS)
    place = (row * CHUNKS + chunks)[:, None] * WAYS + lanes[None, :]
    partial = tl.load(partial_ptr + place, mask=(chunks < CHUNKS)[:, None], other=0.0)
    sums = tl.sum(partial, axis=0)
    target = limit
    if not IS_COUNT:
        target = limit * tl.sum(tl.where(lanes == 0, sums, 0.0), axis=0)
    num_below = tl.sum(tl.where((lanes > 0) & (sums < target), 1, 0), axis=0)
    return high - num_below.to(tl.float32) * step


@triton.jit
def _limit(params_ptr, ints_ptr, IS_COUNT: tl.constexpr):
    if IS_COUNT:
        top_k = tl.load(ints_ptr).to(tl.float32)
        limit = tl.where(top_k > 0, top_k, float("inf"))
    else:
        top_p = tl.load(params_ptr + 1)
        limit = tl.where(top_p < 1.0, top_p, float("inf"))
    return limit


@triton.jit
def _sums_above(x, weights, high, step, lanes, WAYS: tl.constexpr):
    sums = tl.zeros([WAYS], tl.float32)
    for lane in tl.static_range(1, WAYS):
        above = tl.sum(tl.where(x > high - lane * step, weights, 0.0), axis=0)
        sums += tl.where(lanes == lane, above, 0.0)
    return sums


@triton.jit
def _sums_above_few(x, weights, high, step, lanes, WAYS: tl.constexpr, FEW: tl.constexpr):
    # in the last passes few tokens lie between the thresholds: those are added one by one
    is_between = (x <= high - step) & (x > high - (WAYS - 1) * step)
    num_between = tl.sum(is_between.to(tl.int32), axis=0)
    if num_between <= FEW:
        above = tl.sum(tl.where(x > high - step, weights, 0.0), axis=0)
        sums = tl.where(lanes > 0, above, 0.0)
        rest = tl.where(is_between, x, float("-inf"))
        for _ in range(0, num_between):
            best = tl.max(rest, axis=0)
            weight = tl.sum(tl.where(rest == best, weights, 0.0), axis=0)
            sums += tl.where((lanes > 0) & (high - lanes * step < best), weight, 0.0)
            rest = tl.where(rest == best, float("-inf"), rest)
    else:
        sums = _sums_above(x, weights, high, step, lanes, WAYS)
    return sums


@triton.jit
def _search_kernel(
    scaled_ptr,
    maxima_ptr,
    slots_ptr,
    floats_ptr,
    ints_ptr,
    floor_ptr,
    old_partial_ptr,
    partial_ptr,
    old_high_ptr,
    high_ptr,
    vocab_size,
    step,
    floats_stride,
    ints_stride,
    IS_FIRST: tl.constexpr,
    IS_COUNT: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    IS_CROWDED: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
    FEW: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    limit = _limit(floats_ptr + slot * floats_stride, ints_ptr + slot * ints_stride, IS_COUNT)
    if IS_FIRST:
        high = limit * 0.0
        high = tl.where(high == high, high, 0.0)  # infinity times nothing
    else:
        high = tl.load(old_high_ptr + row)
        high = _narrowed(
            old_partial_ptr, high, limit, step * WAYS, row, IS_COUNT, CHUNKS, WIDE, WAYS
        )
    if chunk == 0:
        tl.store(high_ptr + row, high)
    maximum = row_maximum(maxima_ptr, row, CHUNKS, WIDE)
    lanes = tl.arange(0, WAYS)
    sums = tl.zeros([WAYS], tl.float32)
    for first in range(0, CHUNK, BLOCK):
        columns = chunk * CHUNK + first + tl.arange(0, BLOCK)
        x = tl.load(
            scaled_ptr + row * vocab_size + columns, mask=columns < vocab_size, other=float("-inf")
        )
        x = x - maximum
        if HAS_FLOOR:
            x = tl.where(x > tl.load(floor_ptr + row), x, float("-inf"))
        weights = tl.where(x > float("-inf"), 1.0, 0.0) if IS_COUNT else tl.exp(x)
        sums += tl.where(lanes == 0, tl.sum(weights, axis=0), 0.0)
        if IS_CROWDED:
            sums += _sums_above(x, weights, high, step, lanes, WAYS)
        else:
            sums += _sums_above_few(x, weights, high, step, lanes, WAYS, FEW)
    tl.store(partial_ptr + (row * CHUNKS + chunk) * WAYS + lanes, sums)


@triton.jit
def _floor_kernel(
    slots_ptr,
    floats_ptr,
    ints_ptr,
    floor_ptr,
    partial_ptr,
    high_ptr,
    step,
    floats_stride,
    ints_stride,
    HAS_FLOOR: tl.constexpr,
    IS_SEARCHED: tl.constexpr,
    IS_LAST: tl.constexpr,
    IS_COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    WAYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    params = floats_ptr + slot * floats_stride
    floor = float("-inf")
    if HAS_FLOOR:
        floor = tl.load(floor_ptr + row)
    if IS_SEARCHED:
        limit = _limit(params, ints_ptr + slot * ints_stride, IS_COUNT)
        high = tl.load(high_ptr + row)
        high = _narrowed(partial_ptr, high, limit, step, row, IS_COUNT, CHUNKS, WIDE, WAYS)
        floor = tl.where(limit < float("inf"), tl.maximum(floor, high - step), floor)
    if IS_LAST:
        # what lies above the floor stays: a token with exactly min_p of the best's odds does
        min_p = tl.load(params + 2)
        least = tl.log(tl.maximum(min_p, 1e-30)) - 1e-6
        floor = tl.where(min_p > 0, tl.maximum(floor, least), floor)
    tl.store(floor_ptr + row, floor)
