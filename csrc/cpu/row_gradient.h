// Gradient of one row of logits from its statistics: one read, one write and one exponential per
// element. rows.h has the formula.
#pragma once

#include "cpu/rows.h"

namespace tokfuse {
namespace TOKFUSE_ISA {

// The hot loop of the gradient: du = e (a0 + a1 x). `out` may be `u`.
TOKFUSE_BLOCK_LOOP static void gradient_block(const float* u, int64_t n, float c, float shift,
                                              float a0, float a1, float* out) {
  const float floor = opaque(kExponentFloor);
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const float x = clamp_exponent(u[j] * c - shift, floor);
    out[j] = exp2_simd(x) * (a0 + a1 * x);
  }
}

// The same from kept exponentials. Without an entropy term (a1 = 0) `u` is not read.
TOKFUSE_BLOCK_LOOP static void kept_gradient_block(const float* u, const float* __restrict e,
                                                   int64_t n, float c, float shift, float a0,
                                                   float a1, float* out) {
  if (a1 == 0.0f) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) out[j] = e[j] * a0;
    return;
  }
  const float floor = opaque(kExponentFloor);
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    out[j] = e[j] * (a0 + a1 * clamp_exponent(u[j] * c - shift, floor));
  }
}

// The same for whole pairs of bfloat16. `out` may be `u`. A NaN in the result must have its low 16
// bits 0 (round_to_upper).
TOKFUSE_BLOCK_LOOP static void gradient_pairs(const Bf16Pair* u, int64_t pairs, float c,
                                              float shift, float a0, float a1, Bf16Pair* out) {
  const float floor = opaque(kExponentFloor);
#pragma omp simd
  for (int64_t j = 0; j < pairs; j++) {
    const uint32_t pair = u[j];
    const float x = clamp_exponent(low_half(pair) * c - shift, floor);
    const float y = clamp_exponent(high_half(pair) * c - shift, floor);
    out[j] = pair_of(exp2_simd(x) * (a0 + a1 * x), exp2_simd(y) * (a0 + a1 * y));
  }
}

TOKFUSE_BLOCK_LOOP static void kept_gradient_pairs(const Bf16Pair* u, const float* __restrict e,
                                                   float c, float shift, float a0, float a1,
                                                   Bf16Pair* out) {
  const float* __restrict f = e + kBlock / 2;
  if (a1 == 0.0f) {
#pragma omp simd
    for (int64_t j = 0; j < kBlock / 2; j++) out[j] = pair_of(e[j] * a0, f[j] * a0);
    return;
  }
  const float floor = opaque(kExponentFloor);
#pragma omp simd
  for (int64_t j = 0; j < kBlock / 2; j++) {
    const uint32_t pair = u[j];
    const float x = clamp_exponent(low_half(pair) * c - shift, floor);
    const float y = clamp_exponent(high_half(pair) * c - shift, floor);
    out[j] = pair_of(e[j] * (a0 + a1 * x), f[j] * (a0 + a1 * y));
  }
}

static inline float gradient_at(float u, float c, float shift, float a0, float a1) {
  const float x = clamp_exponent(u * c - shift, kExponentFloor);
  return exp2_simd(x) * (a0 + a1 * x);
}

// Constants of the gradient e (a0 + a1 x) of one row.
struct Slopes {
  float c, shift, a0, a1;
};

// The same constants for exponentials kept relative to `kept_shift`.
static inline Slopes rebased(const Slopes& s, float kept_shift) {
  const float f = static_cast<float>(::exp2(static_cast<double>(kept_shift) - s.shift));
  return {s.c, s.shift, s.a0 * f, s.a1 * f};
}

// Returns the target's entry for ga * logp + gh * entropy + gl * lse, before the slope of a
// softcap. It is not computed as the entry of any element plus scale * ga, because the two cancel
// near p = 1.
static inline float target_gradient(float scale, float logp, float entropy, float ga, float gh,
                                    float gl = 0.0f) {
  const double lp = logp, p = ::exp(lp);
  const double log_term = p == 0 ? 0.0 : p * (lp + entropy);
  return static_cast<float>(scale * (-ga * ::expm1(lp) - gh * log_term + gl * p));
}

// Gradient of one block of a row. `out` may be `u`. The caller overwrites the target's entry later.
static inline void gradient_of_block(const float* u, int64_t begin, int64_t n, const Slopes& s,
                                     const KeptExps* kept, float* out) {
  if (kept != nullptr && kept->shift[begin / kBlock] != kNotKept) {
    const Slopes k = rebased(s, kept->shift[begin / kBlock]);
    kept_gradient_block(u, kept->e + begin, n, k.c, k.shift, k.a0, k.a1, out);
  } else {
    gradient_block(u, n, s.c, s.shift, s.a0, s.a1, out);
  }
}

static inline void gradient_of_block(const BFloat16* u, int64_t begin, int64_t n, const Slopes& s,
                                     const KeptExps* kept, BFloat16* out) {
  const Bf16Pair* pairs = reinterpret_cast<const Bf16Pair*>(u);
  Bf16Pair* to = reinterpret_cast<Bf16Pair*>(out);
  const float last = load(u, n - 1);
  if (kept != nullptr && kept->shift[begin / kBlock] != kNotKept) {
    const Slopes k = rebased(s, kept->shift[begin / kBlock]);
    kept_gradient_pairs(pairs, kept->e + begin, k.c, k.shift, k.a0, k.a1, to);
  } else {
    gradient_pairs(pairs, n / 2, s.c, s.shift, s.a0, s.a1, to);
    if (n % 2 != 0) store(out, n - 1, gradient_at(last, s.c, s.shift, s.a0, s.a1));
  }
}

// Multiplies by d (softcapped logit) / d (scaled logit). The slope is computed from the logits in
// the row, before the bias is subtracted.
template <class T>
TOKFUSE_BLOCK_LOOP static void scale_by_slope(const Row<T>& row, const Transform& f, int64_t begin,
                                              int64_t n, float* __restrict du) {
  const T* z = row.block(begin) + begin;
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const float t = tanh_simd(load(z, j) * f.pre);
    du[j] *= 1.0f - t * t;
  }
}

template <class T>
TOKFUSE_BLOCK_LOOP static void store_block(const float* __restrict values, int64_t n,
                                           T* __restrict out) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) store(out, j, values[j]);
}

// Further terms of the gradient of a row: gl * lse + gu * sum_j weight_j u_j.
struct FurtherTerms {
  float gl = 0.0f, gu = 0.0f;
  const float* weight = nullptr;  // (V); null: 1
};

TOKFUSE_BLOCK_LOOP static void add_weights(float* __restrict du, const float* __restrict weight,
                                           int64_t n, float k) {
  if (weight == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) du[j] += k;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) du[j] += k * weight[j];
  }
}

// Writes the gradient of ga * logp + gh * entropy, and of further terms, of one row to `out`, which
// may be the row itself. A row whose coefficients are all 0 is filled with zeros and not read.
// Plain float32 and bfloat16 logits take one loop from the row to the output. All others take
// separate loops for conversion, gradient and rounding over a block in L1: with g++ 12 one loop of
// mixed widths is 25% slower.
template <class T, bool kTransform>
static inline void row_backward(const Row<T>& row, const Transform& f, float c, float scale,
                                float shift, float inv_sum, float logp, float entropy, float ga,
                                float gh, T* out, const KeptExps* kept = nullptr,
                                const FurtherTerms& more = {}) {
  constexpr bool kDirect = !IsSame<T, Float16>::value && !kTransform;
  const int64_t vocab = row.vocab;
  auto width = [vocab](int64_t begin) { return vocab - begin < kBlock ? vocab - begin : kBlock; };
  // Address of the block at `begin` in the output, which has the same tiles as the row.
  auto out_block = [&](int64_t begin) { return out + (row.block(begin) - row.z) + begin; };
  if ((ga == 0.0f && gh == 0.0f && more.gl == 0.0f && more.gu == 0.0f) || inv_sum == 0.0f) {
    const int64_t piece = row.tile < vocab ? row.tile : vocab;
    for (int64_t begin = 0; begin < vocab; begin += piece) {
      const int64_t n = vocab - begin < piece ? vocab - begin : piece;
      memset(static_cast<void*>(out_block(begin)), 0, static_cast<size_t>(n) * sizeof(T));
    }
    return;
  }
  const double ln_s = -::log(static_cast<double>(inv_sum));
  Slopes s = {c, shift,
              static_cast<float>(-scale * inv_sum * (ga - more.gl + gh * (entropy - ln_s))),
              static_cast<float>(-scale * inv_sum * gh * kLn2)};
  // If a constant is NaN, the whole row becomes NaN. This NaN has low bits 0, as gradient_pairs
  // requires.
  if (s.a0 != s.a0 || s.a1 != s.a1) s.a0 = s.a1 = __builtin_nanf("");
  const int64_t y = row.target >= 0 && row.target < vocab ? row.target : -1;
  const float at_target = y >= 0 ? target_gradient(scale, logp, entropy, ga, gh, more.gl) : 0.0f;
  const bool far = is_far(shift);
  if constexpr (kDirect) {
    if (!far && more.gu == 0.0f) {
      for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        gradient_of_block(row.block(begin) + begin, begin, width(begin), s, kept, out_block(begin));
      }
      if (y >= 0) store(out_block(y / kBlock * kBlock) + y % kBlock, 0, at_target);
      return;
    }
  }
  const float row_max = far ? transformed_max<T, kTransform>(row, f) : 0.0f;
  alignas(64) float du[kBlock];
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = width(begin);
    convert_block<T, kTransform>(row, f, begin, n, du);
    if (far) subtract(du, n, row_max);
    const Slopes plain = {c, far ? 0.0f : shift, s.a0, s.a1};
    gradient_of_block(du, begin, n, plain, far ? nullptr : kept, du);
    if (y >= begin && y < begin + n) du[y - begin] = at_target;
    if (more.gu != 0.0f) {
      add_weights(du, more.weight == nullptr ? nullptr : more.weight + begin, n, scale * more.gu);
    }
    if (kTransform && f.cap != 0.0f) scale_by_slope(row, f, begin, n, du);
    store_block(du, n, out_block(begin));
  }
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
