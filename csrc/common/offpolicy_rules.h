// Keep rules of off-policy weights: statistics of clamped log-ratios and their bounds. Shared by
// the CPU and CUDA kernels.
#pragma once

#include <math.h>

#include "common/objective.h"
#include "common/packed_args.h"

namespace tokfuse {

constexpr double kClamp = 20;  // nats, bound on a log-ratio

struct Span {
  int64_t begin, end;
};

TOKFUSE_HD Span span_of(const OffPolicyArgs& a, int64_t seq) {
  if (a.cu_seqlens != nullptr) return {a.cu_seqlens[seq], a.cu_seqlens[seq + 1]};
  const int64_t begin = seq * a.block_tokens, end = begin + a.block_tokens;
  return {begin, end < a.tokens ? end : a.tokens};
}

TOKFUSE_HD double clamped(double x) { return x < -kClamp ? -kClamp : x > kClamp ? kClamp : x; }

// NaN counts as inside: a row with NaN must stay visible in the result.
TOKFUSE_HD bool inside(double x, double low, double high) { return !(x < low) && !(x > high); }

TOKFUSE_HD double k3_of(double d) { return ::expm1(d) - d; }

// Statistics of one sequence, shared by its rows.
struct Shared {
  double count, sum, square, k3, low, high;
};

// The statistics of a sequence that the rules read. count and sum are always computed.
struct Needs {
  bool shared, extremes, k3, ratios;  // ratios: a rule tests single rows
};

TOKFUSE_HD Needs needs_of(const OffPolicyArgs& a) {
  Needs n = {a.level == WeightLevel::kSequence || a.level == WeightLevel::kGeometric, false, false,
             false};
  for (int r = 0; r < a.num_rules; r++) {
    const KeepRule& rule = a.rules[r];
    n.shared |= rule.over != Over::kToken;
    n.ratios |= rule.over == Over::kToken;
    n.extremes |= rule.over == Over::kMax;
    n.k3 |=
        rule.statistic == Statistic::kK3 && (rule.over == Over::kSum || rule.over == Over::kMean);
  }
  return n;
}

TOKFUSE_HD double largest(double x, double y) { return x > y || x != x ? x : y; }

// Returns the statistic of a sequence-level rule. k2 and k3 are convex with their minimum at d = 0.
// So the maximum over a sequence is at its smallest or its largest log-ratio.
TOKFUSE_HD double shared_statistic(const KeepRule& rule, const Shared& s) {
  const double n = s.count > 0 ? s.count : 1;
  const bool max = rule.over == Over::kMax;
  const double share = rule.over == Over::kMean ? 1 / n : 1;
  switch (rule.statistic) {
    case Statistic::kRatio:
      return ::exp(clamped(max ? s.high : s.sum * share));
    case Statistic::kK1:
      return max ? -s.low : -s.sum * share;
    case Statistic::kK2:
      return max ? 0.5 * largest(s.low * s.low, s.high * s.high) : 0.5 * s.square * share;
    case Statistic::kK3:
      break;
  }
  return max ? largest(k3_of(s.low), k3_of(s.high)) : s.k3 * share;
}

TOKFUSE_HD double row_statistic(Statistic statistic, double d, double ratio) {
  switch (statistic) {
    case Statistic::kRatio:
      return ratio;
    case Statistic::kK1:
      return -d;
    case Statistic::kK2:
      return 0.5 * d * d;
    case Statistic::kK3:
      break;
  }
  return k3_of(d);
}

}  // namespace tokfuse
