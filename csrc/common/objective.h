// The per-token mathematics of every policy objective. Shared by the CPU and CUDA kernels.
//
//   policy_term: loss of one token and its derivative, as a function of the log-ratio
//   kl_term:     KL estimate of one token and its derivative with respect to logp
//
// Notation: A advantage, r = exp(log_ratio), k = logp - ref_logp. All derivatives are of the token
// loss before aggregation. runtime/policy/shapes.py defines the codes and the parameter names;
// common/shapes.h is generated from it.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/host_device.h"
#include "common/shapes.h"

namespace tokfuse {

struct ObjectiveParams {
  Shape shape;
  Level level;
  Kl kl;
  int32_t seq_mean;       // 1: a token has the weight 1 / (valid tokens of its sequence)
  float p[kShapeSlots];   // parameters of the shape; read them with ppo_clip_parameters(p), ...
  float kl_coef;          // may be negative
  float kl_clamp;         // bound on |k|; the gradient is zero outside
  float entropy_coef;     // coefficient of the entropy bonus
  float log_ratio_clamp;  // bound on |logp - old_logp|; the gradient is zero outside
  Kl anchor;              // estimator of the second KL term, against anchor_logp
  float anchor_coef;
  float anchor_clamp;
};

enum TokenFlag : uint32_t {
  kClippedLow = 1,   // A < 0 and r below the lower bound: no gradient
  kClippedHigh = 2,  // A > 0 and r above the upper bound: no gradient
  kClippedDual = 4,  // A < 0 and r above the dual bound or the cap: no gradient
};

struct PolicyTerm {
  float loss;
  float d_log_ratio;  // derivative through the ratio
  float d_logp;       // derivative through an explicit logp
  uint32_t flags;
};

TOKFUSE_HD float sigmoid(float x) {
  // exp takes a non-positive argument. So it cannot overflow, and the tail keeps its relative
  // accuracy.
  const float e = expf(-fabsf(x));
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

TOKFUSE_HD uint32_t clip_flags(float advantage, float ratio, float low, float high) {
  if (advantage < 0.0f && ratio < low) return kClippedLow;
  if (advantage > 0.0f && ratio > high) return kClippedHigh;
  return 0;
}

// The log-ratio that a bound applies to: of each token, or at the objective's level. A
// token-level objective applies both bounds at once.
enum Stage : int32_t { kTokenStage = 1, kLevelStage = 2, kBothStages = 3 };

// Returns log_ratio after the clamps of the objective. Sets `inside` to 0 if a clamp stops the
// gradient, else to 1. LogClamp narrows the token bound on the side that would improve the
// objective. NFT narrows the upper bound at the objective's level.
TOKFUSE_HD float bounded_log_ratio(const ObjectiveParams& o, Stage stage, float log_ratio,
                                   float advantage, float* inside) {
  float low = -o.log_ratio_clamp, high = o.log_ratio_clamp;
  if (o.shape == Shape::kLogClamp && (stage & kTokenStage)) {
    const float bound = log_clamp_parameters(o.p).bound;
    if (advantage >= 0.0f && bound < high) high = bound;
    if (advantage <= 0.0f && -bound > low) low = -bound;
  } else if (o.shape == Shape::kNFT && (stage & kLevelStage)) {
    const float most = nft_parameters(o.p).log_ratio_max;
    if (most < high) high = most;
  }
  *inside = log_ratio < low || log_ratio > high ? 0.0f : 1.0f;
  return log_ratio < low ? low : (log_ratio > high ? high : log_ratio);
}

TOKFUSE_HD PolicyTerm ppo_clip_term(const PPOClipParameters& p, float ratio, float a) {
  const float low = p.ratio_min, high = p.ratio_max, dual = p.dual, cap = p.cap;
  PolicyTerm out = {0.0f, 0.0f, 0.0f, clip_flags(a, ratio, low, high)};
  if (out.flags == kClippedLow) {
    out.loss = -a * low;
  } else if (out.flags == kClippedHigh) {
    out.loss = -a * high;
  } else if (a < 0.0f && (ratio > cap || ratio > dual)) {
    out.loss = -a * (cap < dual ? cap : dual);
    out.flags = kClippedDual;
  } else {
    out.loss = -a * ratio;
    out.d_log_ratio = out.loss;
  }
  return out;
}

TOKFUSE_HD PolicyTerm nft_term(const NFTParameters& p, float ratio, float a, float success_rate) {
  PolicyTerm out = {0.0f, 0.0f, 0.0f, 0};
  if (a > 0.0f) {
    const float floored = ratio > p.positive_floor ? ratio : p.positive_floor;
    out.loss = -a * logf(floored);
    out.d_log_ratio = -a * (ratio / floored);
  } else if (a < 0.0f) {
    const float q = success_rate < p.rate_min
                        ? p.rate_min
                        : (success_rate > p.rate_max ? p.rate_max : success_rate);
    const float rest = (1.0f - q * ratio) / (1.0f - q);
    // The floor changes the value only; the gradient of `rest` is kept.
    const float floored = rest > p.negative_floor ? rest : p.negative_floor;
    out.loss = a * logf(floored);
    out.d_log_ratio = -a * (q * ratio / (1.0f - q)) / floored;
  }
  return out;
}

// `signal` is the target signal of TargetRatio or the success rate of NFT.
TOKFUSE_HD PolicyTerm policy_term(const ObjectiveParams& o, float log_ratio, float logp, float a,
                                  float signal) {
  const float r = expf(log_ratio);
  PolicyTerm out = {0.0f, 0.0f, 0.0f, 0};
  switch (o.shape) {
    case Shape::kLinearLogp:
      out.loss = -a * logp;
      out.d_logp = -a;
      break;
    case Shape::kLinearRatio:
    case Shape::kLogClamp:
      out.loss = out.d_log_ratio = a == 0.0f ? 0.0f : -a * r;
      break;
    case Shape::kPPOClip:
      return ppo_clip_term(ppo_clip_parameters(o.p), r, a);
    case Shape::kStopGradClip: {
      const StopGradClipParameters p = stop_grad_clip_parameters(o.p);
      const float w = r < p.ratio_min ? p.ratio_min : (r > p.ratio_max ? p.ratio_max : r);
      out.d_logp = -w * a;
      out.loss = out.d_logp * logp;
      out.flags = clip_flags(a, r, p.ratio_min, p.ratio_max);
      break;
    }
    case Shape::kSigmoidGate: {
      const SigmoidGateParameters p = sigmoid_gate_parameters(o.p);
      const float tau = a > 0.0f ? p.tau_positive : p.tau_negative, x = tau * (r - 1.0f);
      out.loss = -(4.0f / tau) * sigmoid(x) * a;
      out.d_log_ratio = -4.0f * sigmoid(x) * sigmoid(-x) * r * a;  // 1 - sigmoid(x) would cancel
      break;
    }
    case Shape::kTargetRatio: {
      const TargetRatioParameters p = target_ratio_parameters(o.p);
      const float gap = r - (1.0f - p.low + (p.low + p.high) * sigmoid(signal));
      out.loss = fabsf(gap) * fabsf(a);
      out.d_log_ratio = fabsf(a) * (gap > 0.0f ? r : (gap < 0.0f ? -r : 0.0f));
      break;
    }
    case Shape::kQuadratic: {
      const float penalty = quadratic_parameters(o.p).penalty;
      out.loss = -a * r + penalty * (r - 1.0f) * (r - 1.0f);
      out.d_log_ratio = -r * (a - 2.0f * penalty * (r - 1.0f));
      break;
    }
    case Shape::kNFT:
      return nft_term(nft_parameters(o.p), r, a, signal);
    case Shape::kGamma: {
      const GammaParameters p = gamma_parameters(o.p);
      const float k = a >= 0.0f ? p.k_positive : p.k_negative;
      const float lam = a >= 0.0f ? p.lam_positive : p.lam_negative;
      out.d_logp = -expf(lam + k * log_ratio - lam * r) * a;
      out.loss = out.d_logp * logp;
      break;
    }
  }
  return out;
}

struct KlTerm {
  float value;
  float d_logp;
};

// `log_ratio` (current against old policy) is read by RatioK3 only, with its bound `ratio_clamp`.
TOKFUSE_HD KlTerm kl_term(Kl estimator, float clamp, float ratio_clamp, float logp, float ref_logp,
                          float log_ratio) {
  const float raw = logp - ref_logp;
  const float k = raw < -clamp ? -clamp : (raw > clamp ? clamp : raw);
  const float inside = raw < -clamp || raw > clamp ? 0.0f : 1.0f;
  const float em1 = expm1f(-k), k3 = em1 + k;  // e^-k - 1 + k without cancellation
  switch (estimator) {
    case Kl::kNone:
      return {0.0f, 0.0f};
    case Kl::kK1:
      return {k, inside};
    case Kl::kK2:
      return {0.5f * k * k, inside * k};
    case Kl::kK3:
      return {k3, inside * -em1};
    case Kl::kRatioK3: {
      float ratio_inside = 1.0f;
      const float low = -ratio_clamp, high = ratio_clamp;
      const float d = log_ratio < low ? low : (log_ratio > high ? high : log_ratio);
      if (d != log_ratio) ratio_inside = 0.0f;
      const float r = expf(d);
      return {r * k3, r * (ratio_inside * k3 - inside * em1)};
    }
    case Kl::kK1Straight:
      return {k, inside * k};
    case Kl::kK3Straight:
      return {k3, inside * k};
    case Kl::kAbs:
      return {fabsf(k), inside * (k > 0.0f ? 1.0f : (k < 0.0f ? -1.0f : 0.0f))};
  }
  return {0.0f, 0.0f};
}

// Inputs of one token. A term that the objective does not have is 0, and a missing weight is 1.
struct TokenInputs {
  float logp, entropy, old_logp, ref_logp, advantage, signal;
  float agg;  // aggregation weight times 1 / normaliser
  float weight, kl_weight, entropy_weight;
  float anchor_logp, anchor_weight;
};

// Contributions of one token. The loss and the derivatives include the factor TokenInputs::agg.
struct TokenTerms {
  float loss;
  float d_logp;     // d loss / d logp without the derivative through the ratio
  float d_entropy;  // d loss / d entropy
  float chain;      // derivative through the ratio; sequence levels share it between their tokens
  float ratio;
  uint32_t flags;
};

// Policy, KL, anchor and entropy terms of a token. `log_ratio` is the one at the objective's level.
TOKFUSE_HD TokenTerms token_terms(const ObjectiveParams& o, const TokenInputs& x, float log_ratio) {
  const PolicyTerm policy = policy_term(o, log_ratio, x.logp, x.advantage, x.signal);
  float loss = x.weight * policy.loss, d_logp = x.weight * policy.d_logp, d_entropy = 0.0f;
  if (o.kl != Kl::kNone) {
    const KlTerm kl =
        kl_term(o.kl, o.kl_clamp, o.log_ratio_clamp, x.logp, x.ref_logp, x.logp - x.old_logp);
    const float coef = o.kl_coef * x.kl_weight;
    loss += coef * kl.value;
    d_logp += coef * kl.d_logp;
  }
  if (o.anchor != Kl::kNone) {
    const KlTerm kl = kl_term(o.anchor, o.anchor_clamp, o.log_ratio_clamp, x.logp, x.anchor_logp,
                              x.logp - x.old_logp);
    const float coef = o.anchor_coef * x.anchor_weight;
    loss += coef * kl.value;
    d_logp += coef * kl.d_logp;
  }
  if (o.entropy_coef != 0.0f) {
    d_entropy = -o.entropy_coef * x.entropy_weight;
    loss += d_entropy * x.entropy;
  }
  return {x.agg * loss,    x.agg * d_logp, x.agg * d_entropy, x.agg * x.weight * policy.d_log_ratio,
          expf(log_ratio), policy.flags};
}

TOKFUSE_HD float optional(const float* p, int64_t t, float missing) {
  return p == nullptr ? missing : p[t];
}

// Slots of the metric vector, in the order of runtime/policy/metrics.py. A fraction divides its
// slot by kTokens; kMaskedCount divides by kAll.
enum Metric : int32_t {
  kTokens = 0,       // valid tokens
  kAll = 1,          // all tokens
  kSeqs = 2,         // sequences with at least one valid token
  kLoss = 3,         // sum of token_loss
  kMaskedCount = 4,  // tokens that are not valid
  kClipLow = 5,      // tokens with kClippedLow
  kClipHigh = 6,     // tokens with kClippedHigh
  kDualClip = 7,     // tokens with kClippedDual
  kKlK1 = 8,         // sum of old_logp - logp
  kKlK3 = 9,         // sum of r - 1 - log r, r = exp(logp - old_logp)
  kRefKlK1 = 10,     // sum of k = logp - ref_logp
  kRefKlK3 = 11,     // sum of exp(-k) - 1 + k
  kRatio = 12,       // sum of the ratio at the objective's level
  kRatioMin = 13,    // smallest ratio; +inf without valid tokens
  kRatioMax = 14,    // largest ratio; -inf without valid tokens
  kEntropy = 15,     // sum of the entropy
  kGradRows = 16,    // valid tokens with d_logp or d_entropy not zero
  kMetricCount = 17,
};

}  // namespace tokfuse
