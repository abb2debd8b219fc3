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

// The same for 16-bit logits. `out` may be `u`. A NaN in the result must have its low 16 bits 0
// (Lanes16::join).
struct Gradient16 {
  Lanes c, shift, a0, a1, floor;

  Gradient16(float c, float shift, float a0, float a1)
      : c(splat(c)),
        shift(splat(shift)),
        a0(splat(a0)),
        a1(splat(a1)),
        floor(splat(opaque(kExponentFloor))) {}

  Lanes exponent(Lanes u) const { return clamp_exponent(u * c - shift, floor); }
  Lanes slope(Lanes x) const { return a0 + a1 * x; }
  Lanes of(Lanes u) const {
    const Lanes x = exponent(u);
    return exp2_simd(x) * slope(x);
  }
};

template <class T>
TOKFUSE_BLOCK_LOOP static void gradient_16(const T* u, int64_t n, float c, float shift, float a0,
                                           float a1, T* out) {
  const Gradient16 g(c, shift, a0, a1);
  Lanes x, y;
  const int64_t whole = n / kLanes16 * kLanes16;
  for (int64_t j = 0; j < whole; j += kLanes16) {
    Lanes16<T>::split(u + j, &x, &y);
    Lanes16<T>::join(g.of(x), g.of(y), out + j);
  }
  T rest[kLanes16] = {};
  const size_t bytes = static_cast<size_t>(n - whole) * sizeof(T);
  memcpy(static_cast<void*>(rest), u + whole, bytes);
  Lanes16<T>::split(rest, &x, &y);
  Lanes16<T>::join(g.of(x), g.of(y), rest);
  memcpy(static_cast<void*>(out + whole), rest, bytes);
}

template <class T>
TOKFUSE_BLOCK_LOOP static void kept_gradient_16(const T* u, const float* __restrict e, float c,
                                                float shift, float a0, float a1, T* out) {
  const Gradient16 g(c, shift, a0, a1);
  const bool by_slope = a1 != 0.0f;
  for (int64_t j = 0; j < kBlock; j += kLanes16) {
    Lanes x, y;
    if (by_slope) {
      Lanes16<T>::split(u + j, &x, &y);
      x = g.slope(g.exponent(x));
      y = g.slope(g.exponent(y));
    } else {
      x = y = g.a0;
    }
    x *= *reinterpret_cast<const LanesAt*>(e + j);
    y *= *reinterpret_cast<const LanesAt*>(e + j + kLanes);
    Lanes16<T>::join(x, y, out + j);
  }
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

template <class T>
static inline void gradient_of_block(const T* u, int64_t begin, int64_t n, const Slopes& s,
                                     const KeptExps* kept, T* out) {
  if (kept != nullptr && kept->shift[begin / kBlock] != kNotKept) {
    const Slopes k = rebased(s, kept->shift[begin / kBlock]);
    kept_gradient_16(u, kept->e + begin, k.c, k.shift, k.a0, k.a1, out);
  } else {
    gradient_16(u, n, s.c, s.shift, s.a0, s.a1, out);
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

// sum_j weight_j u_j of a block.
TOKFUSE_BLOCK_LOOP static float weighted_sum(const float* u, const float* weight, int64_t n) {
  float sum = 0.0f;
  if (weight == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += u[j];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += weight[j] * u[j];
  }
  return sum;
}

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
// Plain logits in float32 or a type of Lanes16 take one loop from the row to the output. All others
// take separate loops for conversion, gradient and rounding over a block in L1: with g++ 12 one
// loop of mixed widths is 25% slower.
template <class T, bool kTransform>
static inline void row_backward(const Row<T>& row, const Transform& f, float c, float scale,
                                float shift, float inv_sum, float logp, float entropy, float ga,
                                float gh, T* out, const KeptExps* kept = nullptr,
                                const FurtherTerms& more = {}) {
  constexpr bool kDirect = (IsSame<T, float>::value || Lanes16<T>::kExists) && !kTransform;
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
  // If a constant is NaN, the whole row becomes NaN. This NaN has low bits 0, as
  // Lanes16::join requires.
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
