// The divergences of two distributions, and their gradients, from blocks of transformed logits
// whose log-sum-exps are known.
//
// delta = log p - log q is formed from u_p - u_q so that close logits subtract
// exactly. With `big` the larger of p and q, a = |delta| and m1 = e^-a - 1:
//     small = big (1 + m1),   q - p = +-big m1,   log(big / mix) = -log(1 + b m1),
// with b the weight of the smaller one in the mixture. These keep their relative precision if P
// and Q are close, and are exactly 0 if the rows are equal. KL(a || b) is summed as
// a log(a / b) + (b - a). Each such term is >= 0, and an error of the log-sum-exps cancels in the
// sum to first order.
#pragma once

#include "cpu/row_gradient.h"

namespace tokfuse {
namespace TOKFUSE_ISA {

constexpr float kLn2f = 0.693147180559945309417f;

// A KL below this is computed again by the second pass. The first one has an absolute error of
// about 3e-7, which is 0.3% here.
constexpr double kClose = 1e-4;

constexpr bool is_kl(Divergence kind) {
  return kind == Divergence::kForwardKl || kind == Divergence::kReverseKl;
}
constexpr bool has_mixture(Divergence kind) {
  return !is_kl(kind) && kind != Divergence::kTotalVariation;
}

// What turns two staged logits into probabilities; base 2.
struct Pair {
  float c;             // log2(e) / T
  float p_max, q_max;  // log2 p = (u_p - p_max) c - p_log2s
  float p_log2s, q_log2s;
  float p_weight, q_weight;  // mix = p_weight p + q_weight q
  float mean;                // sum of p s, s = Element::slope
};

// r = 2^x and m1 = 2^x - 1 for x in [-127, 0], each with a relative error <= 4e-7: exp2_simd's
// polynomial without its 1.
struct Power {
  float r, m1;
};

static inline Power power_of(float x) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  const float t = x + kMagic;
  const float r = x - (t - kMagic);
  float p = 0x1.5bba14p-10f;
  p = p * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  const float scale = float_of(bits_of(t) << 23);
  const float rest = p * r;
  return {rest * scale + scale, rest * scale + (scale - 1.0f)};
}

// ln(1 + f) for 1 + f in [sqrt 1/2, sqrt 2). Polynomial of the Cephes library's logf.
static inline float log_of_fraction(float f) {
  const float f2 = f * f, f4 = f2 * f2;  // Estrin's order: half the latency of Horner's
  const float p01 = 3.3333331174e-1f - 2.4999993993e-1f * f;
  const float p23 = 2.0000714765e-1f - 1.6668057665e-1f * f;
  const float p45 = 1.4249322787e-1f - 1.2420140846e-1f * f;
  const float p67 = 1.1676998740e-1f - 1.1514610310e-1f * f;
  const float p = (p01 + p23 * f2) + f4 * ((p45 + p67 * f2) + f4 * 7.0376836292e-2f);
  return f - f2 * (0.5f - f * p);
}

// t = 2^exponent (1 + fraction), with 1 + fraction in [sqrt 1/2, sqrt 2). Exact. 0 gives an
// exponent of -127.
struct Binary {
  float exponent, fraction;
};

static inline Binary binary_of(float t) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t i = bits_of(t) - kSqrtHalf;
  return {static_cast<float>(static_cast<int32_t>(i) >> 23),
          float_of((i & 0x7fffffu) + kSqrtHalf) - 1.0f};
}

// ln t for t = 1 + y in (0, 1], relative error <= 3e-7. y has the digits near t = 1, and t those
// near 0.
static inline float log_split(float t, float y) {
  const Binary b = binary_of(t);
  return b.exponent * kLn2f + log_of_fraction(b.exponent == 0.0f ? y : b.fraction);
}

struct Element {
  float p;
  float term;   // of the divergence
  float slope;  // s of the gradient p (s - sum p s); kForwardKl: p - q, the gradient itself
};

template <Divergence kKind>
static inline Element element(float up, float uq, const Pair& w, float floor) {
  // Two excluded logits would give inf - inf.
  const float apart = (up == uq ? 0.0f : up - uq) - (w.p_max - w.q_max);
  const float delta = apart * w.c - (w.p_log2s - w.q_log2s);
  const float lp = (up - w.p_max) * w.c - w.p_log2s, lq = (uq - w.q_max) * w.c - w.q_log2s;
  const bool p_is_big = delta >= 0.0f;
  const float away = clamp_exponent(p_is_big ? -delta : delta, floor);
  const float big = exp2_simd(clamp_exponent(p_is_big ? lp : lq, floor));
  const Power power = power_of(away);
  const float m1 = power.m1, big_gap = big * m1;
  // A KL needs an exact 0 for an excluded entry, a mixture the digits of the smaller probability.
  const float small = has_mixture(kKind) ? big * power.r : big + big_gap;
  const float p = p_is_big ? big : small, q = p_is_big ? small : big;
  const float gap = p_is_big ? big_gap : -big_gap;  // q - p
  if (has_mixture(kKind)) {
    const float b = p_is_big ? w.q_weight : w.p_weight;
    const float big_weight = p_is_big ? w.p_weight : w.q_weight;
    const float t = big_weight + b * power.r;  // mix / big
    const float of_big = -log_split(t, b * m1), of_small = of_big + away * kLn2f;
    // A sum, because g++ 12 turns a choice of the two into a branch and does not vectorise the
    // loop.
    const float log_p = of_big + (p_is_big ? 0.0f : away) * kLn2f;  // log(p / mix)
    const float apart_by_mix = (p_is_big ? m1 : -m1) / t;           // (q - p) / mix
    if (kKind == Divergence::kSkewForward) {
      const float log_q = p_is_big ? of_small : of_big;
      return {p, q * log_q - w.p_weight * gap, -w.p_weight * w.p_weight * apart_by_mix};
    }
    if (kKind == Divergence::kSkewReverse) {
      return {p, p * log_p + w.q_weight * gap, log_p + w.p_weight * w.q_weight * apart_by_mix};
    }
    return {p, big_weight * big * of_big + b * small * of_small, w.p_weight * log_p};
  }
  const float nats = delta * kLn2f;
  if (kKind == Divergence::kTotalVariation) {
    return {p, -0.5f * big_gap, delta > 0.0f ? 0.5f : (delta < 0.0f ? -0.5f : delta)};
  }
  // If the weight is 0 the term is 0 and not 0 * inf; the gap carries the NaN of the row.
  if (kKind == Divergence::kReverseKl) {
    const float slope = p > 0.0f ? nats : 0.0f;
    return {p, p * slope + gap, slope};
  }
  return {p, (q > 0.0f ? -q * nats : 0.0f) - gap, -gap};
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
    if (kKind != Divergence::kForwardKl) mean += e.p * e.slope;
  }
  *out = {total, mean};
}

// d divergence / d u_p times `scale`; `out` may be `up`.
template <Divergence kKind>
TOKFUSE_BLOCK_LOOP static void gradient_terms(const float* up, const float* __restrict uq,
                                              int64_t n, const Pair& pair, float scale,
                                              float* out) {
  const Pair w = pair;
  const float floor = opaque(kExponentFloor);
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const Element e = element<kKind>(up[j], uq[j], w, floor);
    out[j] = scale * (kKind == Divergence::kForwardKl ? e.slope : e.p * (e.slope - w.mean));
  }
}

static inline Pair pair_of(Divergence kind, float mix_weight, float c, float p_max, float q_max,
                           float p_log2s, float q_log2s, float mean) {
  const bool of_p = kind == Divergence::kSkewReverse;
  return {c,
          p_max,
          q_max,
          p_log2s,
          q_log2s,
          of_p ? mix_weight : 1.0f - mix_weight,
          of_p ? 1.0f - mix_weight : mix_weight,
          mean};
}

template <Divergence kValue>
struct Kind {
  static constexpr Divergence value = kValue;
};

// Calls run(Kind).
template <class F>
static inline void by_kind(Divergence kind, const F& run) {
  switch (kind) {
    case Divergence::kJsd:
      return run(Kind<Divergence::kJsd>());
    case Divergence::kForwardKl:
      return run(Kind<Divergence::kForwardKl>());
    case Divergence::kReverseKl:
      return run(Kind<Divergence::kReverseKl>());
    case Divergence::kSkewForward:
      return run(Kind<Divergence::kSkewForward>());
    case Divergence::kSkewReverse:
      return run(Kind<Divergence::kSkewReverse>());
    case Divergence::kTotalVariation:
      return run(Kind<Divergence::kTotalVariation>());
  }
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
