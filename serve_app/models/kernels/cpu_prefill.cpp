// Attention of prompts' chunks over the paged cache, on CPUs with AMX or with AVX-512's dot products
// of bfloat16 (cpu_attend.h): bfloat16 in and out, sums in float32. Scores are computed transposed,
// keys × queries: keys are then read as they lie in the cache, every step of the softmax is one
// vector over 16 queries, and its weights come out in the order that the next product wants. A
// query's bits depend on nothing but itself and its context: keys are taken in spans that begin at
// multiples of SPAN, and what a query may not see adds exact zeros.

#include <algorithm>
#include <cstdint>

#include "cpu_attend.h"
#include "cpu_groups.h"
#include "cpu_vector.h"

#if HAS_DOTS

namespace {

int64_t steps_of(int64_t tokens) { return (tokens + STEP - 1) / STEP; }

// One level of a transposition: blocks of SIZE × SIZE words beside the diagonal change places.
template <int SIZE>
inline void swap_blocks(UintVec* rows) {
  const UintVec lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const UintVec is_right = (lane & SIZE) / SIZE;
  const UintVec upper = lane + is_right * (LANES - SIZE), lower = upper + SIZE;
  for (int i = 0; i < LANES; ++i)
    if (!(i & SIZE)) {
      const UintVec a = rows[i], b = rows[i | SIZE];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i | SIZE] = __builtin_shuffle(a, b, lower);
    }
}

inline void transpose(UintVec* rows) {
  swap_blocks<8>(rows);
  swap_blocks<4>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
}

// Values of 32 tokens, transposed to tiles [16 dimensions][32 tokens]; zeros past the context, whose
// slots may hold anything.
template <int DIM>
void transpose_values(const Prompts& p, const Chunk& chunk, int64_t step, Tile* out) {
  const int64_t width = p.kv_heads * DIM, count = std::min(STEP, chunk.context - step * STEP);
  const int64_t steps = steps_of(chunk.context);
  for (int64_t column = 0; column < width; column += LANES) {
    auto half = [=](int64_t t) {
      HalfVec value{};
      if (t < count)
        std::memcpy(&value, p.values + p.slot(chunk, step * STEP + t) * width + column,
                    sizeof value);
      return __builtin_convertvector(value, UintVec);
    };
    UintVec pairs[LANES];
    for (int i = 0; i < LANES; ++i) pairs[i] = half(2 * i) | half(2 * i + 1) << 16;
    transpose(pairs);
    std::memcpy(out[column / LANES * steps + step], pairs, sizeof pairs);
  }
}

// Pairs of dimensions × queries; queries past the chunk's end become zeros.
template <int DIM>
void pack_queries(const BFloat16* query, int64_t stride, int64_t count, Tile* out) {
  for (int k = 0; k < DIM / STEP; ++k) {
    UintVec pairs[LANES] = {};
    for (int64_t n = 0; n < std::min<int64_t>(count, LANES); ++n)
      std::memcpy(&pairs[n], query + n * stride + k * STEP, sizeof pairs[n]);
    transpose(pairs);
    std::memcpy(out[k], pairs, sizeof pairs);
  }
}

// 2^x for x ≤ 0, to 3 millionths: weights are rounded to bfloat16. Zero below 2^-126, where numbers
// without a leading one would take processors a hundred times as long; NaN stays NaN.
inline __m512 power_of_two(__m512 x) {
  const __m512 least = _mm512_set1_ps(-126.0f);
  const __mmask16 counts = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
  x = _mm512_max_ps(least, x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(9.58284e-3f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.590643e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4024099e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9312419e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(counts, y, whole);
}

// Scores of `count` keys, whole tiles, become weights; lane n is a query that sees the keys below
// `seen` + n. Sums so far are brought to the new largest score.
template <int DIM>
void weigh(float (*scores)[LANES], int64_t count, int64_t seen, float scale, bool is_first,
           Work<DIM>& own, int side) {
  constexpr int CHAINS = 4;  // of sums that wait for each other
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i end = _mm512_add_epi32(lane, _mm512_set1_epi32((int)seen));
  for (int64_t k = std::max<int64_t>(0, seen); k < count; ++k) {
    const __mmask16 is_seen = _mm512_cmpgt_epi32_mask(end, _mm512_set1_epi32((int)k));
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    _mm512_store_ps(scores[k], _mm512_mask_load_ps(hidden, is_seen, scores[k]));
  }
  const __m512 before = own.largest[side];
  __m512 top[CHAINS] = {before, before, before, before}, total[CHAINS] = {};
  for (int64_t k = 0; k < count; k += CHAINS)
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; ++i)
      top[i] = _mm512_max_ps(top[i], _mm512_load_ps(scores[k + i]));
  const __m512 largest =
      _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504f);
  const __m512 base = _mm512_mul_ps(largest, factor);
  const __m512i interleaved = pairs_of_halves();
  for (int64_t k = 0; k < count; k += CHAINS) {
    __m512 weight[CHAINS];
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; ++i) {
      weight[i] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores[k + i]), factor, base));
      total[i] = _mm512_add_ps(total[i], weight[i]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < CHAINS; i += 2)
      _mm512_store_si512(own.weights[side][k / STEP][(k + i) % STEP / 2],
                         _mm512_permutexvar_epi16(
                             interleaved, (__m512i)_mm512_cvtne2ps_pbh(weight[i + 1], weight[i])));
  }
  if (count % STEP) std::memset(own.weights[side][count / STEP][PAIRS / 2], 0, sizeof(Tile) / 2);
  const __m512 all = _mm512_add_ps(_mm512_add_ps(total[0], total[1]),
                                   _mm512_add_ps(total[2], total[3]));
  own.largest[side] = largest;
  if (is_first) {
    own.total[side] = all;
    return;
  }
  const __m512 shrink = power_of_two(_mm512_fmsub_ps(before, factor, base));
  own.total[side] = _mm512_fmadd_ps(own.total[side], shrink, all);
  for (int d = 0; d < DIM; ++d)
    _mm512_store_ps(own.sums[side][d],
                    _mm512_mul_ps(_mm512_load_ps(own.sums[side][d]), shrink));
}

template <int DIM>
void put_rows(const Prompts& p, int64_t row, int64_t head, int64_t count, Work<DIM>& own,
              int side) {
  const Vec share = 1.0f / (Vec)own.total[side];
  for (int d = 0; d < DIM; d += LANES) {
    UintVec rows[LANES];
    for (int i = 0; i < LANES; ++i) rows[i] = (UintVec)(load(own.sums[side][d + i]) * share);
    transpose(rows);
    for (int64_t n = 0; n < count; ++n) {
      const __m256bh halves = _mm512_cvtneps_pbh((__m512)rows[n]);
      std::memcpy(p.out + ((row + n) * p.heads + head) * DIM + d, &halves, sizeof halves);
    }
  }
}

// One query head of 32 rows of a chunk, from row `first` of it on.
template <int DIM, class By>
void attend(const Prompts& p, const Chunk& chunk, int64_t head, int64_t first, const Tile* values,
            Work<DIM>& own) {
  const int64_t kv_head = head / (p.heads / p.kv_heads), steps = steps_of(chunk.context);
  const int64_t rows = std::min(SIDE * LANES, chunk.length - first);
  const int64_t position = chunk.context - chunk.length + first, seen = position + rows;
  values += kv_head * (DIM / LANES) * steps;
  for (int64_t side = 0; side < SIDE; ++side) {
    const int64_t start = chunk.start + first + side * LANES;
    pack_queries<DIM>(p.query + start * p.query_stride + head * DIM, p.query_stride,
                      rows - side * LANES, own.queries[side]);
    own.largest[side] = _mm512_set1_ps(-INFINITY);
  }
  for (int64_t from = 0; from < seen; from += SPAN) {
    const int64_t tiles = (std::min(SPAN, seen - from) + LANES - 1) / LANES;
    By::score(p, chunk, kv_head, from, tiles, own);
    for (int side = 0; side < SIDE; ++side)
      weigh<DIM>(own.scores[side], tiles * LANES, position + side * LANES + 1 - from, p.scale,
                 from == 0, own, side);
    By::mix(values, steps, from / STEP, steps_of(tiles * LANES), from == 0, own);
  }
  for (int side = 0; side < SIDE; ++side)
    put_rows<DIM>(p, chunk.start + first + side * LANES, head,
                  std::min<int64_t>(LANES, rows - side * LANES), own, side);
}

template <int DIM, class By>
void prefill(const Prompts& p, const Chunk* chunks, int64_t num_chunks, Tile* workspace,
             int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Work<DIM> own;
    By::begin();
    Tile* values = workspace;
    for (int64_t c = 0; c < num_chunks; ++c) {
      const int64_t steps = steps_of(chunks[c].context);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t step = 0; step < steps; ++step)
        transpose_values<DIM>(p, chunks[c], step, values);
      values += steps * p.kv_heads * (DIM / LANES);
    }
#pragma omp barrier
    values = workspace;
    for (int64_t c = 0; c < num_chunks; ++c) {
      const int64_t parts = (chunks[c].length + SIDE * LANES - 1) / (SIDE * LANES);
      // The last rows see most: they come first, and the short ones fill the end.
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < parts * p.heads; ++task)
        attend<DIM, By>(p, chunks[c], task % p.heads, (parts - 1 - task / p.heads) * SIDE * LANES,
                    values, own);
      values += steps_of(chunks[c].context) * p.kv_heads * (DIM / LANES);
    }
    By::end();
  }
}

template <template <int> class By>
auto prefill_of(int64_t dim) {
  return dim == 64    ? prefill<64, By<64>>
         : dim == 96  ? prefill<96, By<96>>
         : dim == 128 ? prefill<128, By<128>>
                      : prefill<32, By<32>>;
}

}  // namespace

// query: bfloat16 rows of `heads` · `dim`, `query_stride` apart; out: the same, contiguous.
// keys, values: one layer's [blocks, block_size, kv_heads, dim], block_size a multiple of 16.
// chunks: int64 [num_chunks, 4]: first row, rows, tokens of the context, where its blocks begin in
// `tables`. workspace: kv_heads · dim bfloat16 for each context's tokens, rounded up to 32.
extern "C" void prefill_attention(const BFloat16* query, int64_t query_stride, const BFloat16* keys,
                                  const BFloat16* values, const int64_t* chunks,
                                  int64_t num_chunks, const int64_t* tables, int64_t block_size,
                                  int64_t heads, int64_t kv_heads, int64_t dim, float scale,
                                  void* workspace, BFloat16* out, int threads) {
  const Prompts p{query, keys, values, query_stride, tables, block_size, heads, kv_heads, scale, out};
#if HAS_TILES
  static const bool by_tiles = may_use_tiles();
  auto run = by_tiles ? prefill_of<ByTiles>(dim) : prefill_of<ByDots>(dim);
#else
  auto run = prefill_of<ByDots>(dim);
#endif
  run(p, (const Chunk*)chunks, num_chunks, (Tile*)workspace, threads);
}

#endif

extern "C" int has_prefill_attention() { return HAS_DOTS; }
