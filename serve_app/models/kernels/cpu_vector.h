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

}  // namespace
