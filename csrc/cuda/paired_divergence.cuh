// paired_divergence: KL or Jensen-Shannon of two rows of logits, and its gradient to the first.
//
// KL(Q || P), KL(P || Q), or JSD with a weight. Passes over (T, V): forward one read of each stream
// from memory for the two log-sum-exps, then a second visit of the rows, which are in the L2 cache
// by then; backward one read of each and one write. Exponentials per element: 2, then 1, then 1,
// and a polynomial each.
//
// With delta = log p - log q, formed from u_p - u_q so that close logits subtract exactly, `big`
// the larger of p and q, a = |delta| and m1 = e^-a - 1:
//
//     small = big (1 + m1),   q - p = +-big m1,   log(big / mix) = -log(1 + b m1)
//
// with b the weight of the smaller one in the mixture. These keep their relative precision when P
// and Q are close, and are exactly 0 when the rows are equal. KL terms are summed as
// p delta + (q - p), which is non-negative and does not feel the rounding of the two sums.
//
// State per row, for the backward: live, max u_p, max u_q, log2 S_p, log2 S_q, mean of p d with
// d = delta or log(p / mix).
#pragma once

#include "cuda/gradient.cuh"
#include "cuda/rows.cuh"

namespace tokfuse {
namespace cuda {

constexpr int kDivergenceThreads = 256;
// 2^-126 is the smallest normal float32, the exponent that a shifted integer can hold.
constexpr float kMinExponent = -126.0f;

// 2^x - 1 for x in [-126, 0], relative error <= 4e-7: 2^x of an exponential cancels at 0.
__device__ __forceinline__ float expm1_2(float x) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // leaves round(x) + 127 in the low bits
  const float t = x + kMagic, r = x - (t - kMagic);
  float p = 0x1.5bba14p-10f * r + 0x1.3cea88p-7f;
  p = ((p * r + 0x1.c6b752p-5f) * r + 0x1.ebf9bcp-3f) * r + 0x1.62e42ap-1f;
  const float scale = float_of(bits_of(t) << 23);
  return p * r * scale + (scale - 1.0f);
}

// ln(1 + y) for y in (-1, 0], relative error <= 3e-7; the polynomial is that of Cephes' logf. The
// hardware logarithm is exact to 2^-22 of 1 only, which is nothing for a result near 0.
__device__ __forceinline__ float log1p_negative(float y) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t bits = bits_of(1.0f + y) - kSqrtHalf;
  const int k = static_cast<int>(bits) >> 23;
  const float f = k == 0 ? y : float_of((bits & 0x7fffffu) + kSqrtHalf) - 1.0f, q = f * f;
  float p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = ((p * f + 1.1676998740e-1f) * f - 1.2420140846e-1f) * f + 1.4249322787e-1f;
  p = ((p * f - 1.6668057665e-1f) * f + 2.0000714765e-1f) * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return static_cast<float>(k) * kLn2 + (f - q * (0.5f - f * p));
}

// What turns two logits into probabilities; base 2.
struct Distributions {
  float c;             // log2(e) / T
  float p_max, q_max;  // log2 p = (u_p - p_max) c - p_log2s
  float p_log2s, q_log2s;
  float beta;
};

struct Compared {
  float p, gap;  // gap = q - p
  float d;       // log(p / mix) for the JSD, else log p - log q, nats
  float term;    // of the divergence
};

template <Divergence kKind>
__device__ __forceinline__ Compared compare(float u_p, float u_q, const Distributions& w) {
  // Two excluded logits would give inf - inf.
  const float apart = (u_p == u_q ? 0.0f : u_p - u_q) - (w.p_max - w.q_max);
  const float delta = apart * w.c - (w.p_log2s - w.q_log2s);
  const bool p_is_big = delta >= 0.0f;
  const float away = max_nan(p_is_big ? -delta : delta, kMinExponent);
  const float log_p = (u_p - w.p_max) * w.c - w.p_log2s;
  const float log_q = (u_q - w.q_max) * w.c - w.q_log2s;
  const float big = exp2_fast(p_is_big ? log_p : log_q), m1 = expm1_2(away);
  const float gap = big * m1, small = big + gap;
  Compared out;
  out.p = p_is_big ? big : small;
  out.gap = p_is_big ? gap : -gap;
  if constexpr (kKind == Divergence::kJsd) {
    const float b = p_is_big ? w.beta : 1.0f - w.beta;
    const float of_big = -log1p_negative(b * m1), of_small = of_big + away * kLn2;
    out.d = p_is_big ? of_big : of_small;
    out.term = (1.0f - b) * big * of_big + b * small * of_small;
  } else {
    out.d = delta * kLn2;
    // Where the weight is 0 the term is 0 and not 0 * inf; the gap has the NaN of the row.
    if constexpr (kKind == Divergence::kReverseKl) {
      out.term = (out.p > 0.0f ? out.p * out.d : 0.0f) + out.gap;
    } else {
      const float q = p_is_big ? small : big;
      out.term = (q > 0.0f ? -q * out.d : 0.0f) - out.gap;
    }
  }
  return out;
}

// The common part of LogitsArgs.
__device__ __forceinline__ LogitsArgs options_of(const DivergenceArgs& a) {
  LogitsArgs out = {};
  out.mask = a.mask;
  out.temperatures = a.temperatures;
  out.temperature = a.temperature;
  out.softcap = a.softcap;
  out.logit_scale = a.logit_scale;
  return out;
}

// This thread's vectors of a part of two rows: run(first element, count, z_p, z_q). One loop for
// both alignments: beside forty instructions per element a branch per vector is nothing, and two
// take twice as long to compile.
template <class T, class Run>
__device__ __forceinline__ void for_vectors(const T* p, const T* q, int vocab, const Part& part,
                                            bool aligned, uint64_t policy, const Run& run) {
  const int rest = vocab - part.head;
  const GlobalRow<T, true> p_aligned = {p + part.head, nullptr, rest, policy};
  const GlobalRow<T, true> q_aligned = {q + part.head, nullptr, rest, policy};
  const GlobalRow<T, false> p_any = {p + part.head, nullptr, rest, policy};
  const GlobalRow<T, false> q_any = {q + part.head, nullptr, rest, policy};
  for (int v = part.begin + static_cast<int>(threadIdx.x); v < part.end;
       v += static_cast<int>(blockDim.x)) {
    run(part.head + v * kItems<T>, kItems<T>, aligned ? p_aligned.whole(v) : p_any.whole(v),
        aligned ? q_aligned.whole(v) : q_any.whole(v));
  }
  const bool head = part.has_head && writes_head();
  if (head || (part.has_last && writes_last())) {
    const int count = head ? part.head : rest % kItems<T>, first = head ? 0 : vocab - count;
    run(first, count, load_elements(p + first, count), load_elements(q + first, count));
  }
}

// Maximum and sum of exponentials.
struct MaxSum {
  float m, s;
};

__device__ __forceinline__ void lower(MaxSum& a, float m, float c) {
  a.s *= exp2_fast(fmaxf(a.m - m, kFarthest) * c);
  a.m = m;
}

template <int kPairs>
__device__ __forceinline__ void fold_sum(MaxSum& a, const Pair* u, float c) {
  float m = a.m;
#pragma unroll
  for (int i = 0; i < kPairs; i++) m = fmaxf(m, fmaxf(u[i].x, u[i].y));
  lower(a, m, c);
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const Pair d = below(u[i], m);
    a.s += exp2_fast(d.x * c) + exp2_fast(d.y * c);
  }
}

__device__ __forceinline__ MaxSum merge_sum(MaxSum a, float c) {
  lower(a, warp_max(a.m), c);
  a.s = warp_sum(a.s);
  return a;
}

using WarpFloats = Array<float, kMaxWarps>;

// Of all threads of the block, in each of them. Two barriers: `shared` is free again afterwards.
__device__ __forceinline__ MaxSum merge_sum_block(MaxSum a, Array<WarpFloats, 2>& shared, float c) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            at = static_cast<int>(threadIdx.x) % kWarp;
  a = merge_sum(a, c);
  if (at == 0) shared[0][warp] = a.m, shared[1][warp] = a.s;
  __syncthreads();
  const bool used = at < static_cast<int>(blockDim.x) / kWarp;
  a = merge_sum({used ? shared[0][at] : kLowestMax, used ? shared[1][at] : 0.0f}, c);
  __syncthreads();
  return a;
}

__device__ __forceinline__ Pair sum_block(Pair a, Array<WarpFloats, 2>& shared) {
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

template <class T, bool kTransform, Divergence kKind>
__global__ void __launch_bounds__(kDivergenceThreads, 2)
    paired_divergence_fwd_kernel(const __grid_constant__ DivergenceArgs a, float jsd_bound,
                                 float* divergence, float* state, bool aligned) {
  constexpr int kPairs = kItems<T> / 2;
  TOKFUSE_SHARED(shared, Array<WarpFloats, 2>);
  const LogitsArgs options = options_of(a);
  const Transform f = transform_of(options);
  const uint64_t stay = l2_policy<Keep::kLast>(), leave = l2_policy<Keep::kFirst>();
  const int vocab = static_cast<int>(a.vocab);
  for (int64_t t = blockIdx.x; t < a.tokens; t += gridDim.x) {
    const bool keep = counts(options, t);
    const T* p = static_cast<const T*>(a.logits_p) + t * a.stride_p;
    const T* q = static_cast<const T*>(a.logits_q) + t * a.stride_q;
    const Part all = part_of_row(p, a.vocab, 0, 1, false);
    const float c = keep ? scale_at(options, temperature_of(options, t), kTransform).c : 1.0f;
    MaxSum sum_p = {kLowestMax, 0.0f}, sum_q = sum_p;
    Pair sums = {0.0f, 0.0f};  // of the terms, of p d
    Distributions w = {c, 0.0f, 0.0f, 0.0f, 0.0f, a.beta};
    if (keep) {
      Pair u[kPairs], slope[kPairs];
      for_vectors<T>(p, q, vocab, all, aligned, stay,
                     [&](int, int, const Vec16& zp, const Vec16& zq) {
                       transformed<T, kTransform>(f, zp, Vec16(), false, u, slope);
                       fold_sum<kPairs>(sum_p, u, c);
                       transformed<T, kTransform>(f, zq, Vec16(), false, u, slope);
                       fold_sum<kPairs>(sum_q, u, c);
                     });
      sum_p = merge_sum_block(sum_p, shared, c);
      sum_q = merge_sum_block(sum_q, shared, c);
      w = {c, sum_p.m, sum_q.m, log2f(sum_p.s), log2f(sum_q.s), a.beta};
    }
    // Masked rows, and a row of only -inf in either stream, have nothing to compare.
    const bool empty = sum_p.s == 0.0f || sum_q.s == 0.0f;
    if (!empty) {
      Pair v[kPairs], u[kPairs], slope[kPairs];
      for_vectors<T>(p, q, vocab, all, aligned, leave,
                     [&](int, int count, const Vec16& zp, const Vec16& zq) {
                       transformed<T, kTransform>(f, zp, Vec16(), false, u, slope);
                       transformed<T, kTransform>(f, zq, Vec16(), false, v, slope);
#pragma unroll
                       for (int j = 0; j < kItems<T>; j++) {
                         if (j >= count) continue;
                         const Compared x = j % 2 == 0 ? compare<kKind>(u[j / 2].x, v[j / 2].x, w)
                                                       : compare<kKind>(u[j / 2].y, v[j / 2].y, w);
                         sums.x += x.term;
                         sums.y += x.p > 0.0f ? x.p * x.d : 0.0f;
                       }
                     });
      sums = sum_block(sums, shared);
    }
    if (threadIdx.x > 0) continue;
    float out = sums.x < 0.0f ? 0.0f : sums.x;  // rounding
    if (kKind == Divergence::kJsd && out > jsd_bound) out = jsd_bound;
    divergence[t] = out;
    float* s = state + t * kDivergenceState;
    s[0] = empty || out == inf_float() ? 0.0f : 1.0f;
    s[1] = w.p_max, s[2] = w.q_max, s[3] = w.p_log2s, s[4] = w.q_log2s, s[5] = sums.y;
  }
}

// d divergence / d u_p.
template <Divergence kKind>
__device__ __forceinline__ float divergence_gradient(float u_p, float u_q, const Distributions& w,
                                                     float mean) {
  const Compared x = compare<kKind>(u_p, u_q, w);
  if (kKind == Divergence::kJsd) return (1.0f - w.beta) * x.p * (x.d - mean);
  if (kKind == Divergence::kForwardKl) return -x.gap;
  return x.p > 0.0f ? x.p * (x.d - mean) : 0.0f * x.gap;
}

template <class T, bool kTransform, Divergence kKind>
__global__ void __launch_bounds__(kDivergenceThreads, 2)
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
    const Distributions w = {scale.c, s[1], s[2], s[3], s[4], a.beta};
    const float mean = s[5], factor = grad_divergence[t] * scale.nats;
    for_vectors<T>(p, q, vocab, part, together, policy,
                   [&](int first, int count, const Vec16& zp, const Vec16& zq) {
                     Pair u[kPairs], v[kPairs], slope[kPairs], unused[kPairs];
                     transformed<T, kTransform>(f, zp, Vec16(), false, u, slope);
                     transformed<T, kTransform>(f, zq, Vec16(), false, v, unused);
#pragma unroll
                     for (int j = 0; j < kPairs; j++) {
                       u[j] = {divergence_gradient<kKind>(u[j].x, v[j].x, w, mean) * factor,
                               divergence_gradient<kKind>(u[j].y, v[j].y, w, mean) * factor};
                       if constexpr (kTransform) u[j] = mul2(u[j], slope[j]);
                     }
                     if (together && count == kItems<T>) {
                       store_vector<kPairs>(out + first, u, policy);
                     } else {
                       store_elements<T>(out + first, u, count);
                     }
                   });
  }
}

}  // namespace cuda
}  // namespace tokfuse
