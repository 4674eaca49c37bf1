// The small operators between the matrix products of a decoder layer, for CPUs: what ATen does in
// five to fifteen calls each is one call here. Compiled where it runs (see cpu.py), so the vectors
// below become whatever the processor has. Every row is computed by itself and in one order: its
// bits depend neither on the other rows nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_team.h"
#include "cpu_vector.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t CHUNK = 64;         // tokens that one task of attention reads
constexpr int64_t TOGETHER = 512;     // bytes of a token's keys that it reads, in whole heads
constexpr int64_t SMALL = 24 * 1024;  // elements below which a second thread costs more than it saves

template <class Body>
void for_each_row(int64_t rows, int64_t work, Workers workers, Body body) {
  const int64_t shares = work < SMALL ? 1 : 2 * workers.threads;
  workers.share_out(rows, (rows + shares - 1) / shares, [=](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) body(row);
  });
}

template <class T>
void add_rms_norm(const T* x, const float* residual, const float* weight, T* out, float* summed,
                  int64_t rows, int64_t hidden, float eps, Workers workers) {
  for_each_row(rows, rows * hidden, workers, [=](int64_t row) {
    const int64_t start = row * hidden;
    Vec squares{};
    for (int64_t i = start; i < start + hidden; i += LANES) {
      Vec v = load(x + i);
      if (residual) v += load(residual + i);
      store(summed + i, v);
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / hidden + eps);
    for (int64_t i = 0; i < hidden; i += LANES)
      store(out + start + i, load(summed + start + i) * scale * load(weight + i));
  });
}

template <class T>
void silu_and_mul(const T* gate_up, T* out, int64_t rows, int64_t inner, Workers workers) {
  for_each_row(rows, rows * inner, workers, [=](int64_t row) {
    const T* gate = gate_up + row * 2 * inner;
    const T* up = gate + inner;
    for (int64_t i = 0; i < inner; i += LANES) {
      Vec g = load(gate + i);
      store(out + row * inner + i, g / (exp_(-g) + 1.0f) * load(up + i));
    }
  });
}

// One head, normalised where `weight` is given, rotated by its halves, to `out` (which may be `x`).
template <class T>
void rotate_head(const T* x, T* out, const T* cos, const T* sin, const float* weight, int64_t dim,
                 float eps) {
  float scale = 1.0f;
  if (weight) {
    Vec squares{};
    for (int64_t i = 0; i < dim; i += LANES) squares += load(x + i) * load(x + i);
    scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
  }
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    Vec low = load(x + i), high = load(x + half + i);
    if (weight) {
      low *= scale * load(weight + i);
      high *= scale * load(weight + half + i);
    }
    store(out + i, low * load(cos + i) + high * load(sin + i));
    store(out + half + i, high * load(cos + half + i) + low * load(sin + half + i));
  }
}

template <class T>
void rotate_and_cache(T* qkv, const T* cos, const T* sin, const int64_t* slots, T* keys, T* values,
                      int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                      const float* query_weight, const float* key_weight, float eps, Workers workers) {
  const int64_t width = (heads + 2 * kv_heads) * dim;
  for_each_row(rows, rows * width, workers, [=](int64_t row) {
    T* x = qkv + row * width;
    const T *c = cos + row * dim, *s = sin + row * dim;
    for (int64_t h = 0; h < heads; ++h)
      rotate_head(x + h * dim, x + h * dim, c, s, query_weight, dim, eps);
    const int64_t place = slots[row] * kv_heads * dim;
    x += heads * dim;
    for (int64_t h = 0; h < kv_heads; ++h)
      rotate_head(x + h * dim, keys + place + h * dim, c, s, key_weight, dim, eps);
    std::memcpy(values + place, x + kv_heads * dim, kv_heads * dim * sizeof(T));
  });
}

// One level of a tree that sums 16 vectors to one: lanes of a and b in runs of RUN, neighbours added.
template <int RUN>
inline Vec fold(Vec a, Vec b) {
  IntVec lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  IntVec from_b = (lane / RUN) % 2 * (LANES - RUN);
  return __builtin_shuffle(a, b, lane + from_b) + __builtin_shuffle(a, b, lane + from_b + RUN);
}

// Lane t: the sum of v[t]'s lanes, each by the same tree.
inline Vec sums_of(const Vec* v) {
  Vec pairs[8], quads[4], octets[2];
  for (int i = 0; i < 8; ++i) pairs[i] = fold<1>(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 4; ++i) quads[i] = fold<2>(pairs[2 * i], pairs[2 * i + 1]);
  for (int i = 0; i < 2; ++i) octets[i] = fold<4>(quads[2 * i], quads[2 * i + 1]);
  return fold<8>(octets[0], octets[1]);
}

// Products of a query head and a key, to be summed over the lanes.
template <int DIM, class T>
inline Vec products(const T* query, const T* key) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == sizeof(BFloat16)) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < DIM; i += 2 * LANES)
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(query + i),
                             (__m512bh)_mm512_loadu_si512(key + i));
    return (Vec)sum;
  }
#endif
  Vec sum = load(query) * load(key);
  for (int i = LANES; i < DIM; i += LANES) sum += load(query + i) * load(key + i);
  return sum;
}

// Adds `count` tokens' values, weighted, to the sums of HEADS query heads that lie `stride` apart;
// COLUMNS of each, as many as stay in registers.
template <class T, int COLUMNS, int HEADS>
inline void mix(const T* values, const int64_t* places, int64_t count, const float* weights,
                float* sums, int64_t stride) {
  constexpr int PARTS = COLUMNS / LANES;
  Vec mixed[HEADS][PARTS];
  for (int h = 0; h < HEADS; ++h)
    for (int p = 0; p < PARTS; ++p) mixed[h][p] = load(sums + h * stride + p * LANES);
  for (int64_t t = 0; t < count; ++t) {
    const T* value = values + places[t];
    for (int p = 0; p < PARTS; ++p) {
      const Vec part = load(value + p * LANES);
      for (int h = 0; h < HEADS; ++h) mixed[h][p] += part * weights[h * CHUNK + t];
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int p = 0; p < PARTS; ++p) store(sums + h * stride + p * LANES, mixed[h][p]);
}

template <class T>
using Mix = void (*)(const T*, const int64_t*, int64_t, const float*, float*, int64_t);

// Scores become weights, e^(score - largest); `result` gets the largest and the weights' sum.
inline void weigh(float* scores, int64_t count, int64_t padded, float scale, float* result) {
  for (int64_t t = count; t < padded; ++t) scores[t] = -INFINITY;
  Vec top = load(scores);
  for (int64_t t = LANES; t < padded; t += LANES) {
    Vec s = load(scores + t);
    top = s > top ? s : top;
  }
  float largest = -INFINITY;
  for (int lane = 0; lane < LANES; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  Vec weights_sum{};
  for (int64_t t = 0; t < padded; t += LANES) {
    Vec s = load(scores + t);
    Vec w = s == splat(-INFINITY) ? Vec{} : exp_((s - largest) * scale);
    store(scores + t, w);
    weights_sum += w;
  }
  result[0] = largest * scale;
  result[1] = sum(weights_sum);
}

// What one task reads: tokens of one sequence, for key/value heads that lie side by side.
template <class T>
struct Part {
  const T *keys, *values;
  int64_t places[CHUNK];  // of the tokens' first head
  int64_t count, heads, group;
  float scale;

  // Inlined at once: GCC takes a function that only prefetches for one without effect, and drops it.
  template <int DIM>
  __attribute__((always_inline)) void fetch(const T* of, int64_t start) const {
    for (int64_t t = start; t < std::min(start + LANES, count); ++t)
      for (int64_t i = 0; i < heads * DIM; i += 64 / (int64_t)sizeof(T))
        __builtin_prefetch(of + places[t] + i);
  }
};

// Softmax-weighted sum of a part's tokens for each of its query heads: `partial` gets per query
// head DIM sums, the largest score and the sum of weights. Blocks lie anywhere in a large memory, so
// the next keys, and values for the second loop, are fetched while scores are computed.
template <class T, int DIM>
void attend_part(const Part<T>& part, const T* query, float* partial) {
  constexpr int COLUMNS = DIM > 64 ? 32 : DIM;
  constexpr int64_t MOST = 16 * LANES / COLUMNS;  // query heads that `mix` takes at once
  constexpr Mix<T> MIXES[] = {mix<T, COLUMNS, 1>, mix<T, COLUMNS, 2>, mix<T, COLUMNS, 3>,
                              mix<T, COLUMNS, 4>, mix<T, COLUMNS, 5>, mix<T, COLUMNS, 6>,
                              mix<T, COLUMNS, 7>, mix<T, COLUMNS, 8>};
  const int64_t group = part.group, padded = (part.count + LANES - 1) / LANES * LANES;
  float scores[part.heads * group * CHUNK];
  part.template fetch<DIM>(part.keys, 0);
  for (int64_t start = 0; start < padded; start += LANES) {
    part.template fetch<DIM>(part.keys, start + LANES);
    part.template fetch<DIM>(part.values, start);
    for (int64_t h = 0; h < part.heads * group; ++h) {
      const T* keys = part.keys + h / group * DIM;
      Vec all[LANES];
      for (int t = 0; t < LANES; ++t)
        all[t] = products<DIM>(query + h * DIM, keys + part.places[start + t]);
      store(scores + h * CHUNK + start, sums_of(all));
    }
  }
  for (int64_t h = 0; h < part.heads * group; ++h) {
    float* result = partial + h * (DIM + 2);
    weigh(scores + h * CHUNK, part.count, padded, part.scale, result + DIM);
    for (int i = 0; i < DIM; i += LANES) store(result + i, Vec{});
  }
  for (int64_t head = 0; head < part.heads; ++head) {
    const T* values = part.values + head * DIM;
    for (int64_t g = 0, taken; g < group; g += taken) {
      const int64_t h = head * group + g;
      taken = std::min(group - g, MOST);
      for (int i = 0; i < DIM; i += COLUMNS)
        MIXES[taken - 1](values + i, part.places, part.count, scores + h * CHUNK,
                         partial + h * (DIM + 2) + i, DIM + 2);
    }
  }
}

// Parts of one sequence, in their order, to the output heads.
template <class T, int DIM>
void combine(const float* partials, int64_t chunks, int64_t heads, T* out) {
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t step = heads * (DIM + 2);
    const float* own = partials + h * (DIM + 2);
    float largest = own[DIM];
    for (int64_t c = 1; c < chunks; ++c)
      largest = own[c * step + DIM] > largest ? own[c * step + DIM] : largest;
    Vec mixed[DIM / LANES] = {};
    float total = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) {
      const float weight = exp_(own[c * step + DIM] - largest);
      total += own[c * step + DIM + 1] * weight;
      for (int p = 0; p < DIM / LANES; ++p) mixed[p] += load(own + c * step + p * LANES) * weight;
    }
    for (int p = 0; p < DIM / LANES; ++p) store(out + h * DIM + p * LANES, mixed[p] / total);
  }
}

template <class T, int DIM>
void decode_attention(const T* query, int64_t query_stride, const T* keys, const T* values,
                      const int64_t* tables, int64_t table_width, const int64_t* lens,
                      int64_t block_size, int64_t rows, int64_t heads, int64_t kv_heads,
                      float scale, int64_t max_chunks, float* partials, T* out, Workers workers) {
  const int64_t group = heads / kv_heads;
  const int64_t side = std::max<int64_t>(1, TOGETHER / (DIM * (int64_t)sizeof(T)));
  const int64_t bundles = (kv_heads + side - 1) / side;
  const int64_t size = heads * (DIM + 2);
  const int64_t tasks = rows * max_chunks * bundles;
  auto attend = [=](int64_t task) {
    const int64_t head = task % bundles * side, pair = task / bundles;
    const int64_t row = pair / max_chunks, first = pair % max_chunks * CHUNK;
    const int64_t len = lens[row] > 0 ? lens[row] : 1;
    if (first >= len) return;
    Part<T> part{keys, values};
    part.count = std::min(CHUNK, len - first);
    part.heads = std::min(side, kv_heads - head);
    part.group = group;
    part.scale = scale;
    const int64_t* block = tables + row * table_width + first / block_size;
    int64_t offset = first % block_size;
    for (int64_t t = 0; t < part.count; ++block, offset = 0)
      for (; offset < block_size && t < part.count; ++offset, ++t)
        part.places[t] = ((*block * block_size + offset) * kv_heads + head) * DIM;
    // Whole vectors of scores are computed; those past the end count for nothing.
    std::fill(part.places + part.count, part.places + CHUNK, part.places[0]);
    attend_part<T, DIM>(part, query + row * query_stride + head * group * DIM,
                        partials + pair * size + head * group * (DIM + 2));
  };
  auto finish = [=](int64_t row) {
    const int64_t len = lens[row] > 0 ? lens[row] : 1;
    combine<T, DIM>(partials + row * max_chunks * size, (len + CHUNK - 1) / CHUNK, heads,
                    out + row * heads * DIM);
  };
  int64_t work = 0;
  for (int64_t row = 0; row < rows; ++row) work += lens[row] * kv_heads * DIM;
  const bool is_small = work < SMALL;
  workers.share_out(tasks, is_small ? tasks : 1, [=](int64_t first, int64_t end) {
    for (int64_t task = first; task < end; ++task) attend(task);
  });
  for_each_row(rows, is_small ? 0 : SMALL, workers, finish);
}

}  // namespace

#define FOR_TYPE(NAME, T)                                                                          \
  extern "C" void add_rms_norm_##NAME(const T* x, const float* residual, const float* weight,      \
                                      T* out, float* summed, int64_t rows, int64_t hidden,         \
                                      float eps, int threads, Member* member) {                    \
    add_rms_norm(x, residual, weight, out, summed, rows, hidden, eps, {threads, member});          \
  }                                                                                                \
  extern "C" void silu_and_mul_##NAME(const T* gate_up, T* out, int64_t rows, int64_t inner,       \
                                      int threads, Member* member) {                               \
    silu_and_mul(gate_up, out, rows, inner, {threads, member});                                    \
  }                                                                                                \
  extern "C" void rotate_and_cache_##NAME(                                                         \
      T* qkv, const T* cos, const T* sin, const int64_t* slots, T* keys, T* values, int64_t rows,  \
      int64_t heads, int64_t kv_heads, int64_t dim, const float* query_weight,                     \
      const float* key_weight, float eps, int threads, Member* member) {                           \
    rotate_and_cache(qkv, cos, sin, slots, keys, values, rows, heads, kv_heads, dim, query_weight, \
                     key_weight, eps, {threads, member});                                          \
  }                                                                                                \
  extern "C" void decode_attention_##NAME(                                                         \
      const T* query, int64_t query_stride, const T* keys, const T* values, const int64_t* tables, \
      int64_t table_width, const int64_t* lens, int64_t block_size, int64_t rows, int64_t heads,   \
      int64_t kv_heads, int64_t dim, float scale, int64_t max_chunks, float* partials, T* out,     \
      int threads, Member* member) {                                                               \
    auto run = dim == 64    ? decode_attention<T, 64>                                              \
               : dim == 96  ? decode_attention<T, 96>                                              \
               : dim == 128 ? decode_attention<T, 128>                                             \
                            : decode_attention<T, 32>;                                             \
    run(query, query_stride, keys, values, tables, table_width, lens, block_size, rows, heads,     \
        kv_heads, scale, max_chunks, partials, out, {threads, member});                            \
  }

FOR_TYPE(float32, float)
FOR_TYPE(bfloat16, BFloat16)
