// Products with packed weights through AMX's tiles of bfloat16, where the compiler knows them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu_dots.h"
#include "cpu_groups.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

#if HAS_TILES

namespace {

constexpr int AT_ONCE = 4;  // groups whose sums are scaled together
constexpr int64_t CHUNK_GROUPS = 8;
constexpr int64_t WIDE_CHUNK_GROUPS = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

struct alignas(64) Scratch {
  uint16_t weights[CHUNK_GROUPS][LANES][2 * LANES];
  float products[2][AT_ONCE][LANES][LANES];
  float totals[PANEL / LANES][LANES][LANES];
};

struct alignas(64) WideScratch {
  uint16_t weights[WIDE_CHUNK_GROUPS][2][LANES][2 * LANES];
  float totals[WIDE_PANEL / LANES][2][LANES][LANES];
};

// Asks Linux for the tile registers' state, which a process has to do once.
bool may_use_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// Puts what was written to memory there: the compiler does not know that tiles read it.
inline void publish() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3: products [rows, 16]; 4 and 5: x [rows, 32]; 6 and 7: weights [16 pairs, 16, 2].
void configure_tiles(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = 64;
    config.rows[tile] = tile < 6 ? rows : LANES;
  }
  publish();
  _tile_loadconfig(&config);
}

// Products of `COUNT` groups, unscaled, to `products`.
template <int COUNT>
inline void multiply_groups(float (*products)[LANES][LANES], const BFloat16* x, int64_t columns,
                            const uint16_t (*weights)[LANES][2 * LANES]) {
#define PRODUCT(TILE, X, W)                                       \
  if constexpr (COUNT > TILE) {                                   \
    _tile_zero(TILE);                                             \
    _tile_loadd(X, x + TILE * GROUP, columns * sizeof(BFloat16)); \
    _tile_loadd(W, weights[TILE], 64);                            \
    _tile_dpbf16ps(TILE, X, W);                                   \
    _tile_stored(TILE, products[TILE], 64);                       \
  }
  PRODUCT(0, 4, 6)
  PRODUCT(1, 5, 7)
  PRODUCT(2, 4, 6)
  PRODUCT(3, 5, 7)
#undef PRODUCT
}

// Adds `COUNT` groups of a block, from `first` on, to the totals of `rows` rows.
template <int COUNT, class S>
inline void add_groups(const Problem& p, const float (*products)[LANES][LANES],
                       float (*totals)[LANES], int64_t block, int64_t first, const float* sums,
                       int rows) {
  const int64_t groups = p.columns / GROUP;
  Vec scale[COUNT], offset[COUNT];
  for (int g = 0; g < COUNT; ++g)
    scale[g] = load((const S*)p.scales + p.scale_of(block, first + g));
  if (!p.offsets) {
    for (int r = 0; r < rows; ++r) {
      Vec total = load(totals[r]);
      for (int g = 0; g < COUNT; ++g) total += load(products[g][r]) * scale[g];
      store(totals[r], total);
    }
    return;
  }
  for (int g = 0; g < COUNT; ++g)
    offset[g] = load((const S*)p.offsets + p.scale_of(block, first + g));
  for (int r = 0; r < rows; ++r) {
    Vec total = load(totals[r]);
    for (int g = 0; g < COUNT; ++g) {
      total += load(products[g][r]) * scale[g];
      total += offset[g] * sums[r * groups + g];
    }
    store(totals[r], total);
  }
}

template <int BITS, class S>
void multiply_by_tiles(const Problem& p, const BFloat16* x, const float* sums, int64_t block,
                       int tile_rows, Scratch& own) {
  constexpr int64_t BYTES = BITS * LANES * GROUP / 8;
  const int64_t groups = p.columns / GROUP;
  const int64_t tiles = (p.rows + tile_rows - 1) / tile_rows;
  const uint8_t* codes = p.codes + block * groups * BYTES;
  const Vec start = p.bias ? load(p.bias + block * LANES) : Vec{};
  // The last tile may overlap the one before: the same rows give the same bits twice.
  auto row_of = [=](int64_t t) { return std::min(t * tile_rows, p.rows - tile_rows); };
  for (int64_t t = 0; t < tiles; ++t)
    for (int r = 0; r < tile_rows; ++r) store(own.totals[t][r], start);
  int turn = 0, waiting = 0;  // products of the step before are scaled while tiles multiply
  int64_t waiting_tile = 0, waiting_group = 0;
  auto add_waiting = [&]() {
    const float* own_sums = sums + row_of(waiting_tile) * groups + waiting_group;
    auto add = [&](auto count) {
      add_groups<decltype(count)::value, S>(p, own.products[1 - turn], own.totals[waiting_tile],
                                            block, waiting_group, own_sums, tile_rows);
    };
    if (waiting == AT_ONCE) add(std::integral_constant<int, AT_ONCE>{});
    else if (waiting) add(std::integral_constant<int, 1>{});
  };
  for (int64_t first = 0; first < groups; first += CHUNK_GROUPS) {
    const int64_t count = std::min(CHUNK_GROUPS, groups - first);
    for (int64_t g = 0; g < count; ++g, codes += BYTES) {
      prefetch(codes, BYTES);
      for (int half = 0; half < 2; ++half) {
        __m512i pairs[LANES / 2];
        widen_half<BITS>(codes, half, pairs);
        for (int i = 0; i < LANES / 2; ++i)
          _mm512_store_si512(own.weights[g][half * LANES / 2 + i], pairs[i]);
      }
    }
    publish();
    for (int64_t t = 0; t < tiles; ++t) {
      const BFloat16* rows = x + row_of(t) * p.columns + first * GROUP;
      for (int64_t g = 0; g < count;) {
        const int at_once = count - g >= AT_ONCE ? AT_ONCE : 1;
        if (at_once == AT_ONCE)
          multiply_groups<AT_ONCE>(own.products[turn], rows + g * GROUP, p.columns,
                                   own.weights + g);
        else
          multiply_groups<1>(own.products[turn], rows + g * GROUP, p.columns, own.weights + g);
        add_waiting();
        waiting = at_once, waiting_tile = t, waiting_group = first + g;
        turn = 1 - turn;
        g += at_once;
      }
    }
  }
  add_waiting();
  for (int64_t t = 0; t < tiles; ++t)
    for (int r = 0; r < tile_rows; ++r)
      p.put(row_of(t) + r, block, load(own.totals[t][r]));
}

// A group's weights, rounded to bfloat16, in the order that tiles want.
template <int BITS>
inline void round_weights(const uint8_t* group, Vec scale, Vec offset,
                          uint16_t (*out)[2 * LANES]) {
  const __m512i interleaved = pairs_of_halves();
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    Vec even, odd;
    decode_pair<BITS>(group, i, even, odd);
    const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)(odd * scale + offset),
                                                (__m512)(even * scale + offset));
    _mm512_store_si512(out[i], _mm512_permutexvar_epi16(interleaved, (__m512i)halves));
  }
}

// Many rows: weights are rounded once, and sums stay in tiles for all columns. Two blocks of W and
// two tiles of rows at a time, so that what is loaded is used twice; at an end a block or a tile is
// its own neighbour, and is computed twice.
template <int BITS, class S>
void multiply_by_wide_tiles(const Problem& p, const BFloat16* x, int64_t pair, int tile_rows,
                            WideScratch& own) {
  constexpr int64_t BYTES = BITS * LANES * GROUP / 8;
  const int64_t groups = p.columns / GROUP;
  const int64_t tiles = (p.rows + tile_rows - 1) / tile_rows;
  const int64_t blocks[2] = {2 * pair, std::min(2 * pair + 1, p.outputs / LANES - 1)};
  auto row_of = [=](int64_t t) { return std::min(t * tile_rows, p.rows - tile_rows); };
  const int64_t stride = p.columns * sizeof(BFloat16);
  for (int64_t first = 0; first < groups; first += WIDE_CHUNK_GROUPS) {
    const int64_t count = std::min(WIDE_CHUNK_GROUPS, groups - first);
    for (int side = 0; side < 2; ++side)
      for (int64_t g = 0; g < count; ++g) {
        const int64_t at = blocks[side] * groups + first + g;
        prefetch(p.codes + at * BYTES, BYTES);
        const int64_t scaled = p.scale_of(blocks[side], first + g);
        const Vec scale = load((const S*)p.scales + scaled);
        const Vec offset = p.offsets ? load((const S*)p.offsets + scaled) : Vec{};
        round_weights<BITS>(p.codes + at * BYTES, scale, offset, own.weights[g][side]);
      }
    publish();
    for (int64_t t = 0; t < tiles; t += 2) {
      const int64_t next = std::min(t + 1, tiles - 1);
      const BFloat16* upper = x + row_of(t) * p.columns + first * GROUP;
      const BFloat16* lower = x + row_of(next) * p.columns + first * GROUP;
      if (first == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, own.totals[t][0], 64);
        _tile_loadd(1, own.totals[t][1], 64);
        _tile_loadd(2, own.totals[next][0], 64);
        _tile_loadd(3, own.totals[next][1], 64);
      }
      for (int64_t g = 0; g < count; ++g) {
        _tile_loadd(4, upper + g * GROUP, stride);
        _tile_loadd(5, lower + g * GROUP, stride);
        _tile_loadd(6, own.weights[g][0], 64);
        _tile_loadd(7, own.weights[g][1], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, own.totals[t][0], 64);
      _tile_stored(1, own.totals[t][1], 64);
      _tile_stored(2, own.totals[next][0], 64);
      _tile_stored(3, own.totals[next][1], 64);
    }
  }
  for (int64_t t = 0; t < tiles; ++t)
    for (int r = 0; r < tile_rows; ++r)
      for (int side = 0; side < 2; ++side) {
        const Vec bias = p.bias ? load(p.bias + blocks[side] * LANES) : Vec{};
        p.put(row_of(t) + r, blocks[side], load(own.totals[t][side][r]) + bias);
      }
}

}  // namespace

#endif
