// The two products of attention: scores, keys × queries, and their weights with the values; by dot
// products, or by AMX's tiles. Both take numbers in the layout of tiles.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu_dots.h"
#include "cpu_tiles.h"

#if HAS_DOTS

namespace {

constexpr int64_t SPAN = 128;  // keys between two corrections of the largest score
constexpr int64_t SIDE = 2;    // tiles of queries that share what is read of keys and values
constexpr int64_t PAIRS = 16;  // rows of a tile of numbers in pairs
constexpr int64_t STEP = 2 * PAIRS;

typedef uint16_t Tile[PAIRS][2 * LANES];

// As in `chunks`: rows of the query, tokens of the context up to the last row, the block table.
struct Chunk {
  int64_t start, length, context, table;
};

struct Prompts {
  const BFloat16 *query, *keys, *values;
  int64_t query_stride;
  const int64_t* tables;
  int64_t block_size, heads, kv_heads;
  float scale;
  BFloat16* out;

  // Number of a chunk's token in the cache.
  int64_t slot(const Chunk& chunk, int64_t token) const {
    return tables[chunk.table + token / block_size] * block_size + token % block_size;
  }
};

template <int DIM>
struct alignas(64) Work {
  Tile queries[SIDE][DIM / STEP];
  float scores[SIDE][SPAN][LANES];
  Tile weights[SIDE][SPAN / STEP];
  float sums[SIDE][DIM][LANES];
  __m512 largest[SIDE], total[SIDE];
};

// Half of each side's tile, the pairs from `column` on.
template <int64_t COUNT>
inline void fetch(const Tile (&tiles)[SIDE][COUNT], int64_t column,
                  __m512i (&out)[SIDE][LANES / 2]) {
  for (int side = 0; side < SIDE; ++side)
    for (int i = 0; i < LANES / 2; ++i)
      out[side][i] = _mm512_load_si512(tiles[side][column / STEP][column % STEP / 2 + i]);
}

// Adds products of 16 columns to row m of each side's sums.
template <int64_t COUNT>
inline void add_row(const BFloat16* x, const __m512i (&weights)[SIDE][LANES / 2], bool is_first,
                    float (&sums)[SIDE][COUNT][LANES], int64_t m) {
  Vec own[SIDE] = {};
  if (!is_first)
    for (int side = 0; side < SIDE; ++side) own[side] = load(sums[side][m]);
  add_dots(x, weights, own);
  for (int side = 0; side < SIDE; ++side) store(sums[side][m], own[side]);
}

// `score`: scores of `tiles` times 16 keys from `first` on. `mix`: adds weights · values, dimensions ×
// queries, to the sums of both tiles of queries.
template <int DIM>
struct ByDots {
  static void begin() {}
  static void end() {}

  static void score(const Prompts& p, const Chunk& chunk, int64_t head, int64_t first,
                    int64_t tiles, Work<DIM>& own) {
    const int64_t width = p.kv_heads * DIM;
    for (int64_t column = 0; column < DIM; column += LANES) {
      __m512i queries[SIDE][LANES / 2];
      fetch(own.queries, column, queries);
      for (int64_t t = 0; t < tiles; ++t) {
        const BFloat16* keys = p.keys + p.slot(chunk, first + t * LANES) * width + head * DIM;
        for (int64_t m = 0; m < LANES; ++m)
          add_row(keys + m * width + column, queries, column == 0, own.scores, t * LANES + m);
      }
    }
  }

  static void mix(const Tile* values, int64_t all_steps, int64_t first, int64_t steps,
                  bool is_first, Work<DIM>& own) {
    for (int64_t column = 0; column < steps * STEP; column += LANES) {
      __m512i weights[SIDE][LANES / 2];
      fetch(own.weights, column, weights);
      for (int64_t d = 0; d < DIM; ++d) {
        const Tile& tile = values[d / LANES * all_steps + first + column / STEP];
        const BFloat16* value = (const BFloat16*)tile[d % LANES] + column % STEP;
        add_row(value, weights, is_first && column == 0, own.sums, d);
      }
    }
  }
};

#if HAS_TILES

template <int DIM>
struct ByTiles {
  static void begin() { configure_tiles(LANES); }
  static void end() { _tile_release(); }

  static void score(const Prompts& p, const Chunk& chunk, int64_t head, int64_t first,
                    int64_t tiles, Work<DIM>& own) {
    publish();
    const int64_t width = p.kv_heads * DIM, stride = width * sizeof(BFloat16);
    for (int64_t t = 0; t < tiles; t += 2) {
      const int64_t next = std::min(t + 1, tiles - 1);  // the last may be computed twice
      const BFloat16* upper = p.keys + p.slot(chunk, first + t * LANES) * width + head * DIM;
      const BFloat16* lower = p.keys + p.slot(chunk, first + next * LANES) * width + head * DIM;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int k = 0; k < DIM / STEP; ++k) {
        _tile_loadd(4, upper + k * STEP, stride);
        _tile_loadd(5, lower + k * STEP, stride);
        _tile_loadd(6, own.queries[0][k], 64);
        _tile_loadd(7, own.queries[1][k], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, own.scores[0][t * LANES], 64);
      _tile_stored(1, own.scores[1][t * LANES], 64);
      _tile_stored(2, own.scores[0][next * LANES], 64);
      _tile_stored(3, own.scores[1][next * LANES], 64);
    }
    publish();
  }

  static void mix(const Tile* values, int64_t all_steps, int64_t first, int64_t steps,
                  bool is_first, Work<DIM>& own) {
    publish();
    for (int d = 0; d < DIM / LANES; d += 2) {
      if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, own.sums[0][d * LANES], 64);
        _tile_loadd(1, own.sums[1][d * LANES], 64);
        _tile_loadd(2, own.sums[0][(d + 1) * LANES], 64);
        _tile_loadd(3, own.sums[1][(d + 1) * LANES], 64);
      }
      for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, values[d * all_steps + first + k], 64);
        _tile_loadd(5, values[(d + 1) * all_steps + first + k], 64);
        _tile_loadd(6, own.weights[0][k], 64);
        _tile_loadd(7, own.weights[1][k], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, own.sums[0][d * LANES], 64);
      _tile_stored(1, own.sums[1][d * LANES], 64);
      _tile_stored(2, own.sums[0][(d + 1) * LANES], 64);
      _tile_stored(3, own.sums[1][(d + 1) * LANES], 64);
    }
    publish();
  }
};

#endif

}  // namespace

#endif
