// The hot loop over a row of logits: it adds up one block while it loads the next one.
#pragma once

#include "cpu/lanes16.h"

namespace tokfuse {
namespace TOKFUSE_ISA {

// Columns of a block. Staged as float32 it takes 8 KiB, and two are in use at a time: half of a 32
// KiB L1 cache.
constexpr int64_t kBlock = 2048;

// Keeps block loops out of line. If they are inlined, g++ 12 loses their restrict qualifiers and
// emits scalar code (5x slower), and every caller compiles another copy.
#define TOKFUSE_BLOCK_LOOP __attribute__((noinline, unused))

struct BlockSums {
  float s, sx, s2, s2x, s2xx;
  float max, min;  // of the next block; min is -inf if it is unknown
};

// sum_and_stage and sum_16, the hot loops, compute the exponentials of the current block and find
// the maximum of the `next` one in the same pass. Two separate loops would alternate between
// loading and computing. float32 and the types of Lanes16 are read without staging. Without
// Lanes16, float16 is converted into `buffer`, which the next call reads. With kKeep the
// exponentials are stored in `kept` for the gradient, in the order in which they are computed.
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

  // Adds the exponentials of x <= 0 and returns them. They are exactly 0 below -126. Without kClamp
  // x must not be below -125. `floor` is splat(opaque(kExponentFloor)): g++ 12 compares with a
  // constant and selects, which takes up to four instructions instead of one.
#if defined(__AVX512DQ__)
  static constexpr bool kClampCosts = false;
  // This version takes 12 instead of 15 vector instructions per bfloat16 element: 2.0 ns instead of
  // 2.7 ns per 16 elements (data in L1, Intel Sapphire Rapids). Rounding and scaling are one
  // instruction each. One comparison replaces the clamp; its mask is free to apply, and it keeps 0
  // * -inf out of the sum.
  template <bool kClamp = true>
  Lanes add(Lanes x, Lanes) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);  // true for NaN
    const Lanes r = _mm512_reduce_ps(x, 0);  // x minus the nearest integer
    const Lanes e = _mm512_maskz_scalef_ps(counts, exp2_of_fraction(r), x - r);
    s += e;
    sx = _mm512_mask3_fmadd_ps(e, x, sx, counts);
    s2 += e * e;
    return e;
  }
#else
  static constexpr bool kClampCosts = true;
  template <bool kClamp = true>
  Lanes add(Lanes x, Lanes floor) {
    if (kClamp) x = clamp_exponent(x, floor);
    const Lanes e = kClamp ? exp2_simd(x) : exp2_of_bounded(x);
    s += e;
    sx += e * x;
    s2 += e * e;
    return e;
  }
#endif
};

static inline BlockSums block_sums(const LaneSums& a, const LaneSums& b, float max, float min) {
  return {sum_of(a.s + b.s), sum_of(a.sx + b.sx), sum_of(a.s2 + b.s2), 0.0f, 0.0f, max, min};
}

// The range of a whole block.
template <class T>
TOKFUSE_BLOCK_LOOP static Range16<T> range_of(const T* u) {
  Range16<T> range;
  for (int64_t j = 0; j < kBlock; j += kLanes16) range.add(u + j);
  return range;
}

template <bool kKeep>
TOKFUSE_BLOCK_LOOP static void sum_and_stage(const float* __restrict u, float c, float shift,
                                             const float* __restrict next, const float* after,
                                             float*, float* __restrict kept, BlockSums* out) {
  const Lanes floor = splat(opaque(kExponentFloor));
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
    const Lanes e = a.add(x, floor), f = b.add(y, floor);
    if (kKeep) {
      *reinterpret_cast<LanesAt*>(kept + j) = e;
      *reinterpret_cast<LanesAt*>(kept + j + kLanes) = f;
    }
  }
  *out = block_sums(a, b, max_of(m), -kInf);
}

template <bool kKeep, bool kClamp, class T>
TOKFUSE_BLOCK_LOOP static void sum_16(const T* __restrict u, float c, float shift,
                                      const T* __restrict next, const T* after,
                                      float* __restrict kept, BlockSums* out) {
  const Lanes floor = splat(opaque(kExponentFloor));
  LaneSums a, b;
  Range16<T> range;
  for (int64_t j = 0; j < kBlock; j += kLanes16) {
    if (j % 32 == 0) prefetch(after + j);
    range.add(next + j);
    Lanes x, y;
    Lanes16<T>::split(u + j, &x, &y);
    const Lanes e = a.add<kClamp>(x * c - shift, floor), f = b.add<kClamp>(y * c - shift, floor);
    if (kKeep) {
      *reinterpret_cast<LanesAt*>(kept + j) = e;
      *reinterpret_cast<LanesAt*>(kept + j + kLanes) = f;
    }
  }
  *out = block_sums(a, b, range.max(), LaneSums::kClampCosts ? range.min() : -kInf);
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
  *out = {s, sx, s2, 0.0f, 0.0f, m, -kInf};
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
