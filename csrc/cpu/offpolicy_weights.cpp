// offpolicy_weights: importance weights, kept rows and effective sample size in one pass. It reads
// 8 and writes 5 bytes per row; a mask adds 1 byte read. If the weight or a keep rule needs a
// statistic of the whole sequence, the sequence is read a second time, from the cache.
// Self-normalisation adds a pass over the weights.
//
// The sums of a sequence are float64 and are combined in order. So the result does not depend on
// the thread count.
#include "common/offpolicy_rules.h"
#include "cpu/grouping.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialTokens = 16384;
constexpr int64_t kStage = 512;  // rows staged on the stack

int threads_for(const OffPolicyArgs& a) { return a.tokens < kSerialTokens ? 1 : a.threads; }

// Stores the clamped log-ratios of n <= kStage rows in `d`; 0 for masked rows.
void stage(const OffPolicyArgs& a, int64_t begin, int64_t n, float* __restrict d) {
  const float* b = a.behavior_logp + begin;
  if (a.logp != nullptr) {
    const float* p = a.logp + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) d[i] = p[i] - b[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) d[i] = -b[i];
  }
  constexpr float kLimit = static_cast<float>(kClamp);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    d[i] = d[i] < -kLimit ? -kLimit : d[i];
    d[i] = d[i] > kLimit ? kLimit : d[i];
  }
  if (a.mask == nullptr) return;
  const uint8_t* mask = a.mask + begin;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) d[i] = mask[i] != 0 ? d[i] : 0.0f;
}

bool valid(const OffPolicyArgs& a, int64_t t) { return a.mask == nullptr || a.mask[t] != 0; }

// Adds n staged rows. Masked rows have d = 0 and add nothing to the sums.
void add_sums(const OffPolicyArgs& a, int64_t begin, int64_t n, const float* d, Shared& s) {
  double sum = 0, square = 0, count = static_cast<double>(n);
#pragma omp simd reduction(+ : sum, square)
  for (int64_t i = 0; i < n; i++) {
    const double x = d[i];
    sum += x;
    square += x * x;
  }
  if (a.mask != nullptr) {
    const uint8_t* mask = a.mask + begin;
    count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) count += mask[i] != 0 ? 1.0 : 0.0;
  }
  s.count += count;
  s.sum += sum;
  s.square += square;
}

void add_extremes(const OffPolicyArgs& a, int64_t begin, int64_t n, const float* d, Shared& s) {
  for (int64_t i = 0; i < n; i++) {
    if (!valid(a, begin + i)) continue;
    s.low = d[i] < s.low ? d[i] : s.low;
    s.high = d[i] > s.high ? d[i] : s.high;
  }
}

Shared shared_of(const OffPolicyArgs& a, const Span& span, const Needs& needs) {
  Shared s = {0, 0, 0, 0, __builtin_inf(), -__builtin_inf()};
  float d[kStage];
  for (int64_t begin = span.begin; begin < span.end; begin += kStage) {
    const int64_t n = span.end - begin < kStage ? span.end - begin : kStage;
    stage(a, begin, n, d);
    add_sums(a, begin, n, d, s);
    if (needs.extremes) add_extremes(a, begin, n, d, s);
    if (needs.k3) {
      for (int64_t i = 0; i < n; i++)
        s.k3 += k3_of(d[i]);  // 0 for d = 0, so masked rows add nothing
    }
  }
  if (s.sum != s.sum) s.low = s.high = s.sum;
  return s;
}

// Replaces the ratios w = exp(d) of n rows by their weights. One loop per mode, so each vectorises.
void transform(const OffPolicyArgs& a, float* __restrict w, const float* __restrict d, int64_t n) {
  const float low = static_cast<float>(a.low), high = static_cast<float>(a.high);
  const float p = static_cast<float>(a.param);
  switch (a.mode) {
    case WeightMode::kTruncate:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        w[i] = w[i] < low ? low : w[i];
        w[i] = w[i] > high ? high : w[i];
      }
      return;
    case WeightMode::kSwitch:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) w[i] = w[i] > high ? 0.0f : w[i];
      return;
    case WeightMode::kShrink:
      // p w / (w^2 + p), divided by w so that no square is computed. w is at least e^-20.
#pragma omp simd
      for (int64_t i = 0; i < n; i++) w[i] = p / (w[i] + p / w[i]);
      return;
    case WeightMode::kSubgaussian:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) w[i] = w[i] / (1.0f - p + p * w[i]);
      return;
    case WeightMode::kTempered:  // power <= 4 keeps the exponent in the range of exp2_simd
#pragma omp simd
      for (int64_t i = 0; i < n; i++) w[i] = exp2_simd(p * d[i] * kLog2E);
      return;
    case WeightMode::kKeep:
      for (int64_t i = 0; i < n; i++) w[i] = 1.0f;
      return;
    case WeightMode::kIps:
    case WeightMode::kMask:
      return;
  }
}

// Staged rows: log-ratio and ratio of each. `ratio` is replaced by the weight.
struct Stage {
  float d[kStage], ratio[kStage];
  uint8_t kept[kStage];
};

// Results for a whole sequence: the outcome of each sequence rule; at sequence levels its weight.
struct Verdict {
  bool passes[kMaxRules];
  bool kept;  // result of the mode "mask" at a sequence level
  float weight;
};

void apply_rule(const OffPolicyArgs& a, int64_t begin, int64_t n, const KeepRule& rule, bool passes,
                Stage& s) {
  const bool per_row = rule.over == Over::kToken;
  if (!per_row && passes) return;
  if (!per_row && !rule.negative_only) {
    memset(s.kept, 0, static_cast<size_t>(n));
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    const bool keeps =
        per_row && inside(row_statistic(rule.statistic, s.d[i], s.ratio[i]), rule.low, rule.high);
    s.kept[i] &= keeps || (rule.negative_only && a.advantage[begin + i] >= 0.0f);
  }
}

void keep_rows(const OffPolicyArgs& a, int64_t begin, int64_t n, bool per_seq,
               const Verdict& verdict, Stage& s) {
  if (a.mask != nullptr) {
    for (int64_t i = 0; i < n; i++) s.kept[i] = a.mask[begin + i] != 0;
  } else {
    memset(s.kept, 1, static_cast<size_t>(n));
  }
  if (a.mode == WeightMode::kMask && per_seq) {
    if (!verdict.kept) memset(s.kept, 0, static_cast<size_t>(n));
  } else if (a.mode == WeightMode::kMask) {
    const float low = static_cast<float>(a.low), high = static_cast<float>(a.high);
    for (int64_t i = 0; i < n; i++) s.kept[i] &= !(s.ratio[i] < low) & !(s.ratio[i] > high);
  }
  for (int r = 0; r < a.num_rules; r++) {
    apply_rule(a, begin, n, a.rules[r], verdict.passes[r], s);
  }
}

// Number of units, and the sums of their weights and squared weights.
struct Units {
  double count, sum, square;
};

// Token level: every kept row is a unit.
void write_rows(const OffPolicyArgs& a, int64_t begin, int64_t n, const Stage& s, Units& units) {
  float* __restrict weight = a.weight + begin;
  const uint8_t* __restrict kept = s.kept;
  const float* __restrict ratio = s.ratio;
  // One loop per element width: g++ 12 does not vectorise a loop that mixes them.
  int count = 0;
  for (int64_t i = 0; i < n; i++) count += kept[i];
#pragma omp simd
  for (int64_t i = 0; i < n; i++) weight[i] = kept[i] != 0 ? ratio[i] : 0.0f;
  double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t i = 0; i < n; i++) {
    const double out = weight[i];
    sum += out;
    square += out * out;
  }
  memcpy(a.kept + begin, kept, static_cast<size_t>(n));
  units = {units.count + count, units.sum + sum, units.square + square};
}

// Sequence levels: a sequence with a kept row is one unit.
void write_constant(const OffPolicyArgs& a, int64_t begin, int64_t n, double w, const Stage& s,
                    Units& units) {
  float* __restrict weight = a.weight + begin;
  const float out = static_cast<float>(w);
  bool any = false;
  for (int64_t i = 0; i < n; i++) {
    weight[i] = s.kept[i] != 0 ? out : 0.0f;
    any |= s.kept[i] != 0;
  }
  memcpy(a.kept + begin, s.kept, static_cast<size_t>(n));
  if (any) units = {1, w, w * w};
}

Verdict verdict_of(const OffPolicyArgs& a, const Span& span, const Needs& needs, bool per_seq) {
  Verdict v = {};
  if (!needs.shared) return v;
  const Shared shared = shared_of(a, span, needs);
  for (int r = 0; r < a.num_rules; r++) {
    const KeepRule& rule = a.rules[r];
    v.passes[r] =
        rule.over != Over::kToken && inside(shared_statistic(rule, shared), rule.low, rule.high);
  }
  if (!per_seq) return v;
  double d = shared.sum;
  if (a.level == WeightLevel::kGeometric && shared.count > 0) d /= shared.count;
  const float log_weight = static_cast<float>(clamped(d));
  const double ratio = ::exp(clamped(d));
  v.kept = inside(ratio, a.low, a.high);
  v.weight = static_cast<float>(ratio);
  transform(a, &v.weight, &log_weight, 1);
  return v;
}

// Computes weights, kept rows and the sums over the units of one sequence (or block of rows).
void weigh(const OffPolicyArgs& a, int64_t seq, const Needs& needs) {
  const Span span = span_of(a, seq);
  const bool per_seq = a.level == WeightLevel::kSequence || a.level == WeightLevel::kGeometric;
  const Verdict verdict = verdict_of(a, span, needs, per_seq);
  Units units = {0, 0, 0};
  Stage s;
  for (int64_t begin = span.begin; begin < span.end; begin += kStage) {
    const int64_t n = span.end - begin < kStage ? span.end - begin : kStage;
    if (!per_seq || needs.ratios) {
      stage(a, begin, n, s.d);
#pragma omp simd
      for (int64_t i = 0; i < n; i++) s.ratio[i] = exp2_simd(s.d[i] * kLog2E);
    }
    keep_rows(a, begin, n, per_seq, verdict, s);
    if (per_seq) {
      write_constant(a, begin, n, verdict.weight, s, units);
    } else {
      transform(a, s.ratio, s.d, n);
      write_rows(a, begin, n, s, units);
    }
  }
  a.partial[3 * seq] = units.count;
  a.partial[3 * seq + 1] = units.sum;
  a.partial[3 * seq + 2] = units.square;
}

void scale_rows(const OffPolicyArgs& a, int64_t seq, double mean) {
  const Span span = span_of(a, seq);
  // Weights are not negative. A mean of 0 means that all of them are 0.
  const float factor = mean == 0 ? 0.0f : static_cast<float>(1 / mean);
  for (int64_t t = span.begin; t < span.end; t++) {
    a.weight[t] = a.kept[t] ? a.weight[t] * factor : 0.0f;
  }
}

// Divides the weights by the mean over the units of their group. Returns the effective sample size
// of the divided weights.
double normalize_groups(const OffPolicyArgs& a) {
  const Grouping g = group_rows(a.group_ids, a.seqs, a.scratch_int);
  double total = 0, square = 0;
  for (int64_t k = 0; k < g.groups; k++) {
    double units = 0, sum = 0, sq = 0;
    for (int64_t i = g.start[k]; i < g.start[k + 1]; i++) {
      const double* p = a.partial + 3 * g.row[i];
      units += p[0];
      sum += p[1];
      sq += p[2];
    }
    const double mean = units > 0 ? sum / units : 0;
    for (int64_t i = g.start[k]; i < g.start[k + 1]; i++) scale_rows(a, g.row[i], mean);
    if (mean != 0) {
      total += sum / mean;
      square += sq / mean / mean;
    }
  }
  return square == 0 ? 0 : total * total / square;
}

}  // namespace

double offpolicy_weights(const OffPolicyArgs& a) {
  const Needs needs = needs_of(a);
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads_for(a))
  for (int64_t seq = 0; seq < a.seqs; seq++) weigh(a, seq, needs);
  if (a.normalize == Normalize::kGroup) return normalize_groups(a);
  double units = 0, sum = 0, square = 0;
  for (int64_t seq = 0; seq < a.seqs; seq++) {
    units += a.partial[3 * seq];
    sum += a.partial[3 * seq + 1];
    square += a.partial[3 * seq + 2];
  }
  if (a.normalize == Normalize::kBatch && units > 0) {
    const double mean = sum / units;
#pragma omp parallel for schedule(static) num_threads(threads_for(a))
    for (int64_t seq = 0; seq < a.seqs; seq++) scale_rows(a, seq, mean);
  }
  return square == 0 ? 0 : sum * sum / square;
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
