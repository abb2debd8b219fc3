// Branch-free scalar functions that g++ vectorises inside `#pragma omp simd` loops.
//
// Only csrc/cpu/*.cpp include this file. Each of them is compiled once per instruction-set level,
// into the namespace TOKFUSE_ISA of that level. Code here must not call inline functions of
// namespace std: the linker keeps one copy of each, which may be the AVX-512 one on a machine
// without AVX-512.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#ifndef TOKFUSE_ISA
#error "compile csrc/cpu/*.cpp through CMake: it defines TOKFUSE_ISA"
#endif

namespace tokfuse {
namespace TOKFUSE_ISA {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kInf = __builtin_inff();

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// One vector register of the level, as a GNU vector type. It is used by the hot loop of sweep.h,
// which must prefetch between elements: a `#pragma omp simd` loop cannot do that. The function
// templates below accept both float and Lanes.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * kLanes)));
typedef float LanesAt __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t WordLanesAt __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

static inline Lanes float_of(WordLanes bits) { return (Lanes)bits; }
static inline WordLanes bits_of(Lanes value) { return (WordLanes)value; }
static inline Lanes splat(float value) { return Lanes{} + value; }

// Reduces a vector by halves. For a loop over v[i], g++ 12 stores and reloads the vector at every
// step; the four reductions of a block then took a fifth of its time.
struct Sum {
  template <class V>
  V operator()(V a, V b) const {
    return a + b;
  }
};
struct Largest {
  template <class V>
  V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};
template <int kWidth>
struct Folded {
  typedef float Vector __attribute__((vector_size(4 * kWidth)));
  typedef float Half __attribute__((vector_size(2 * kWidth)));

  template <class F>
  static inline float by(const F& f, Vector v) {
    Half low, high;
    memcpy(&low, &v, sizeof(Half));
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
    return Folded<kWidth / 2>::by(f, f(low, high));
  }
};
template <>
struct Folded<2> {
  typedef float Vector __attribute__((vector_size(8)));

  template <class F>
  static inline float by(const F& f, Vector v) {
    return f(v[0], v[1]);
  }
};

static inline float sum_of(Lanes v) { return Folded<kLanes>::by(Sum(), v); }
static inline float max_of(Lanes v) { return Folded<kLanes>::by(Largest(), v); }

// Hides a constant from the optimiser. If g++ 12 knows the bound of clamp_exponent, it splits the
// loop body into a clamped and an unclamped branch and merges them with masks. That is 30% slower
// than one maximum.
static inline float opaque(float value) {
  asm("" : "+m"(value));
  return value;
}

// Bounds the exponent from below, at a value where exp2_simd is exactly 0. So an excluded logit
// (-inf) has weight 0, and 0 * x is not NaN. NaN stays NaN. `floor` is opaque(kExponentFloor).
constexpr float kExponentFloor = -127.0f;
template <class F>
static inline F clamp_exponent(F x, F floor) {
  return x < floor ? floor : x;
}

// 2^r for |r| <= 1/2 by a degree-5 minimax polynomial with p(0) = 1. Relative error <= 1.8e-7.
template <class F>
static inline F exp2_of_fraction(F r) {
  F p = r * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  return p * r + 1.0f;
}

// 2^x for x in [-127, 127] in 11 vector instructions. Relative error <= 1.8e-7; exactly 0 below
// -126.5.
//
// x is split into n + r with |r| <= 1/2. Adding kMagic leaves n + 127 in the low mantissa bits.
// Shifted left by 23, they are the bits of 2^n (n = -127 gives +0.0).
template <class F>
static inline F exp2_simd(F x) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  const F t = x + kMagic;
  const F r = x - (t - kMagic);
  return exp2_of_fraction(r) * float_of(bits_of(t) << 23);
}

// The same bits for x in [-125, 127], by adding the exponents: CPUs add integers in more of their
// units than they multiply in.
template <class F>
static inline F exp2_of_bounded(F x) {
  constexpr float kMagic = 12582912.0f;
  const F t = x + kMagic;
  const F r = x - (t - kMagic);
  return float_of(bits_of(exp2_of_fraction(r)) + (bits_of(t) << 23));
}

// tanh(x) with an absolute error <= 2e-7: an odd polynomial near 0, else (1 - e) / (1 + e) with e =
// exp(-2 |x|).
static inline float tanh_simd(float x) {
  const float a = x < 0.0f ? -x : x;
  const float clamped = a > 10.0f ? 10.0f : a;  // tanh(10) rounds to 1
  const float e = exp2_simd(-2.0f * kLog2E * clamped);
  const float large = (1.0f - e) / (1.0f + e);
  const float s = a * a;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float small = a + a * s * p;
  float y = a < 0.625f ? small : large;
  y = a != a ? a : y;
  return x < 0.0f ? -y : y;
}

static inline float load(const float* p, int64_t i) { return p[i]; }

static inline float load(const BFloat16* p, int64_t i) {
  return float_of(static_cast<uint32_t>(p[i].bits) << 16);
}

static inline float load(const Float16* p, int64_t i) {
  const uint32_t h = p[i].bits;
  // A multiplication changes the bias of the exponent. It also converts float16 subnormals exactly.
  const float magnitude = float_of((h & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t bits = bits_of(magnitude) | (magnitude >= 65536.0f ? 0x7f800000u : 0u);
  return float_of(bits | (h & 0x8000u) << 16);
}

static inline void store(float* p, int64_t i, float value) { p[i] = value; }

// Rounds to nearest even; NaN stays NaN.
static inline void store(BFloat16* p, int64_t i, float value) {
  const uint32_t u = bits_of(value);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p[i].bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

static inline void store(Float16* p, int64_t i, float value) {
  const uint32_t u = bits_of(value);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal range: change the exponent's bias and round to nearest even at the 13 dropped bits.
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Subnormal range: adding 0.5 aligns the mantissa, so the hardware does the rounding.
  const uint32_t tiny = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? tiny : normal;
  h = a >= 0x47800000u ? 0x7c00u : h;  // 65536 to inf; rounding takes [65520, 65536) to inf above
  h = a > 0x7f800000u ? 0x7e00u : h;
  p[i].bits = static_cast<uint16_t>(sign | h);
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
