// Products with packed weights by AVX-512's dot products of bfloat16 pairs, where there are no tiles.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_groups.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_DOTS 1
#else
#define HAS_DOTS 0
#endif

#if HAS_DOTS

namespace {

// Columns 2i and 2i + 1 of 16 rows of W as pairs of bfloat16, side by side, for i from 8 · half on:
// whole numbers up to 256 are exact.
template <int BITS>
inline void widen_half(const uint8_t* group, int half, __m512i (&out)[LANES / 2]) {
  if constexpr (BITS == 4) {
    const __m512i table = _mm512_set_epi16(
        0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0, 0x40a0,
        0x4080, 0x4040, 0x4000, 0x3f80, 0, 0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110,
        0x4100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0);
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      __m512i words = _mm512_loadu_si512(group + (2 * half + q) * 64);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, words = _mm512_srli_epi16(words, 4))
        // Only the low five bits of an index count, and the table's halves are alike.
        out[4 * q + j] = _mm512_permutexvar_epi16(words, table);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      Vec even, odd;
      decode_pair<BITS>(group, half * LANES / 2 + i, even, odd);
      out[i] = (__m512i)(((UintVec)even >> 16) | ((UintVec)odd & 0xffff0000));
    }
  }
}

// Adds the products of eight pairs of columns of x with each side's weights, 16 rows of W side by
// side. With two sides what is read of x is used twice, and all weights stay in registers.
template <int SIDES>
inline void add_dots(const BFloat16* x, const __m512i (&weights)[SIDES][LANES / 2],
                     Vec (&sums)[SIDES]) {
#pragma GCC unroll 8
  for (int i = 0; i < LANES / 2; ++i) {
    int32_t pair;
    std::memcpy(&pair, x + 2 * i, sizeof pair);
    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
    for (int side = 0; side < SIDES; ++side)
      sums[side] = (Vec)_mm512_dpbf16_ps((__m512)sums[side], (__m512bh)weights[side][i], both);
  }
}

// How two vectors that _mm512_cvtne2ps_pbh laid one behind the other become pairs.
inline __m512i pairs_of_halves() {
  return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                          21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
}

// A group's weights, rounded to bfloat16, as `widen_half` has its codes.
template <int BITS>
inline void round_half(const uint8_t* group, int half, Vec scale, Vec offset,
                       __m512i (&out)[LANES / 2]) {
  const __m512i interleaved = pairs_of_halves();
#pragma GCC unroll 8
  for (int i = 0; i < LANES / 2; ++i) {
    Vec even, odd;
    decode_pair<BITS>(group, half * LANES / 2 + i, even, odd);
    const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)(odd * scale + offset),
                                                (__m512)(even * scale + offset));
    out[i] = _mm512_permutexvar_epi16(interleaved, (__m512i)halves);
  }
}

// Rows of x in panels of DOT_PANEL, each [groups][rows][32], and the sums of groups, which codes
// need: [groups][rows] for each panel.
struct DotRows {
  BFloat16* x;
  float* sums;
};

constexpr int64_t DOT_PANEL = 128;  // rows whose sums stay in a core's nearest cache

inline void pack_row(const Problem& p, const BFloat16* x, int64_t row, const DotRows& out) {
  const int64_t first = row / DOT_PANEL * DOT_PANEL, groups = p.columns / GROUP;
  const int64_t rows = std::min(DOT_PANEL, p.rows - first);
  for (int64_t g = 0; g < groups; ++g) {
    const BFloat16* own = x + row * p.columns + g * GROUP;
    const int64_t at = first * groups + g * rows + row - first;
    std::memcpy(out.x + at * GROUP, own, GROUP * sizeof(BFloat16));
    if (p.offsets) out.sums[at] = sum(load(own) + load(own + LANES));
  }
}

// One or two blocks of W by all rows of x; at the end a block is its own neighbour. Weights are
// codes, scaled in the group's sum, or with ROUNDS bfloat16 as a dense copy has them.
template <int BITS, class S, int SIDES, bool ROUNDS>
struct DotProduct {
  static constexpr int64_t BYTES = BITS * LANES * GROUP / 8;
  static constexpr int PAIRS = LANES / 2;

  const Problem& p;
  int64_t blocks[SIDES];
  const uint8_t* codes[SIDES];
  float totals[DOT_PANEL][SIDES][LANES], partials[DOT_PANEL][SIDES][LANES];

  DotProduct(const Problem& problem, int64_t task) : p(problem) {
    for (int side = 0; side < SIDES; ++side) {
      blocks[side] = std::min(SIDES * task + side, p.outputs / LANES - 1);
      codes[side] = p.codes + blocks[side] * (p.columns / GROUP) * BYTES;
    }
  }

  void multiply(const DotRows& rows) {
    for (int64_t first = 0; first < p.rows; first += DOT_PANEL) {
      const int64_t at = first * (p.columns / GROUP);
      multiply_panel({rows.x + at * GROUP, rows.sums + at}, first,
                     std::min(DOT_PANEL, p.rows - first));
    }
  }

  void multiply_panel(DotRows panel, int64_t first, int64_t rows) {
    for (int side = 0; side < SIDES; ++side) {
      const Vec start = p.bias ? load(p.bias + blocks[side] * LANES) : Vec{};
      for (int64_t r = 0; r < rows; ++r) store(totals[r][side], start);
    }
    for (int64_t g = 0; g < p.columns / GROUP; ++g, panel.x += rows * GROUP, panel.sums += rows)
      multiply_group(panel, g, rows);
    for (int side = 0; side < SIDES; ++side)
      for (int64_t r = 0; r < rows; ++r) p.put(first + r, blocks[side], load(totals[r][side]));
  }

  void multiply_group(const DotRows& panel, int64_t g, int64_t rows) {
    Vec scales[SIDES], offsets[SIDES];
    for (int side = 0; side < SIDES; ++side) {
      prefetch(codes[side] + g * BYTES, BYTES);
      const int64_t at = p.scale_of(blocks[side], g);
      scales[side] = load((const S*)p.scales + at);
      offsets[side] = p.offsets ? load((const S*)p.offsets + at) : Vec{};
    }
    __m512i weights[SIDES][PAIRS];
    auto fetch = [&](int half) {
      for (int side = 0; side < SIDES; ++side)
        if constexpr (ROUNDS)
          round_half<BITS>(codes[side] + g * BYTES, half, scales[side], offsets[side],
                           weights[side]);
        else
          widen_half<BITS>(codes[side] + g * BYTES, half, weights[side]);
    };
    fetch(0);
    for (int64_t r = 0; r < rows; ++r) {
      Vec sums[SIDES] = {};
      if constexpr (ROUNDS)
        for (int side = 0; side < SIDES; ++side) sums[side] = load(totals[r][side]);
      add_dots(panel.x + r * GROUP, weights, sums);
      for (int side = 0; side < SIDES; ++side)
        store((ROUNDS ? totals : partials)[r][side], sums[side]);
    }
    fetch(1);
    for (int64_t r = 0; r < rows; ++r) {
      Vec sums[SIDES];
      for (int side = 0; side < SIDES; ++side)
        sums[side] = load((ROUNDS ? totals : partials)[r][side]);
      add_dots(panel.x + r * GROUP + LANES, weights, sums);
      for (int side = 0; side < SIDES; ++side) {
        if constexpr (!ROUNDS) {
          sums[side] = load(totals[r][side]) + sums[side] * scales[side];
          if (p.offsets) sums[side] += offsets[side] * panel.sums[r];
        }
        store(totals[r][side], sums[side]);
      }
    }
  }
};

}  // namespace

#endif
