// x · Wᵀ on CPUs with W in 4- or 8-bit groups of 32 columns, w = code · scale + offset, read as it
// is packed. A group's products are summed with the whole numbers of the codes, and only the sum is
// scaled, so that a weight is never rounded. Every row is computed by itself and in one order,
// whatever the number of rows: its bits depend neither on the batch nor on the threads. Only where
// the caller lets many rows meet rounded weights (`rounds_weights`) do they differ from few rows'.

#include <algorithm>
#include <cstdint>

#include "cpu_dots.h"
#include "cpu_groups.h"
#include "cpu_team.h"
#include "cpu_tiles.h"
#include "cpu_vector.h"

namespace {

constexpr int64_t FEW_ROWS = 4;  // up to which vectors are as fast as tiles

// What multiplies bfloat16: the processor's best. Each gives a row bits of its own.
enum Means : int { VECTORS, DOTS, TILES };

// Even and odd columns are summed apart and the two sums added, as tiles do it.
template <int ROWS, int BITS, class S>
void multiply_rows(const Problem& p, const float* x, const float* sums, int64_t block,
                   int64_t row) {
  constexpr int64_t BYTES = BITS * LANES * GROUP / 8;
  const int64_t groups = p.columns / GROUP;
  const uint8_t* codes = p.codes + block * groups * BYTES;
  const S* scales = (const S*)p.scales + p.scale_of(block, 0);
  const S* offsets = p.offsets ? (const S*)p.offsets + p.scale_of(block, 0) : nullptr;
  Vec total[ROWS];
  for (Vec& v : total) v = p.bias ? load(p.bias + block * LANES) : Vec{};
  for (int64_t g = 0; g < groups; ++g, codes += BYTES) {
    prefetch(codes, BYTES);
    Vec even_sum[ROWS] = {}, odd_sum[ROWS] = {};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      Vec even, odd;
      decode_pair<BITS>(codes, i, even, odd);
      for (int r = 0; r < ROWS; ++r) {
        const float* own = x + (row + r) * p.columns + g * GROUP + 2 * i;
        even_sum[r] += even * own[0];
        odd_sum[r] += odd * own[1];
      }
    }
    const int64_t at = (g >> p.wider) * LANES;
    const Vec scale = load(scales + at);
    for (int r = 0; r < ROWS; ++r) total[r] += (even_sum[r] + odd_sum[r]) * scale;
    if (offsets)
      for (int r = 0; r < ROWS; ++r)
        total[r] += load(offsets + at) * sums[(row + r) * groups + g];
  }
  for (int r = 0; r < ROWS; ++r) p.put(row + r, block, total[r]);
}

template <int BITS, class S>
void multiply_by_vectors(const Problem& p, const float* x, const float* sums, int64_t block) {
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) multiply_rows<4, BITS, S>(p, x, sums, block, row);
  for (; row + 2 <= p.rows; row += 2) multiply_rows<2, BITS, S>(p, x, sums, block, row);
  for (; row < p.rows; ++row) multiply_rows<1, BITS, S>(p, x, sums, block, row);
}

template <int BITS, class S>
void multiply_panel(const Problem& p, Workers workers, const BFloat16* x, const float* wide,
                    const float* sums, bool rounds_weights) {
  const int64_t blocks = p.outputs / LANES;
  // Blocks are handed out: a core that another program takes away holds up the rest for less.
  const int64_t share = std::max<int64_t>(1, blocks / (8 * workers.threads));
  if (wide) {
    workers.share_out(blocks, share, [&](int64_t first, int64_t end) {
      for (int64_t block = first; block < end; ++block)
        multiply_by_vectors<BITS, S>(p, wide, sums, block);
    });
    return;
  }
#if HAS_TILES
  const int64_t tiles = (p.rows + LANES - 1) / LANES;
  const int tile_rows = (int)((p.rows + tiles - 1) / tiles);
  if (rounds_weights)
    workers.share_out((blocks + 1) / 2, (share + 1) / 2, [&](int64_t first, int64_t end) {
      static thread_local WideScratch own;
      configure_tiles(tile_rows);
      for (int64_t pair = first; pair < end; ++pair)
        multiply_by_wide_tiles<BITS, S>(p, x, pair, tile_rows, own);
      _tile_release();
    });
  else
    workers.share_out(blocks, share, [&](int64_t first, int64_t end) {
      static thread_local Scratch own;
      configure_tiles(tile_rows);
      for (int64_t block = first; block < end; ++block)
        multiply_by_tiles<BITS, S>(p, x, sums, block, tile_rows, own);
      _tile_release();
    });
#endif
}

#if HAS_DOTS
template <int BITS, class S, int SIDES, bool ROUNDS>
void multiply_by_dots(const Problem& p, Workers workers, const BFloat16* x,
                      const DotRows& packed) {
  const int64_t tasks = (p.outputs / LANES + SIDES - 1) / SIDES;
  const int64_t rows_at_once = std::max<int64_t>(8, p.rows / (2 * workers.threads));
  workers.share_out(p.rows, rows_at_once, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) pack_row(p, x, row, packed);
  });
  const int64_t share = std::max<int64_t>(1, tasks / (8 * workers.threads));
  workers.share_out(tasks, share, [&](int64_t first, int64_t end) {
    for (int64_t task = first; task < end; ++task)
      DotProduct<BITS, S, SIDES, ROUNDS>(p, task).multiply(packed);
  });
}

// `workspace`: room for x and the sums of its groups.
template <int BITS, class S>
void multiply_by_dots(const Problem& p, Workers workers, const BFloat16* x, float* workspace,
                      bool rounds_weights) {
  const DotRows packed{(BFloat16*)workspace, workspace + p.rows * p.columns / 2};
  // Pairs of blocks leave too few tasks for many threads.
  const bool by_two = p.outputs / LANES >= 8 * workers.threads;
  if (rounds_weights)
    by_two ? multiply_by_dots<BITS, S, 2, true>(p, workers, x, packed)
           : multiply_by_dots<BITS, S, 1, true>(p, workers, x, packed);
  else
    by_two ? multiply_by_dots<BITS, S, 2, false>(p, workers, x, packed)
           : multiply_by_dots<BITS, S, 1, false>(p, workers, x, packed);
}
#endif

template <class X>
void sum_rows(const Problem& p, const X* x, float* sums) {
  for (int64_t row = 0; p.offsets && row < p.rows; ++row)
    sum_groups(x + row * p.columns, p.columns, sums + row * (p.columns / GROUP));
}

template <int BITS, class S>
void multiply(const Problem& whole, Workers workers, const float* x, const BFloat16* narrow,
              float* workspace, Means means, bool rounds_weights) {
#if HAS_DOTS
  if (narrow && means == DOTS)
    return multiply_by_dots<BITS, S>(whole, workers, narrow, workspace, rounds_weights);
#endif
  Problem p = whole;
  float* sums = workspace + std::min(whole.rows, PANEL) * p.columns;
  const int64_t output_bytes = p.has_wide_output ? sizeof(float) : sizeof(BFloat16);
  const int64_t step = rounds_weights ? WIDE_PANEL : PANEL;
  for (int64_t row = 0; row < whole.rows; row += step) {
    p.rows = std::min(step, whole.rows - row);
    p.y = (char*)whole.y + row * p.outputs * output_bytes;
    const BFloat16* panel = narrow ? narrow + row * p.columns : nullptr;
    const float* wide = narrow ? nullptr : x + row * p.columns;
    const bool is_few = means == TILES && p.rows <= FEW_ROWS && !rounds_weights;
    const bool widens = narrow && (means == VECTORS || is_few);
    workers.once([&] {
      if (!rounds_weights) narrow ? sum_rows(p, panel, sums) : sum_rows(p, wide, sums);
      for (int64_t i = 0; widens && i < p.rows * p.columns; i += LANES)
        store(workspace + i, load(panel + i));
    });
    multiply_panel<BITS, S>(p, workers, panel, widens ? workspace : wide, sums, rounds_weights);
  }
}

}  // namespace

extern "C" int best_means() {
#if HAS_TILES
  if (may_use_tiles()) return TILES;
#endif
  return HAS_DOTS ? DOTS : VECTORS;
}

// x is float32 where `wide_input`, else bfloat16; y likewise. `wide_scales`: float32, not float16.
// `wider`: 2^wider groups share what stands once in `scales` and `offsets`.
// `rounds_weights`: to bfloat16, which is faster for many rows; needs tiles and a narrow x.
// `workspace`: room for rows · (columns + columns / 32) floats, or of 128 rows without DOTS.
extern "C" void packed_linear(const void* x, const uint8_t* codes, const void* scales,
                              const void* offsets, const float* bias, float* workspace, void* y,
                              int64_t rows, int64_t columns, int64_t outputs, int bits,
                              int wider, int wide_input, int wide_output, int wide_scales, int means,
                              int rounds_weights, int threads, Member* member) {
  const Problem p{codes, scales, offsets, bias, y, wide_output != 0,
                  rows, columns, outputs, wider};
  const float* wide = wide_input ? (const float*)x : nullptr;
  const BFloat16* narrow = wide_input ? nullptr : (const BFloat16*)x;
  auto run = bits == 4 ? (wide_scales ? multiply<4, float> : multiply<4, Float16>)
                       : (wide_scales ? multiply<8, float> : multiply<8, Float16>);
  run(p, {threads, member}, wide, narrow, workspace, (Means)means, rounds_weights);
}
