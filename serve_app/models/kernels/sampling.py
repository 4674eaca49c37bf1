"""Draws a token per row from penalised, tempered and truncated logits without leaving the card.

Top-k and top-p become one floor per row, found by an 8-way search over 32 nats below the largest
logit, each pass with 7 sums at once. Top-p's five passes leave an interval of 2^-10 nats, an eighth
of the step between bfloat16 logits near 1; top-k's seven leave 2^-16. Tokens inside it count as
ties and stay; below -32 nats nothing stays, which is less than 2e-9 of the odds. The draw is by
inverse CDF, a block of 256 tokens and then a token.

A row is cut alike whatever the batch, and no sum depends on the order of programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from serve_app.models.kernels._triton import cdiv, next_power_of_2, tl, triton
from serve_app.models.kernels.sampling_search import CHUNK, FloorSearch, row_maximum

_CDF_BLOCK = 256


@dataclass(frozen=True, slots=True)
class SamplingTables:
    """Parameters by slot. The columns that are read here come first, in this order.

    floats: float32 [slots, F]: temperature (0 is greedy), top_p, min_p, repetition, frequency,
    presence. ints: int64 [slots, I]: top_k (0 is off), seed. counts: int32 and in_prompt: bool
    [slots, V], where penalties are: the drawn tokens are counted.
    """

    floats: torch.Tensor
    ints: torch.Tensor
    counts: torch.Tensor | None = None
    in_prompt: torch.Tensor | None = None


def draw_tokens(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tables: SamplingTables,
    *,
    has_top_k: bool,
    has_top_p: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids int64 [S] and each row's largest tempered logit, inf or -inf where it has failed.

    logits: float32 [S, V], rows dense; slots, positions: int64 [S]. A greedy row takes its first
    largest logit, the others draw by (seed, position). Without `has_top_k` and `has_top_p` no row
    of the batch may use them; min_p always holds.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = cdiv(vocab_size, CHUNK)
    device = logits.device
    scaled = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=device)
    maxima = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
    places = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    has_penalties = tables.counts is not None and tables.in_prompt is not None
    _scale_kernel[(num_chunks, num_rows)](
        logits, slots, tables.floats, tables.counts if has_penalties else logits,
        tables.in_prompt.view(torch.uint8) if has_penalties else logits,
        scaled, maxima, places, vocab_size, logits.stride(0), tables.floats.stride(0),
        HAS_PENALTIES=has_penalties, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    floor = torch.empty(num_rows, dtype=torch.float32, device=device)
    search = FloorSearch(scaled, maxima, slots, tables.floats, tables.ints, floor)
    if has_top_k:
        search.run(is_count=True, is_last=not has_top_p)
    if has_top_p:
        search.run(is_count=False, is_last=True)
    if not has_top_k and not has_top_p:
        search.skip()
    num_blocks = num_chunks * (CHUNK // _CDF_BLOCK)
    sums = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=device)
    _sums_kernel[(num_chunks, num_rows)](
        scaled, maxima, floor, sums, vocab_size,
        CHUNKS=num_chunks, WIDE=next_power_of_2(num_chunks), BLOCKS=CHUNK // _CDF_BLOCK,
        CDF_BLOCK=_CDF_BLOCK, num_warps=8,
    )  # fmt: skip
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    best = torch.empty(num_rows, dtype=torch.float32, device=device)
    _pick_kernel[(num_rows,)](
        scaled, maxima, places, floor, sums, slots, positions, tables.floats, tables.ints,
        tables.counts if has_penalties else token_ids, token_ids, best,
        vocab_size, tables.floats.stride(0), tables.ints.stride(0),
        HAS_COUNTS=has_penalties,
        CHUNKS=num_chunks, WIDE=next_power_of_2(num_chunks), CHUNK=CHUNK, BLOCKS=num_blocks,
        WIDE_BLOCKS=next_power_of_2(num_blocks), CDF_BLOCK=_CDF_BLOCK, num_warps=4,
    )  # fmt: skip
    return token_ids, best


@triton.jit
def _scale_kernel(
    logits_ptr,
    slots_ptr,
    floats_ptr,
    counts_ptr,
    in_prompt_ptr,
    scaled_ptr,
    maxima_ptr,
    places_ptr,
    vocab_size,
    logits_stride,
    floats_stride,
    HAS_PENALTIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    params = floats_ptr + slot * floats_stride
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = columns < vocab_size
    x = tl.load(logits_ptr + row * logits_stride + columns, mask=mask, other=float("-inf"))
    if HAS_PENALTIES:
        repetition = tl.load(params + 3)
        frequency = tl.load(params + 4)
        presence = tl.load(params + 5)
        past = slot * vocab_size + columns
        counts = tl.load(counts_ptr + past, mask=mask, other=0)
        in_prompt = tl.load(in_prompt_ptr + past, mask=mask, other=0)
        is_out = counts > 0
        changed = tl.where(x > 0, x / repetition, x * repetition)
        x = tl.where(is_out | (in_prompt != 0), changed, x)
        x = x - frequency * counts.to(tl.float32) - tl.where(is_out, presence, 0.0)
    # a row with a NaN has failed: infinity says so
    x = tl.where(x != x, float("inf"), x)
    temperature = tl.load(params)
    x = x / tl.where(temperature > 0, tl.maximum(temperature, 1e-5), 1.0)
    tl.store(scaled_ptr + row * vocab_size + columns, x, mask=mask)
    maximum, place = tl.max(x, axis=0, return_indices=True)
    here = row * tl.num_programs(0) + chunk
    tl.store(maxima_ptr + here, maximum)
    tl.store(places_ptr + here, chunk * CHUNK + place)


@triton.jit
def _sums_kernel(
    scaled_ptr,
    maxima_ptr,
    floor_ptr,
    sums_ptr,
    vocab_size,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CDF_BLOCK: tl.constexpr,
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    maximum = row_maximum(maxima_ptr, row, CHUNKS, WIDE)
    floor = tl.load(floor_ptr + row)
    blocks = chunk * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * CDF_BLOCK + tl.arange(0, CDF_BLOCK)[None, :]
    x = tl.load(
        scaled_ptr + row * vocab_size + columns, mask=columns < vocab_size, other=float("-inf")
    )
    x = x - maximum
    weights = tl.where(x > floor, tl.exp(x), 0.0)
    tl.store(sums_ptr + row * CHUNKS * BLOCKS + blocks, tl.sum(weights, axis=1))


@triton.jit
def _mix(x):
    # SplitMix64's output function on int64; shifts are made logical by their masks
    x = x + (-7046029254386353131)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (-4658895280553007687)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (-7723592293110705685)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _pick(weights, uniform, places, WIDE: tl.constexpr):
    # where the running sum passes uniform x total; rounding may push that past the last weight
    mass = tl.cumsum(weights, axis=0)
    total = tl.sum(tl.where(places == WIDE - 1, mass, 0.0), axis=0)
    index = tl.sum(tl.where(mass <= uniform * total, 1, 0), axis=0)
    return tl.minimum(index, tl.max(tl.where(weights > 0, places, 0), axis=0))


@triton.jit
def _pick_kernel(
    scaled_ptr,
    maxima_ptr,
    places_ptr,
    floor_ptr,
    sums_ptr,
    slots_ptr,
    positions_ptr,
    floats_ptr,
    ints_ptr,
    counts_ptr,
    token_ids_ptr,
    best_ptr,
    vocab_size,
    floats_stride,
    ints_stride,
    HAS_COUNTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE_BLOCKS: tl.constexpr,
    CDF_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    chunks = tl.arange(0, WIDE)
    maxima = tl.load(maxima_ptr + row * CHUNKS + chunks, mask=chunks < CHUNKS, other=float("-inf"))
    maximum, best_chunk = tl.max(maxima, axis=0, return_indices=True)
    first_best = tl.load(places_ptr + row * CHUNKS + best_chunk)
    seed = tl.load(ints_ptr + slot * ints_stride + 1)
    bits = _mix(_mix(seed) ^ tl.load(positions_ptr + row))
    first = ((bits >> 40) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08
    second = ((bits >> 16) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08
    places = tl.arange(0, WIDE_BLOCKS)
    sums = tl.load(sums_ptr + row * BLOCKS + places, mask=places < BLOCKS, other=0.0)
    block = _pick(sums, first, places, WIDE_BLOCKS)
    inner = tl.arange(0, CDF_BLOCK)
    columns = block * CDF_BLOCK + inner
    x = tl.load(
        scaled_ptr + row * vocab_size + columns, mask=columns < vocab_size, other=float("-inf")
    )
    x = x - maximum
    weights = tl.where(x > tl.load(floor_ptr + row), tl.exp(x), 0.0)
    drawn = block * CDF_BLOCK + _pick(weights, second, inner, CDF_BLOCK)
    temperature = tl.load(floats_ptr + slot * floats_stride)
    token = tl.where(temperature > 0, drawn, first_best)
    token = tl.minimum(token, vocab_size - 1).to(tl.int64)
    tl.store(token_ids_ptr + row, token)
    if HAS_COUNTS:  # slots differ, but for the scratch slot, whose counts mean nothing
        place = counts_ptr + slot * vocab_size + token
        tl.store(place, tl.load(place) + 1)
    tl.store(best_ptr + row, maximum)
