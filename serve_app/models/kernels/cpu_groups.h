// What products with packed weights share: their layout, a product's operands, decoding.
//
// Layout, for blocks of 16 rows of W (lanes) and each of a block's groups:
//   4 bits: [4][16][2] words; nibble j of word [q][n][p]: the code of row n, column 2 (4q + j) + p
//   8 bits: [32][16] bytes; byte [k][n]: the code of row n, column k
//   scales, and offsets where there are any: 16 numbers each; where 2 or 4 groups (2^wider) have
//   the same, they are there once.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_vector.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t GROUP = 32;
constexpr int64_t AHEAD = 4096;       // bytes
constexpr int64_t PANEL = 128;       // rows of x that stay in a core's cache while W passes by
constexpr int64_t WIDE_PANEL = 512;  // the same where W is rounded first, which takes its time

struct Problem {
  const uint8_t* codes;
  const void* scales;
  const void* offsets;  // or null: all zero
  const float* bias;    // or null
  void* y;
  bool has_wide_output;  // y is float32, not bfloat16
  int64_t rows, columns, outputs;
  int wider;

  // Where the scales (and offsets) of a block's group begin.
  int64_t scale_of(int64_t block, int64_t group) const {
    return (block * (columns / GROUP >> wider) + (group >> wider)) * LANES;
  }

  void put(int64_t row, int64_t block, Vec v) const {
    const int64_t at = row * outputs + block * LANES;
    has_wide_output ? store((float*)y + at, v) : store((BFloat16*)y + at, v);
  }
};

struct Float16 {
  uint16_t bits;
};

inline Vec load(const Float16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  const UintVec wide = __builtin_convertvector(h, UintVec);
  // The exponents' bases differ by 112; subnormal numbers come out right too.
  const Vec size = (Vec)((wide & 0x7fff) << 13) * 0x1p112f;
  return (Vec)((UintVec)size | (wide & 0x8000) << 16);
}

// Sums of each group of a row: what its offset is multiplied by.
template <class X>
void sum_groups(const X* x, int64_t columns, float* sums) {
  for (int64_t k = 0; k < columns; k += GROUP)
    *sums++ = sum(load(x + k) + load(x + k + LANES));
}

// What comes soon: the processor's own prefetching ends with each page of memory. Inlined at once,
// as GCC may take a function that only prefetches for one without effect.
__attribute__((always_inline)) inline void prefetch(const uint8_t* codes, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(codes + AHEAD + line);
}

inline Vec whole_numbers(const int8_t* p) {
#ifdef __AVX512F__
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  int8_t bytes __attribute__((vector_size(LANES)));
  int16_t words __attribute__((vector_size(2 * LANES)));
  std::memcpy(&bytes, p, sizeof bytes);
  words = __builtin_convertvector(bytes, decltype(words));
  return __builtin_convertvector(__builtin_convertvector(words, IntVec), Vec);
#endif
}

// The codes of columns 2i and 2i + 1 of 16 rows, as floats.
template <int BITS>
inline void decode_pair(const uint8_t* group, int i, Vec& even, Vec& odd) {
  if constexpr (BITS == 4) {
    UintVec words;
    std::memcpy(&words, group + i / 4 * sizeof words, sizeof words);
    const int shift = i % 4 * 4;
#ifdef __AVX512F__
    // Only the low four bits of an index count.
    const Vec table{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    even = __builtin_shuffle(table, (IntVec)(words >> shift));
    odd = __builtin_shuffle(table, (IntVec)(words >> (shift + 16)));
#else
    even = __builtin_convertvector((IntVec)((words >> shift) & 15), Vec);
    odd = __builtin_convertvector((IntVec)((words >> (shift + 16)) & 15), Vec);
#endif
  } else {
    even = whole_numbers((const int8_t*)group + 2 * i * LANES);
    odd = whole_numbers((const int8_t*)group + (2 * i + 1) * LANES);
  }
}

}  // namespace
