// The hot loop over a row of logits: it adds up one block while it loads the next one.
#pragma once

#include "cpu/vec.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace tokfuse {
namespace TOKFUSE_ISA {

// Columns of a block. Staged as float32 it takes 8 KiB, and two are in use at a time: half of a 32
// KiB L1 cache.
constexpr int64_t kBlock = 2048;

// Keeps block loops out of line. If they are inlined, g++ 12 loses their restrict qualifiers and
// emits scalar code (5x slower), and every caller compiles another copy.
#define TOKFUSE_BLOCK_LOOP __attribute__((noinline, unused))

struct BlockSums {
  float s, sx, s2, s2x, s2xx, max;
};

// sum_and_stage, the hot loop, computes the exponentials of the current block and finds the maximum
// of the `next` one in the same pass. Two separate loops would alternate between loading and
// computing. float32 and bfloat16 are read without staging. float16 is converted into `buffer`,
// which the next call reads. With kKeep the exponentials are stored in `kept` for the gradient;
// those of bfloat16 are stored as all low halves, then all high halves.
//
// The loop also prefetches `after`, one block before its use. The hardware prefetcher stops at
// every 4 KiB page, which is one block of bfloat16, and at every tile. Without the prefetch
// bfloat16 rows take 1.5 to 2.4 times as long and float32 rows 1.2 to 1.4 times. A prefetch past
// the end of the memory is harmless.
static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Running sums, one per vector lane. A loop uses two sets of them, so that successive additions are
// independent.
struct LaneSums {
  Lanes s = {}, sx = {}, s2 = {};

  // Adds the exponentials of x <= 0 and returns them. They are exactly 0 below -126.
#if defined(__AVX512DQ__)
  // This version takes 12 instead of 15 vector instructions per bfloat16 element: 2.0 ns instead of
  // 2.7 ns per 16 elements (data in L1, Intel Sapphire Rapids). Rounding and scaling are one
  // instruction each. One comparison replaces the clamp; its mask is free to apply, and it keeps 0
  // * -inf out of the sum.
  Lanes add(Lanes x) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);  // true for NaN
    const Lanes r = _mm512_reduce_ps(x, 0);  // x minus the nearest integer
    const Lanes e = _mm512_maskz_scalef_ps(counts, exp2_of_fraction(r), x - r);
    s += e;
    sx = _mm512_mask3_fmadd_ps(e, x, sx, counts);
    s2 += e * e;
    return e;
  }
#else
  Lanes add(Lanes x) {
    x = clamp_exponent(x, splat(kExponentFloor));
    const Lanes e = exp2_simd(x);
    s += e;
    sx += e * x;
    s2 += e * e;
    return e;
  }
#endif
};

// The maximum of many pairs of bfloat16.
#if defined(__AVX512BW__)
// The bits of bfloat16 are compared as 16-bit integers. The integers have the order of the bfloat16
// values, except that two negative values have the reverse order.
struct PairMax {
  __m512i largest = _mm512_set1_epi16(INT16_MIN), least = _mm512_set1_epi16(-1);

  void add(WordLanes pairs) {
    largest = _mm512_max_epi16(largest, (__m512i)pairs);
    least = _mm512_min_epu16(least, (__m512i)pairs);
  }

  // The maximum; may be NaN if one of the values is.
  float value() const {
    const __m512i flipped = _mm512_sub_epi16(_mm512_set1_epi16(INT16_MAX), largest);
    const int high = INT16_MAX - static_cast<int>(least_of(flipped));
    return float_of((high >= 0 ? static_cast<uint32_t>(high) : least_of(least)) << 16);
  }

 private:
  static uint32_t least_of(__m512i v) {
    const __m256i half =
        _mm256_min_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i part =
        _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(part))) & 0xffffu;
  }
};
#else
struct PairMax {
  Lanes largest = splat(-kInf);

  void add(WordLanes pairs) {
    const Lanes v = low_half(pairs), w = high_half(pairs);
    const Lanes larger = v > w ? v : w;
    largest = larger > largest ? larger : largest;
  }

  float value() const { return max_of(largest); }
};
#endif

static inline BlockSums block_sums(const LaneSums& a, const LaneSums& b, float max) {
  return {sum_of(a.s + b.s), sum_of(a.sx + b.sx), sum_of(a.s2 + b.s2), 0.0f, 0.0f, max};
}

// The maximum of a whole block.
TOKFUSE_BLOCK_LOOP static float max_of_pairs(const BFloat16* u) {
  PairMax m;
  for (int64_t j = 0; j < kBlock; j += 2 * kLanes) {
    m.add(*reinterpret_cast<const WordLanesAt*>(u + j));
  }
  return m.value();
}

template <bool kKeep>
TOKFUSE_BLOCK_LOOP static void sum_and_stage(const float* __restrict u, float c, float shift,
                                             const float* __restrict next, const float* after,
                                             float*, float* __restrict kept, BlockSums* out) {
  LaneSums a, b;
  Lanes m = splat(-kInf);
  for (int64_t j = 0; j < kBlock; j += 2 * kLanes) {
    const Lanes v = *reinterpret_cast<const LanesAt*>(next + j);
    const Lanes w = *reinterpret_cast<const LanesAt*>(next + j + kLanes);
    if (j % 16 == 0) prefetch(after + j);
    if (kLanes == 16) prefetch(after + j + 16);
    const Lanes larger = v > w ? v : w;
    m = larger > m ? larger : m;
    const Lanes x = *reinterpret_cast<const LanesAt*>(u + j) * c - shift;
    const Lanes y = *reinterpret_cast<const LanesAt*>(u + j + kLanes) * c - shift;
    const Lanes e = a.add(x), f = b.add(y);
    if (kKeep) {
      *reinterpret_cast<LanesAt*>(kept + j) = e;
      *reinterpret_cast<LanesAt*>(kept + j + kLanes) = f;
    }
  }
  *out = block_sums(a, b, max_of(m));
}

template <bool kKeep>
TOKFUSE_BLOCK_LOOP static void sum_and_stage(const BFloat16* __restrict u, float c, float shift,
                                             const BFloat16* __restrict next, const BFloat16* after,
                                             float*, float* __restrict kept, BlockSums* out) {
  LaneSums a, b;
  PairMax m;
  for (int64_t j = 0; j < kBlock / 2; j += kLanes) {
    const WordLanes later = *reinterpret_cast<const WordLanesAt*>(next + 2 * j);
    const WordLanes pair = *reinterpret_cast<const WordLanesAt*>(u + 2 * j);
    if (j % 16 == 0) prefetch(after + 2 * j);
    m.add(later);
    const Lanes x = low_half(pair) * c - shift, y = high_half(pair) * c - shift;
    const Lanes e = a.add(x), f = b.add(y);
    if (kKeep) {
      *reinterpret_cast<LanesAt*>(kept + j) = e;
      *reinterpret_cast<LanesAt*>(kept + kBlock / 2 + j) = f;
    }
  }
  *out = block_sums(a, b, m.value());
}

template <bool kKeep>
TOKFUSE_BLOCK_LOOP static void sum_and_stage(const float* __restrict u, float c, float shift,
                                             const Float16* __restrict next, const Float16* after,
                                             float* __restrict buffer, float* __restrict kept,
                                             BlockSums* out) {
  for (int64_t j = 0; j < kBlock; j += 32) prefetch(after + j);
  const float floor = opaque(kExponentFloor);
  float s = 0, sx = 0, s2 = 0, m = -kInf;
#pragma omp simd reduction(+ : s, sx, s2) reduction(max : m)
  for (int64_t j = 0; j < kBlock; j++) {
    const float v = load(next, j);
    buffer[j] = v;
    m = v > m ? v : m;
    const float x = clamp_exponent(u[j] * c - shift, floor);
    const float e = exp2_simd(x);
    if (kKeep) kept[j] = e;
    s += e;
    sx += e * x;
    s2 += e * e;
  }
  *out = {s, sx, s2, 0.0f, 0.0f, m};
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
