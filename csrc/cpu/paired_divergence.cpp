// paired_divergence: KL(Q || P), KL(P || Q) or the Jensen-Shannon divergence of two rows of logits,
// and its gradient with respect to P's logits.
//
// Per row: the log-sum-exp of P and of Q (one read of each from memory), then the divergence while
// both rows are in the L2 cache. Backward: one read of each, one write. Exponentials per element:
// 4, then 2.
//
// With delta = log p - log q, formed from u_p - u_q so that close logits subtract exactly, `big`
// the larger of p and q, a = |delta| and m1 = e^-a - 1:
//     small = big (1 + m1),   q - p = +-big m1,   log(big / mix) = -log(1 + b m1),
// with b the weight of the smaller one in the mixture. These keep their relative precision when P
// and Q are close, and are exactly 0 when the rows are equal. KL terms are summed as
// p delta + (q - p), which is non-negative and does not feel the rounding of the two sums.
#include "cpu/distribution_kernels.h"
#include "cpu/row_gradient.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr float kLn2f = 0.693147180559945309417f;

// What a block needs to turn two staged logits into probabilities; base 2.
struct Pair {
  float c;             // log2(e) / T
  float p_max, q_max;  // log2 p = (u_p - p_max) c - p_log2s
  float p_log2s, q_log2s;
  float beta;
  float mean;  // sum of p * d, d = delta or log(p / mix)
};

// 2^x - 1 for x in [-127, 0], relative error <= 4e-7; exp2_simd's polynomial without its 1.
static inline float expm1_2(float x) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  const float t = x + kMagic;
  const float r = x - (t - kMagic);
  float p = 0x1.5bba14p-10f;
  p = p * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  const float scale = float_of(bits_of(t) << 23);
  return p * r * scale + (scale - 1.0f);
}

// ln(1 + y) for y in (-1, 0], relative error <= 3e-7: exact range reduction to [sqrt 1/2, sqrt 2),
// where near 0 the argument y itself is used. Polynomial of the Cephes library's logf.
static inline float log1p_simd(float y) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t i = bits_of(1.0f + y) - kSqrtHalf;
  const int32_t k = static_cast<int32_t>(i) >> 23;
  const float f = k == 0 ? y : float_of((i & 0x7fffffu) + kSqrtHalf) - 1.0f;
  const float f2 = f * f, f4 = f2 * f2;  // Estrin's order: half the latency of Horner's
  const float p01 = 3.3333331174e-1f - 2.4999993993e-1f * f;
  const float p23 = 2.0000714765e-1f - 1.6668057665e-1f * f;
  const float p45 = 1.4249322787e-1f - 1.2420140846e-1f * f;
  const float p67 = 1.1676998740e-1f - 1.1514610310e-1f * f;
  const float p = (p01 + p23 * f2) + f4 * ((p45 + p67 * f2) + f4 * 7.0376836292e-2f);
  return static_cast<float>(k) * kLn2f + (f - f2 * (0.5f - f * p));
}

struct Element {
  float p, q, gap;  // gap = q - p
  float delta;      // log p - log q, nats; +-inf where one of them is excluded
  float log_mix;    // log(p / mix), nats; only for kJsd
  float term;       // of the divergence
};

template <Divergence kKind>
static inline Element element(float up, float uq, const Pair& w, float floor) {
  Element out;
  // Two excluded logits would give inf - inf.
  const float apart = (up == uq ? 0.0f : up - uq) - (w.p_max - w.q_max);
  const float delta = apart * w.c - (w.p_log2s - w.q_log2s);
  const float lp = (up - w.p_max) * w.c - w.p_log2s, lq = (uq - w.q_max) * w.c - w.q_log2s;
  const bool p_is_big = delta >= 0.0f;
  const float away = clamp_exponent(p_is_big ? -delta : delta, floor);
  const float big = exp2_simd(clamp_exponent(p_is_big ? lp : lq, floor));
  const float m1 = expm1_2(away), gap = big * m1, small = big + gap;
  out.p = p_is_big ? big : small;
  out.q = p_is_big ? small : big;
  out.gap = p_is_big ? gap : -gap;
  out.delta = delta * kLn2f;
  if (kKind == Divergence::kJsd) {
    const float b = p_is_big ? w.beta : 1.0f - w.beta;
    const float of_big = -log1p_simd(b * m1), of_small = of_big + away * kLn2f;
    out.log_mix = p_is_big ? of_big : of_small;
    out.term = (1.0f - b) * big * of_big + b * small * of_small;
  } else if (kKind == Divergence::kReverseKl) {
    out.term = (out.p > 0.0f ? out.p * out.delta : 0.0f) + out.gap;
  } else {
    out.term = (out.q > 0.0f ? -out.q * out.delta : 0.0f) - out.gap;
  }
  return out;
}

struct Sums {
  float total, mean;
};

template <Divergence kKind>
TOKFUSE_BLOCK_LOOP static void sum_terms(const float* __restrict up, const float* __restrict uq,
                                         int64_t n, const Pair& pair, Sums* out) {
  const Pair w = pair;
  const float floor = opaque(kExponentFloor);
  float total = 0, mean = 0;
#pragma omp simd reduction(+ : total, mean)
  for (int64_t j = 0; j < n; j++) {
    const Element e = element<kKind>(up[j], uq[j], w, floor);
    total += e.term;
    if (kKind == Divergence::kJsd) mean += e.p * e.log_mix;
    if (kKind == Divergence::kReverseKl) mean += e.p > 0.0f ? e.p * e.delta : 0.0f;
  }
  *out = {total, mean};
}

// d divergence / d u_p times `scale`.
template <Divergence kKind>
TOKFUSE_BLOCK_LOOP static void gradient_terms(const float* __restrict up,
                                              const float* __restrict uq, int64_t n,
                                              const Pair& pair, float scale,
                                              float* __restrict out) {
  const Pair w = pair;
  const float floor = opaque(kExponentFloor);
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const Element e = element<kKind>(up[j], uq[j], w, floor);
    float g;
    if (kKind == Divergence::kJsd) {
      g = (1.0f - w.beta) * e.p * (e.log_mix - w.mean);
    } else if (kKind == Divergence::kReverseKl) {
      g = e.p > 0.0f ? e.p * (e.delta - w.mean) : 0.0f * e.gap;
    } else {
      g = -e.gap;
    }
    out[j] = scale * g;
  }
}

LogitsArgs rows_of(const DivergenceArgs& a, const void* logits, int64_t stride) {
  LogitsArgs r = {};
  r.logits = logits;
  r.stride = stride;
  r.dtype = a.dtype;
  r.rows = r.tokens = a.tokens;
  r.vocab = a.vocab;
  r.mask = a.mask;
  r.temperatures = a.temperatures;
  r.temperature = a.temperature;
  r.softcap = a.softcap;
  r.logit_scale = a.logit_scale;
  r.threads = a.threads;
  return r;
}

template <class T>
Row<T> pair_row(const void* logits, int64_t stride, int64_t vocab, int64_t t) {
  return {static_cast<const T*>(logits) + t * stride, nullptr, vocab, -1};
}

// Block `begin` of a row in float32: itself where it is so already, else converted into `buffer`.
template <class T, bool kTransform>
const float* block_of(const Row<T>& row, const Transform& f, int64_t begin, int64_t n,
                      float* buffer) {
  if (sizeof(T) == 4 && !kTransform) return reinterpret_cast<const float*>(row.z) + begin;
  convert_block<T, kTransform>(row, f, begin, n, buffer);
  return buffer;
}

// Both rows block by block; run(begin, n, up, uq).
template <class T, bool kTransform, class F>
void for_blocks(const Row<T>& p, const Row<T>& q, const Transform& f, const F& run) {
  alignas(64) float p_buffer[kBlock], q_buffer[kBlock];
  for (int64_t begin = 0; begin < p.vocab; begin += kBlock) {
    const int64_t left = p.vocab - begin, n = left < kBlock ? left : kBlock;
    const float* up = block_of<T, kTransform>(p, f, begin, n, p_buffer);
    const float* uq = block_of<T, kTransform>(q, f, begin, n, q_buffer);
    run(begin, n, up, uq);
  }
}

struct LogSum {
  float max;     // largest transformed logit; -inf: no distribution
  double log2s;  // log2 of the sum of 2^((u - max) c)
};

TOKFUSE_BLOCK_LOOP static float sum_exp(const float* __restrict u, int64_t n, float max, float c) {
  const float floor = opaque(kExponentFloor);
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t j = 0; j < n; j++) s += exp2_simd(clamp_exponent((u[j] - max) * c, floor));
  return s;
}

template <class T, bool kTransform>
LogSum log_sum(const Row<T>& row, const Transform& f, float c) {
  alignas(64) float buffer[kBlock];
  float max = -kInf;
  double s = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
    const int64_t left = row.vocab - begin, n = left < kBlock ? left : kBlock;
    const float* u = block_of<T, kTransform>(row, f, begin, n, buffer);
    const float m = block_max(u, n);
    if (m > max) {
      if (max > -kInf) s *= ::exp2((static_cast<double>(max) - m) * c);
      max = m;
    }
    if (max > -kInf) {
      s += sum_exp(u, n, max, c);
    } else if (has_nan(u, n)) {
      s = __builtin_nan("");
    }
  }
  if (s != s) max = 0.0f;  // NaN: computed on, so that it reaches the result
  return {max, ::log2(s)};
}

// Largest value of the divergence: the entropy of the mixture's weights.
double jsd_bound(double beta) { return -beta * ::log(beta) - (1 - beta) * ::log1p(-beta); }

template <class T, bool kTransform, Divergence kKind>
void forward_row(const DivergenceArgs& a, const LogitsArgs& rows, const Transform& f, int64_t t,
                 float* divergence, float* state) {
  memset(static_cast<void*>(state), 0, kDivergenceState * sizeof(float));
  *divergence = 0.0f;
  if (masked(rows, t)) return;
  const Row<T> p = pair_row<T>(a.logits_p, a.stride_p, a.vocab, t);
  const Row<T> q = pair_row<T>(a.logits_q, a.stride_q, a.vocab, t);
  const float c = base2_scale(rows, temperature_of(rows, t));
  const LogSum sp = log_sum<T, kTransform>(p, f, c), sq = log_sum<T, kTransform>(q, f, c);
  if (sp.max == -kInf || sq.max == -kInf) return;  // a row of only -inf: no distribution
  const Pair w = {
      c, sp.max, sq.max, static_cast<float>(sp.log2s), static_cast<float>(sq.log2s), a.beta, 0.0f};
  double total = 0, mean = 0;
  for_blocks<T, kTransform>(p, q, f, [&](int64_t, int64_t n, const float* up, const float* uq) {
    Sums sums;
    sum_terms<kKind>(up, uq, n, w, &sums);
    total += sums.total;
    mean += sums.mean;
  });
  if (total < 0) total = 0;
  if (kKind == Divergence::kJsd && total > jsd_bound(a.beta)) total = jsd_bound(a.beta);
  *divergence = static_cast<float>(total);
  const float live = *divergence == kInf ? 0.0f : 1.0f;
  const float kept[kDivergenceState] = {live,      w.p_max,   w.q_max,
                                        w.p_log2s, w.q_log2s, static_cast<float>(mean)};
  memcpy(state, kept, sizeof(kept));
}

template <class T, bool kTransform, Divergence kKind>
void forward(const DivergenceArgs& a, const DivergenceOut& out) {
  const LogitsArgs rows = rows_of(a, a.logits_p, a.stride_p);
  const Transform f = transform_of(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(rows))
  for (int64_t t = 0; t < a.tokens; t++) {
    forward_row<T, kTransform, kKind>(a, rows, f, t, out.divergence + t,
                                      out.state + t * kDivergenceState);
  }
}

template <class T, bool kTransform, Divergence kKind>
void backward(const DivergenceArgs& a, const DivergenceGrad& g) {
  const LogitsArgs rows = rows_of(a, a.logits_p, a.stride_p);
  const Transform f = transform_of(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(rows))
  for (int64_t t = 0; t < a.tokens; t++) {
    const float* s = g.state + t * kDivergenceState;
    T* row_out = static_cast<T*>(g.grad_logits) + t * g.grad_stride;
    if (s[0] == 0.0f || g.grad_divergence[t] == 0.0f) {
      memset(static_cast<void*>(row_out), 0, static_cast<size_t>(a.vocab) * sizeof(T));
      continue;
    }
    const float temperature = temperature_of(rows, t);
    const Pair w = {base2_scale(rows, temperature), s[1], s[2], s[3], s[4], a.beta, s[5]};
    const float scale = g.grad_divergence[t] * a.logit_scale / temperature;
    const Row<T> p = pair_row<T>(a.logits_p, a.stride_p, a.vocab, t);
    const Row<T> q = pair_row<T>(a.logits_q, a.stride_q, a.vocab, t);
    alignas(64) float du[kBlock];
    for_blocks<T, kTransform>(
        p, q, f, [&](int64_t begin, int64_t n, const float* up, const float* uq) {
          if (sizeof(T) == 4 && !kTransform) {
            return gradient_terms<kKind>(up, uq, n, w, scale,
                                         reinterpret_cast<float*>(row_out) + begin);
          }
          gradient_terms<kKind>(up, uq, n, w, scale, du);
          if (kTransform) scale_by_slope(p, f, begin, n, du);
          store_block(du, n, row_out + begin);
        });
  }
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <Divergence kValue>
struct Kind {
  static constexpr Divergence value = kValue;
};

// Calls run(null pointer of the element type, Flag of a softcap, Kind).
template <class F>
void dispatch(const DivergenceArgs& a, const F& run) {
  by_dtype(rows_of(a, a.logits_p, a.stride_p), [&](auto* type) {
    auto by_kind = [&](auto transform) {
      switch (a.kind) {
        case Divergence::kJsd:
          return run(type, transform, Kind<Divergence::kJsd>());
        case Divergence::kForwardKl:
          return run(type, transform, Kind<Divergence::kForwardKl>());
        case Divergence::kReverseKl:
          return run(type, transform, Kind<Divergence::kReverseKl>());
      }
    };
    a.softcap != 0.0f ? by_kind(Flag<true>()) : by_kind(Flag<false>());
  });
}

}  // namespace

void paired_divergence_fwd(const DivergenceArgs& a, const DivergenceOut& out) {
  dispatch(a, [&](auto* type, auto transform, auto kind) {
    using T = typename RemovePointer<decltype(type)>::type;
    forward<T, decltype(transform)::value, decltype(kind)::value>(a, out);
  });
}

void paired_divergence_bwd(const DivergenceArgs& a, const DivergenceGrad& g) {
  dispatch(a, [&](auto* type, auto transform, auto kind) {
    using T = typename RemovePointer<decltype(type)>::type;
    backward<T, decltype(transform)::value, decltype(kind)::value>(a, g);
  });
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
