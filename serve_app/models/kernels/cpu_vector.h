// Vectors of 16 numbers that the compiler maps to what the processor has; bfloat16 in memory.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
  uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const BFloat16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UintVec) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(BFloat16* p, Vec v) {  // rounds to nearest even; NaN stays NaN
  UintVec bits = (UintVec)v;
  UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = (IntVec)(v != v) ? UintVec{} + 0x7fc0 : rounded;
  HalfVec h = __builtin_convertvector(rounded, HalfVec);
  std::memcpy(p, &h, sizeof h);
}

inline float sum(Vec v) {
  float parts[LANES];
  std::memcpy(parts, &v, sizeof v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// e^x by 2^n · 2^f, f in [-1/2, 1/2], Taylor to the seventh power: 1 unit of the last place.
inline Vec exp_(Vec x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  Vec scaled = x * 1.44269504f;
  Vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
  Vec whole = (scaled + magic) - magic;
  Vec f = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Vec y = splat(1.0f / 5040) * f + 1.0f / 720;
  y = y * f + 1.0f / 120;
  y = y * f + 1.0f / 24;
  y = y * f + 1.0f / 6;
  y = y * f + 0.5f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  IntVec power = (__builtin_convertvector(whole, IntVec) + 127) << 23;
  return y * (Vec)power;
}

inline float exp_(float x) {
  Vec y = exp_(splat(x));
  return y[0];
}

}  // namespace
