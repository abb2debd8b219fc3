// paired_divergence: the divergence of two rows of logits, and its gradient with respect to the
// logits of P.
//
// Passes over (T, V): forward one read of each stream for the two log-sum-exps, with two
// exponentials per element; backward one read of each and one write. A KL comes out of the first
// pass:
//
//     KL(P || Q) = sum e_p (d_p - d_q) / (T S_p) - log(S_p / S_q),   d = u - max u
//
// The difference has an absolute error of about 3e-7. If this KL is at least kClose, it is the
// result of the two KLs. The other kinds take a second pass, with three exponentials or logarithms
// per element. It reads L2 if L2 holds the rows of all resident blocks, else memory. With `big` the
// larger of p and q, delta = log2 p - log2 q, and b and b' the weights of the smaller and the
// larger one in the mixture:
//
//     r = 2^-|delta| = small / big,   t = b r + b' = mix / big,   log2(big / mix) = -log2 t
//
// Closer rows, and rows with an excluded entry, take another second pass (`careful`). It forms
// delta from u_p - u_q, so that close logits subtract exactly, and with m1 = r - 1 as
// expm1(-|delta|):
//
//     small = big (1 + m1),   q - p = +-big m1,   log(big / mix) = -log1p(b m1)
//
// These keep their relative precision if P and Q are close, and are exactly 0 if the rows are
// equal. KL(a || b) is summed as a log(a / b) + (b - a). Each such term is >= 0, and an error of
// the log-sum-exps cancels in the sum to first order.
//
// State per row, for the backward: live, max u_p, max u_q, log2 S_p, log2 S_q, sum p s with s the
// slope of `slope_of`.
#pragma once

#include "cuda/gradient.cuh"
#include "cuda/rows.cuh"

namespace tokfuse {
namespace cuda {

constexpr int kDivergenceThreads = 256;
// 2^-126 is the smallest normal float32, the exponent that a shifted integer can hold.
constexpr float kMinExponent = -126.0f;

// r = 2^x and m1 = 2^x - 1 for x in [-126, 0], each with a relative error <= 4e-7.
struct Power {
  float r, m1;
};

__device__ __forceinline__ Power power_of(float x) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // leaves round(x) + 127 in the low bits
  const float t = x + kMagic, r = x - (t - kMagic);
  float p = 0x1.5bba14p-10f * r + 0x1.3cea88p-7f;
  p = ((p * r + 0x1.c6b752p-5f) * r + 0x1.ebf9bcp-3f) * r + 0x1.62e42ap-1f;
  const float scale = float_of(bits_of(t) << 23);
  const float rest = p * r;
  return {fmaf(rest, scale, scale), fmaf(rest, scale, scale - 1.0f)};
}

// ln t for t = 1 + y in (0, 1], relative error <= 3e-7; y has the digits near t = 1, and t those
// near 0. The hardware logarithm has an absolute error of 2^-22 near 1. Polynomial of the Cephes
// library's logf.
__device__ __forceinline__ float log_split(float t, float y) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t bits = bits_of(t) - kSqrtHalf;
  const int k = static_cast<int>(bits) >> 23;
  const float f = k == 0 ? y : float_of((bits & 0x7fffffu) + kSqrtHalf) - 1.0f, q = f * f;
  float p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = ((p * f + 1.1676998740e-1f) * f - 1.2420140846e-1f) * f + 1.4249322787e-1f;
  p = ((p * f - 1.6668057665e-1f) * f + 2.0000714765e-1f) * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return static_cast<float>(k) * kLn2 + (f - q * (0.5f - f * p));
}

// A row with a smaller KL takes the careful pass: here the first one is exact to 0.3%.
constexpr float kClose = 1e-4f;
// |log2(p / q)| below which q - p is a polynomial.
constexpr float kNear = 0.03125f;

template <Divergence kKind>
constexpr bool kIsKl = kKind == Divergence::kForwardKl || kKind == Divergence::kReverseKl;

// Blocks per multiprocessor. With the registers of three, the skewed divergences would spill.
template <Divergence kKind>
constexpr int kBlocks =
    kKind == Divergence::kSkewForward || kKind == Divergence::kSkewReverse ? 2 : 3;

// What turns two logits into probabilities; base 2.
struct Distributions {
  float c;             // log2(e) / T
  float p_max, q_max;  // log2 p = (u_p - p_max) c - p_log2s
  float p_log2s, q_log2s;
  float apart_log2s;         // log2(S_p / S_q)
  float p_weight, q_weight;  // mix = p_weight p + q_weight q
};

template <Divergence kKind>
__device__ __forceinline__ Distributions distributions(float c, float p_max, float q_max,
                                                       float p_log2s, float q_log2s,
                                                       float apart_log2s, float mix_weight) {
  const bool of_p = kKind == Divergence::kSkewReverse;
  return {c,
          p_max,
          q_max,
          p_log2s,
          q_log2s,
          apart_log2s,
          of_p ? mix_weight : 1.0f - mix_weight,
          of_p ? 1.0f - mix_weight : mix_weight};
}

struct Compared {
  float ps;    // p times the slope of `slope_of`
  float term;  // of the divergence
};

template <Divergence kKind>
__device__ __forceinline__ Compared careful(float u_p, float u_q, const Distributions& w) {
  // Two excluded logits would give inf - inf.
  const float apart = (u_p == u_q ? 0.0f : u_p - u_q) - (w.p_max - w.q_max);
  const float delta = apart * w.c - w.apart_log2s;
  const bool p_is_big = delta >= 0.0f;
  const float away = max_nan(p_is_big ? -delta : delta, kMinExponent);
  const float log_p = (u_p - w.p_max) * w.c - w.p_log2s;
  const float log_q = (u_q - w.q_max) * w.c - w.q_log2s;
  const Power power = power_of(away);
  const float big = exp2_fast(p_is_big ? log_p : log_q), m1 = power.m1;
  const float big_gap = big * m1;
  // A KL needs an exact 0 for an excluded entry, a mixture the digits of the smaller probability.
  const float small = kIsKl<kKind> ? big + big_gap : big * power.r;
  const float p = p_is_big ? big : small, q = p_is_big ? small : big;
  const float gap = p_is_big ? big_gap : -big_gap;  // q - p
  if constexpr (kIsKl<kKind>) {
    // If the weight is 0 the term is 0 and not 0 * inf; the gap carries the NaN of the row.
    const float nats = delta * kLn2, ps = p > 0.0f ? p * nats : 0.0f;
    if (kKind == Divergence::kReverseKl) return {ps, ps + gap};
    return {ps, (q > 0.0f ? -q * nats : 0.0f) - gap};
  } else {
    const float b = p_is_big ? w.q_weight : w.p_weight;
    const float big_weight = p_is_big ? w.p_weight : w.q_weight;
    const float t = fmaf(b, power.r, big_weight);  // mix / big
    const float of_big = -log_split(t, b * m1), of_small = of_big + away * kLn2;
    const float of_p = p_is_big ? of_big : of_small;  // log(p / mix)
    const float apart_by_mix = __fdividef(p_is_big ? m1 : -m1, t);
    if constexpr (kKind == Divergence::kSkewForward) {
      const float of_q = p_is_big ? of_small : of_big;
      return {-w.p_weight * w.p_weight * p * apart_by_mix, q * of_q - w.p_weight * gap};
    } else if constexpr (kKind == Divergence::kSkewReverse) {
      return {p * (of_p + w.p_weight * w.q_weight * apart_by_mix), p * of_p + w.q_weight * gap};
    } else {
      return {w.p_weight * p * of_p, big_weight * big * of_big + b * small * of_small};
    }
  }
}

// r, b r, t and log2 t, as defined at the top of this file.
struct Mixture {
  float r, weighted, t, log2_t;
  bool p_is_big;
};

__device__ __forceinline__ Mixture mixture_of(float delta, const Distributions& w) {
  const bool p_is_big = delta >= 0.0f;
  const float r = exp2_fast(-fabsf(delta)), b = p_is_big ? w.q_weight : w.p_weight;
  const float t = fmaf(b, r, p_is_big ? w.p_weight : w.q_weight);
  return {r, b * r, t, log2_fast(t), p_is_big};
}

// s / slope_unit of the gradient p (s - sum p s), up to a constant of the row; not for the KLs.
template <Divergence kKind>
__device__ __forceinline__ float slope_of(float delta, const Mixture& x, const Distributions& w) {
  if constexpr (kKind == Divergence::kTotalVariation) {
    return delta > 0.0f ? 0.5f : (delta < 0.0f ? -0.5f : delta);  // NaN stays
  } else {
    const float of_p = x.log2_t + max_nan(-delta, 0.0f);  // log2(mix / p)
    if constexpr (kKind == Divergence::kJsd) return of_p;
    const float rest = __fdividef(x.r - 1.0f, x.t);
    const float apart_by_mix = x.p_is_big ? rest : -rest;  // (q - p) / mix
    if constexpr (kKind == Divergence::kSkewForward) return apart_by_mix;
    return w.p_weight * w.q_weight * apart_by_mix - kLn2 * of_p;
  }
}

// The factor of the row that slope_of leaves out.
template <Divergence kKind>
__device__ __forceinline__ float slope_unit(const Distributions& w) {
  if (kKind == Divergence::kJsd) return -kLn2 * w.p_weight;
  return kKind == Divergence::kSkewForward ? -w.p_weight * w.p_weight : 1.0f;
}

// For a row with a finite KL of at least kClose; total variation for any row. `ps` is in units of
// slope_unit, `term` of -ln 2.
template <Divergence kKind>
__device__ __forceinline__ Compared plain(float u_p, float u_q, const Distributions& w) {
  // delta stays finite if one is the lowest float32 or excluded, and is no NaN if both are.
  const float d_p = max_nan(u_p - w.p_max, kFarthest), d_q = max_nan(u_q - w.q_max, kFarthest);
  const float log_p = d_p * w.c - w.p_log2s, log_q = d_q * w.c - w.q_log2s;
  const float delta = (d_p - d_q) * w.c - w.apart_log2s;
  if constexpr (kKind == Divergence::kTotalVariation) {
    const float p = exp2_fast(log_p);
    const float s = slope_of<kKind>(delta, Mixture(), w);
    return {p * s, -0.5f / kLn2 * fabsf(p - exp2_fast(log_q))};
  } else {
    const Mixture x = mixture_of(delta, w);
    const float s = slope_of<kKind>(delta, x, w);
    if constexpr (kKind == Divergence::kJsd) {
      const float big = exp2_fast(fmaxf(log_p, log_q));
      return {(x.p_is_big ? big : big * x.r) * s,
              big * fmaf(x.t, x.log2_t, x.weighted * fabsf(delta))};
    }
    const float p = exp2_fast(log_p);
    if constexpr (kKind == Divergence::kSkewForward) {
      return {p * s, exp2_fast(log_q) * (x.log2_t + max_nan(delta, 0.0f))};
    }
    return {p * s, p * (x.log2_t + max_nan(-delta, 0.0f))};
  }
}

// The options that LogitsArgs has, too.
__device__ __forceinline__ LogitsArgs options_of(const DivergenceArgs& a) {
  LogitsArgs out = {};
  out.mask = a.mask;
  out.temperatures = a.temperatures;
  out.temperature = a.temperature;
  out.softcap = a.softcap;
  out.logit_scale = a.logit_scale;
  return out;
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};
template <bool kValue>
struct Aligned {
  static constexpr bool value = kValue;
};

// Vectors of each row that a thread loads before it computes on them.
template <bool kTransform>
constexpr int kAhead = kTransform ? 1 : 2;

// Visit this thread's vectors of a part of two rows. run(Aligned, Count, first vector, z_p, z_q)
// gets kTile vectors that are blockDim.x apart, then single ones. few(first element, count, z_p,
// z_q) gets the elements before and after the whole vectors. The grouping does not depend on the
// alignment, so the bits of a row do not.
template <class T, int kTile, class Run, class Few>
__device__ __forceinline__ void for_vectors(const T* p, const T* q, int vocab, const Part& part,
                                            bool aligned, uint64_t policy, const Run& run,
                                            const Few& few) {
  const int rest = vocab - part.head, threads = static_cast<int>(blockDim.x);
  const GlobalRow<T, true> p_aligned = {p + part.head, nullptr, rest, policy};
  const GlobalRow<T, true> q_aligned = {q + part.head, nullptr, rest, policy};
  const GlobalRow<T, false> p_any = {p + part.head, nullptr, rest, policy};
  const GlobalRow<T, false> q_any = {q + part.head, nullptr, rest, policy};
  int v = part.begin + static_cast<int>(threadIdx.x);
  const auto tiles = [&](const auto& p_row, const auto& q_row, auto is_aligned) {
#pragma unroll 1
    for (; v + (kTile - 1) * threads < part.end; v += kTile * threads) {
      Vec16 zp[kTile], zq[kTile];
#pragma unroll
      for (int j = 0; j < kTile; j++) {
        zp[j] = p_row.whole(v + j * threads);
        zq[j] = q_row.whole(v + j * threads);
      }
      run(is_aligned, Count<kTile>(), v, zp, zq);
    }
  };
  if constexpr (kTile > 1) {
    aligned ? tiles(p_aligned, q_aligned, Aligned<true>()) : tiles(p_any, q_any, Aligned<false>());
  }
#pragma unroll 1
  for (; v < part.end; v += threads) {
    const Vec16 zp[1] = {aligned ? p_aligned.whole(v) : p_any.whole(v)};
    const Vec16 zq[1] = {aligned ? q_aligned.whole(v) : q_any.whole(v)};
    run(Aligned<false>(), Count<1>(), v, zp, zq);
  }
  const bool head = part.has_head && writes_head();
  if (head || (part.has_last && writes_last())) {
    const int count = head ? part.head : rest % kItems<T>, first = head ? 0 : vocab - count;
    few(first, count, load_elements(p + first, count), load_elements(q + first, count));
  }
}

// The running sums of the first pass.
struct Joint {
  float p_max, q_max;
  Pair p_sum, q_sum;
  Pair cross;  // of e_p (d_p - d_q); of e_q (d_q - d_p) for kForwardKl
};

// Express the sums relative to larger maxima.
template <Divergence kKind>
__device__ __forceinline__ void lower(Joint& a, float p_max, float q_max, float c) {
  const float p_step = fmaxf(a.p_max - p_max, kFarthest);
  const float q_step = fmaxf(a.q_max - q_max, kFarthest);
  const float p_decay = exp2_fast(p_step * c), q_decay = exp2_fast(q_step * c);
  const float by = kKind == Divergence::kForwardKl ? q_step - p_step : p_step - q_step;
  if (kKind == Divergence::kForwardKl) {
    a.cross = times(fma2({by, by}, a.q_sum, a.cross), q_decay);
  } else if (kKind != Divergence::kTotalVariation) {
    a.cross = times(fma2({by, by}, a.p_sum, a.cross), p_decay);
  }
  a.p_sum = times(a.p_sum, p_decay);
  a.q_sum = times(a.q_sum, q_decay);
  a.p_max = p_max;
  a.q_max = q_max;
}

template <int kPairs>
__device__ __forceinline__ float max_of_pairs(const Pair* u) {
  float m = kLowestMax;
#pragma unroll
  for (int i = 0; i < kPairs; i++) m = fmaxf(m, fmaxf(u[i].x, u[i].y));
  return m;
}

// Add kPairs pairs of each row; p_max and q_max are their maxima.
template <Divergence kKind, int kPairs>
__device__ __forceinline__ void fold_joint(Joint& a, const Pair* u, const Pair* v, float p_max,
                                           float q_max, float c) {
  lower<kKind>(a, fmaxf(a.p_max, p_max), fmaxf(a.q_max, q_max), c);
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const Pair d_p = add2(u[i], {-a.p_max, -a.p_max}), d_q = add2(v[i], {-a.q_max, -a.q_max});
    const Pair x = times(d_p, c), y = times(d_q, c);
    const Pair e_p = {exp2_fast(x.x), exp2_fast(x.y)}, e_q = {exp2_fast(y.x), exp2_fast(y.y)};
    a.p_sum = add2(a.p_sum, e_p);
    a.q_sum = add2(a.q_sum, e_q);
    if (kKind == Divergence::kForwardKl) {
      a.cross = fma2(e_q, fma2(d_p, {-1.0f, -1.0f}, d_q), a.cross);
    } else if (kKind != Divergence::kTotalVariation) {
      a.cross = fma2(e_p, fma2(d_q, {-1.0f, -1.0f}, d_p), a.cross);
    }
  }
}

// Add one element of each row.
template <Divergence kKind>
__device__ __forceinline__ void fold_single(Joint& a, float u, float v, float c) {
  lower<kKind>(a, fmaxf(a.p_max, u), fmaxf(a.q_max, v), c);
  const float d_p = u - a.p_max, d_q = v - a.q_max;
  const float e_p = exp2_fast(d_p * c), e_q = exp2_fast(d_q * c);
  a.p_sum.x += e_p;
  a.q_sum.x += e_q;
  if (kKind == Divergence::kForwardKl) {
    a.cross.x += e_q * (d_q - d_p);
  } else if (kKind != Divergence::kTotalVariation) {
    a.cross.x += e_p * (d_p - d_q);
  }
}

template <Divergence kKind>
__device__ __forceinline__ Joint merge_warp(Joint a, float c) {
  lower<kKind>(a, warp_max(a.p_max), warp_max(a.q_max), c);
  a.p_sum = {warp_sum(a.p_sum.x + a.p_sum.y), 0.0f};
  a.q_sum = {warp_sum(a.q_sum.x + a.q_sum.y), 0.0f};
  a.cross = {warp_sum(a.cross.x + a.cross.y), 0.0f};
  return a;
}

using WarpFloats = Array<float, kMaxWarps>;

// Merge the sums of all threads; each of them gets the result. Two barriers: `shared` is free
// afterwards.
template <Divergence kKind>
__device__ __forceinline__ Joint merge_joint(Joint a, Array<WarpFloats, 5>& shared, float c) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            at = static_cast<int>(threadIdx.x) % kWarp;
  a = merge_warp<kKind>(a, c);
  if (at == 0) {
    shared[0][warp] = a.p_max, shared[1][warp] = a.q_max;
    shared[2][warp] = a.p_sum.x, shared[3][warp] = a.q_sum.x, shared[4][warp] = a.cross.x;
  }
  __syncthreads();
  Joint all = {kLowestMax, kLowestMax, {0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}};
  if (at < static_cast<int>(blockDim.x) / kWarp) {
    all = {shared[0][at],
           shared[1][at],
           {shared[2][at], 0.0f},
           {shared[3][at], 0.0f},
           {shared[4][at], 0.0f}};
  }
  all = merge_warp<kKind>(all, c);
  __syncthreads();
  return all;
}

__device__ __forceinline__ Pair sum_block(Pair a, Array<WarpFloats, 5>& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            at = static_cast<int>(threadIdx.x) % kWarp;
  a = {warp_sum(a.x), warp_sum(a.y)};
  if (at == 0) shared[0][warp] = a.x, shared[1][warp] = a.y;
  __syncthreads();
  const bool used = at < static_cast<int>(blockDim.x) / kWarp;
  a = {warp_sum(used ? shared[0][at] : 0.0f), warp_sum(used ? shared[1][at] : 0.0f)};
  __syncthreads();
  return a;
}

// Return this thread's sums of the first pass.
template <class T, bool kTransform, Divergence kKind>
__device__ __forceinline__ Joint joint_of(const T* p, const T* q, int vocab, const Part& all,
                                          bool aligned, uint64_t policy, const Transform& f,
                                          float c) {
  constexpr int kPairs = kItems<T> / 2;
  Joint a = {kLowestMax, kLowestMax, {0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}};
  for_vectors<T, kAhead<kTransform>>(
      p, q, vocab, all, aligned, policy,
      [&](auto, auto count, int, const Vec16* zp, const Vec16* zq) {
        constexpr int kCount = decltype(count)::value;
        Pair u[kCount * kPairs], v[kCount * kPairs], slope[kPairs];
#pragma unroll
        for (int j = 0; j < kCount; j++) {
          transformed<T, kTransform>(f, zp[j], Vec16(), false, u + j * kPairs, slope);
          transformed<T, kTransform>(f, zq[j], Vec16(), false, v + j * kPairs, slope);
        }
        const T* type = nullptr;
        const float p_max =
            kTransform ? max_of_pairs<kCount * kPairs>(u) : max_of<kCount>(type, zp);
        const float q_max =
            kTransform ? max_of_pairs<kCount * kPairs>(v) : max_of<kCount>(type, zq);
        fold_joint<kKind, kCount * kPairs>(a, u, v, p_max, q_max, c);
      },
      [&](int, int count, const Vec16& zp, const Vec16& zq) {
        Pair u[kPairs], v[kPairs], slope[kPairs];
        transformed<T, kTransform>(f, zp, Vec16(), false, u, slope);
        transformed<T, kTransform>(f, zq, Vec16(), false, v, slope);
#pragma unroll
        for (int i = 0; i < kItems<T>; i++) {
          if (i >= count) continue;
          i % 2 == 0 ? fold_single<kKind>(a, u[i / 2].x, v[i / 2].x, c)
                     : fold_single<kKind>(a, u[i / 2].y, v[i / 2].y, c);
        }
      });
  return a;
}

// Return the sums of element(u_p, u_q) over this thread's elements: of the terms, of p s.
template <class T, bool kTransform, int kTile, class Element>
__device__ __forceinline__ Pair sums_of(const T* p, const T* q, int vocab, const Part& all,
                                        bool aligned, uint64_t policy, const Transform& f,
                                        const Element& element) {
  constexpr int kPairs = kItems<T> / 2;
  Pair sums = {0.0f, 0.0f};
  const auto add = [&](int count, const Vec16& zp, const Vec16& zq) {
    Pair u[kPairs], v[kPairs], slope[kPairs];
    transformed<T, kTransform>(f, zp, Vec16(), false, u, slope);
    transformed<T, kTransform>(f, zq, Vec16(), false, v, slope);
#pragma unroll
    for (int i = 0; i < kItems<T>; i++) {
      if (i >= count) continue;
      const Compared x =
          i % 2 == 0 ? element(u[i / 2].x, v[i / 2].x) : element(u[i / 2].y, v[i / 2].y);
      sums.x += x.term;
      sums.y += x.ps;
    }
  };
  for_vectors<T, kTile>(
      p, q, vocab, all, aligned, policy,
      [&](auto, auto count, int, const Vec16* zp, const Vec16* zq) {
#pragma unroll
        for (int j = 0; j < decltype(count)::value; j++) add(kItems<T>, zp[j], zq[j]);
      },
      [&](int, int count, const Vec16& zp, const Vec16& zq) { add(count, zp, zq); });
  return sums;
}

// What the first pass finds out about a row.
struct ComparedRow {
  bool empty;  // masked, or only -inf in either stream: nothing to compare
  float p_max, q_max, p_log2s, q_log2s;
  float apart_log2s;  // log2(S_p / S_q)
  float kl;
};

template <Divergence kKind>
__device__ __forceinline__ ComparedRow compared_row(const Joint& s, float nats) {
  const float log_ratio = logf(s.p_sum.x / s.q_sum.x);
  const float p_log2s = log2f(s.p_sum.x), q_log2s = log2f(s.q_sum.x);
  const float kl = kKind == Divergence::kForwardKl ? s.cross.x / s.q_sum.x * nats + log_ratio
                                                   : s.cross.x / s.p_sum.x * nats - log_ratio;
  // The sign of log p - log q must be that of the backward, which has the two logarithms only.
  const bool rounded = kKind == Divergence::kTotalVariation;
  const float apart = rounded ? p_log2s - q_log2s : log_ratio * kLog2E;
  const bool empty = s.p_sum.x == 0.0f || s.q_sum.x == 0.0f;
  return {empty, s.p_max, s.q_max, p_log2s, q_log2s, apart, kl};
}

// The same of a row of which these are some columns; see DivergenceArgs::given.
__device__ __forceinline__ ComparedRow given_row(const float* g, bool counted) {
  return {g[0] == 0.0f || !counted, g[1], g[2], g[3], g[4], g[3] - g[4], g[5]};
}

template <class T, bool kTransform, Divergence kKind>
__global__ void __launch_bounds__(kDivergenceThreads, kBlocks<kKind>)
    paired_divergence_fwd_kernel(const __grid_constant__ DivergenceArgs a, float* divergence,
                                 float* state, bool aligned) {
  TOKFUSE_SHARED(shared, Array<WarpFloats, 5>);
  const LogitsArgs options = options_of(a);
  const Transform f = transform_of(options);
  const uint64_t stay = l2_policy<Keep::kLast>(), leave = l2_policy<Keep::kFirst>();
  const int vocab = static_cast<int>(a.vocab);
  for (int64_t t = blockIdx.x; t < a.tokens; t += gridDim.x) {
    const T* p = static_cast<const T*>(a.logits_p) + t * a.stride_p;
    const T* q = static_cast<const T*>(a.logits_q) + t * a.stride_q;
    const Part all = part_of_row(p, a.vocab, 0, 1, false);
    Joint s = {};
    Scale scale = {1.0f, 1.0f};
    const bool counted = counts(options, t), whole = kIsKl<kKind> || a.given == nullptr;
    if (counted) {
      scale = scale_at(options, temperature_of(options, t), kTransform);
      if (whole) {
        s = joint_of<T, kTransform, kKind>(p, q, vocab, all, aligned, stay, f, scale.c);
        s = merge_joint<kKind>(s, shared, scale.c);
      }
    }
    const ComparedRow r = whole ? compared_row<kKind>(s, scale.nats)
                                : given_row(a.given + t * kDivergenceState, counted);
    float mean = r.kl, out = r.kl;
    if (!r.empty) {
      const Distributions w = distributions<kKind>(scale.c, r.p_max, r.q_max, r.p_log2s, r.q_log2s,
                                                   r.apart_log2s, a.mix_weight);
      // An infinite KL is the result of a KL, but no result for a mixture.
      const bool is_apart = r.kl >= kClose && (kIsKl<kKind> || r.kl < inf_float());
      const bool variation = kKind == Divergence::kTotalVariation;
      if (variation || (is_apart && !kIsKl<kKind>)) {
        if constexpr (!kIsKl<kKind>) {
          const Pair sums =
              sum_block(sums_of<T, kTransform, kAhead<kTransform>>(
                            p, q, vocab, all, aligned, leave, f,
                            [&](float u_p, float u_q) { return plain<kKind>(u_p, u_q, w); }),
                        shared);
          out = -kLn2 * sums.x;
          mean = slope_unit<kKind>(w) * sums.y;
        }
      } else if (!is_apart) {
        if constexpr (kKind != Divergence::kTotalVariation) {
          const Pair sums =
              sum_block(sums_of<T, kTransform, 1>(
                            p, q, vocab, all, aligned, leave, f,
                            [&](float u_p, float u_q) { return careful<kKind>(u_p, u_q, w); }),
                        shared);
          out = sums.x;
          mean = sums.y;
        }
      }
    } else {
      out = mean = 0.0f;
    }
    if (threadIdx.x > 0) continue;
    if (whole) out = out < 0.0f ? 0.0f : (out > a.bound ? a.bound : out);  // rounding; NaN stays
    divergence[t] = out;
    float* row = state + t * kDivergenceState;
    row[0] = r.empty || out == inf_float() ? 0.0f : 1.0f;
    row[1] = r.p_max, row[2] = r.q_max, row[3] = r.p_log2s, row[4] = r.q_log2s, row[5] = mean;
  }
}

// d divergence / d u_p, over slope_unit; `mean` is in that unit.
template <Divergence kKind>
__device__ __forceinline__ float divergence_gradient(float u_p, float u_q, const Distributions& w,
                                                     float mean) {
  // No NaN if both are excluded.
  const float d_p = max_nan(u_p - w.p_max, kFarthest), d_q = max_nan(u_q - w.q_max, kFarthest);
  const float delta = (d_p - d_q) * w.c - w.apart_log2s;
  const float p = exp2_fast(d_p * w.c - w.p_log2s);
  if constexpr (kKind == Divergence::kForwardKl) {
    const float q = exp2_fast(d_q * w.c - w.q_log2s), x = delta * kLn2;
    const float near = q * (x * fmaf(x, fmaf(x, 1.0f / 6.0f, 0.5f), 1.0f));  // q expm1(x)
    return fabsf(delta) < kNear ? near : p - q;
  } else if constexpr (kKind == Divergence::kReverseKl) {
    return p * (delta * kLn2 - mean);
  } else {
    const bool mixed = kKind != Divergence::kTotalVariation;
    return p * (slope_of<kKind>(delta, mixed ? mixture_of(delta, w) : Mixture(), w) - mean);
  }
}

template <class T, bool kTransform, Divergence kKind>
__global__ void __launch_bounds__(kDivergenceThreads, kBlocks<kKind>)
    paired_divergence_bwd_kernel(const __grid_constant__ DivergenceArgs a, const float* state,
                                 const float* grad_divergence, T* grad_p, int64_t grad_stride,
                                 int parts, bool together) {
  constexpr int kPairs = kItems<T> / 2;
  const LogitsArgs options = options_of(a);
  const Transform f = transform_of(options);
  const uint64_t policy = l2_policy<Keep::kFirst>();
  const int vocab = static_cast<int>(a.vocab);
  for (int64_t item = blockIdx.x; item < a.tokens * parts; item += gridDim.x) {
    const int64_t t = item / parts;
    const T* p = static_cast<const T*>(a.logits_p) + t * a.stride_p;
    const T* q = static_cast<const T*>(a.logits_q) + t * a.stride_q;
    const Part part = part_of_row(p, a.vocab, static_cast<int>(item % parts), parts, together);
    const float* s = state + t * kDivergenceState;
    T* out = grad_p + t * grad_stride;
    if (s[0] == 0.0f || grad_divergence[t] == 0.0f) {  // unread
      write_zeros<T>(out, vocab, part, together, policy);
      continue;
    }
    const Scale scale = scale_at(options, temperature_of(options, t), kTransform);
    const Distributions w =
        distributions<kKind>(scale.c, s[1], s[2], s[3], s[4], s[3] - s[4], a.mix_weight);
    const float unit = slope_unit<kKind>(w), mean = s[5] / unit;
    const float factor = grad_divergence[t] * scale.nats * unit;
    const auto gradient = [&](const Vec16& zp, const Vec16& zq, Pair* g) {
      Pair u[kPairs], v[kPairs], slope[kPairs], unused[kPairs];
      transformed<T, kTransform>(f, zp, Vec16(), false, u, slope);
      transformed<T, kTransform>(f, zq, Vec16(), false, v, unused);
#pragma unroll
      for (int j = 0; j < kPairs; j++) {
        g[j] = {divergence_gradient<kKind>(u[j].x, v[j].x, w, mean) * factor,
                divergence_gradient<kKind>(u[j].y, v[j].y, w, mean) * factor};
        if constexpr (kTransform) g[j] = mul2(g[j], slope[j]);
      }
    };
    for_vectors<T, kAhead<kTransform>>(
        p, q, vocab, part, together, policy,
        [&](auto aligned, auto count, int v, const Vec16* zp, const Vec16* zq) {
#pragma unroll
          for (int j = 0; j < decltype(count)::value; j++) {
            Pair g[kPairs];
            gradient(zp[j], zq[j], g);
            const int vector = v + j * static_cast<int>(blockDim.x);
            T* to = out + part.head + static_cast<int64_t>(vector) * kItems<T>;
            if (decltype(aligned)::value) {
              store_vector<kPairs>(to, g, policy);
            } else {
              store_elements<T>(to, g, kItems<T>);
            }
          }
        },
        [&](int first, int count, const Vec16& zp, const Vec16& zq) {
          Pair g[kPairs];
          gradient(zp, zq, g);
          store_elements<T>(out + first, g, count);
        });
  }
}

}  // namespace cuda
}  // namespace tokfuse
