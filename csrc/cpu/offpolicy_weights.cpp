// offpolicy_weights: importance weights, kept rows and effective sample size in one pass. Reads 8
// and writes 5 bytes per row; a sequence is read a second time from the cache when its weight or a
// keep rule needs a statistic of the whole sequence. Self-normalisation adds a pass over the
// weights.
//
// Sums per sequence are float64 and combined in order, whatever the thread count.
#include "cpu/grouping.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialTokens = 16384;
constexpr int64_t kStage = 512;  // rows staged on the stack
constexpr double kClamp = 20;    // nats

struct Span {
  int64_t begin, end;
};

Span span_of(const OffPolicyArgs& a, int64_t seq) {
  if (a.cu_seqlens != nullptr) return {a.cu_seqlens[seq], a.cu_seqlens[seq + 1]};
  const int64_t begin = seq * a.block_tokens, end = begin + a.block_tokens;
  return {begin, end < a.tokens ? end : a.tokens};
}

int threads_for(const OffPolicyArgs& a) { return a.tokens < kSerialTokens ? 1 : a.threads; }

double clamped(double x) { return x < -kClamp ? -kClamp : x > kClamp ? kClamp : x; }

// NaN is inside: a poisoned row must show, not vanish.
bool inside(double x, double low, double high) { return !(x < low) && !(x > high); }

// Clamped log-ratios of n <= kStage rows; 0 on masked rows.
void stage(const OffPolicyArgs& a, int64_t begin, int64_t n, float* __restrict d) {
  const float* b = a.behavior + begin;
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

double k3_of(double d) { return ::expm1(d) - d; }

// Statistics of one sequence that its rows share.
struct Shared {
  double count, sum, square, k3, low, high;
};

// Which statistics of a sequence the rules read; count and sum are always there.
struct Needs {
  bool shared, extremes, k3;
};

Needs needs_of(const OffPolicyArgs& a) {
  Needs n = {a.level == WeightLevel::kSequence || a.level == WeightLevel::kGeometric, false, false};
  for (int r = 0; r < a.num_rules; r++) {
    const KeepRule& rule = a.rules[r];
    n.shared |= rule.over != Over::kToken;
    n.extremes |= rule.over == Over::kMax;
    n.k3 |=
        rule.statistic == Statistic::kK3 && (rule.over == Over::kSum || rule.over == Over::kMean);
  }
  return n;
}

// Adds n staged rows; masked ones hold d = 0 and add nothing to the sums.
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
        s.k3 += k3_of(d[i]);  // 0 at d = 0, so masked rows add nothing
    }
  }
  if (s.sum != s.sum) s.low = s.high = s.sum;
  return s;
}

double largest(double x, double y) { return x > y || x != x ? x : y; }

// The statistic of a sequence-level rule. k2 and k3 are convex with their minimum at d = 0, so
// their maximum over a sequence sits at its smallest or largest log-ratio.
double shared_statistic(const KeepRule& rule, const Shared& s) {
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

double row_statistic(Statistic statistic, double d, double ratio) {
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

// Weights of n rows from their ratios w = exp(d), in place. One loop per mode: each one vectorises.
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
      // Divided through by w: w * w overflows at e^44, and 1 / w of a clamped ratio does not.
#pragma omp simd
      for (int64_t i = 0; i < n; i++) w[i] = p / (w[i] + p / w[i]);
      return;
    case WeightMode::kSubgaussian:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) w[i] = w[i] / (1.0f - p + p * w[i]);
      return;
    case WeightMode::kTempered:  // power <= 4, so the exponent stays inside the range of exp2_simd
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

// One staged stretch of rows. `d` and `ratio` are each row's own, `level_d` and `w` those that the
// weight is built from: the same, or the sequence's.
struct Stage {
  float d[kStage], ratio[kStage], level_d[kStage], w[kStage];
  uint8_t kept[kStage];
};

void keep_rows(const OffPolicyArgs& a, int64_t begin, int64_t n, const bool* verdict, Stage& s) {
  if (a.mask != nullptr) {
    for (int64_t i = 0; i < n; i++) s.kept[i] = a.mask[begin + i] != 0;
  } else {
    memset(s.kept, 1, static_cast<size_t>(n));
  }
  if (a.mode == WeightMode::kMask) {
    for (int64_t i = 0; i < n; i++) s.kept[i] &= inside(s.w[i], a.low, a.high);
  }
  for (int r = 0; r < a.num_rules; r++) {
    const KeepRule& rule = a.rules[r];
    for (int64_t i = 0; i < n; i++) {
      const bool keeps =
          rule.over == Over::kToken
              ? inside(row_statistic(rule.statistic, s.d[i], s.ratio[i]), rule.low, rule.high)
              : verdict[r];
      s.kept[i] &= keeps || (rule.negative_only && a.advantage[begin + i] >= 0.0f);
    }
  }
}

// Units and the sums over their weights.
struct Units {
  double count, sum, square;
};

// Writes n rows and adds their units: every kept row, or the first kept one of a sequence.
void write_rows(const OffPolicyArgs& a, int64_t begin, int64_t n, bool per_seq, const Stage& s,
                Units& units) {
  float* weight = a.weight + begin;
  double count = 0, sum = 0, square = 0;
#pragma omp simd reduction(+ : count, sum, square)
  for (int64_t i = 0; i < n; i++) {
    const float out = s.kept[i] != 0 ? s.w[i] : 0.0f;
    weight[i] = out;
    count += s.kept[i] != 0 ? 1.0 : 0.0;
    sum += out;
    square += static_cast<double>(out) * out;
  }
  memcpy(a.kept + begin, s.kept, static_cast<size_t>(n));
  if (!per_seq) {
    units.count += count;
    units.sum += sum;
    units.square += square;
  } else if (units.count == 0 && count > 0) {
    const double w = s.w[0];  // the same in every row
    units = {1, w, w * w};
  }
}

// One sequence (or block of rows): weights, kept rows, and the sums over its units.
void weigh(const OffPolicyArgs& a, int64_t seq, const Needs& needs) {
  const Span span = span_of(a, seq);
  const bool per_seq = a.level == WeightLevel::kSequence || a.level == WeightLevel::kGeometric;
  Shared shared = {0, 0, 0, 0, 0, 0};
  bool verdict[kMaxRules] = {};
  if (needs.shared) {
    shared = shared_of(a, span, needs);
    for (int r = 0; r < a.num_rules; r++) {
      const KeepRule& rule = a.rules[r];
      verdict[r] =
          rule.over != Over::kToken && inside(shared_statistic(rule, shared), rule.low, rule.high);
    }
  }
  double log_weight = shared.sum;
  if (a.level == WeightLevel::kGeometric && shared.count > 0) log_weight /= shared.count;
  log_weight = clamped(log_weight);
  const float seq_d = static_cast<float>(log_weight);
  const float seq_ratio = static_cast<float>(::exp(log_weight));
  Units units = {0, 0, 0};
  Stage s;
  for (int64_t begin = span.begin; begin < span.end; begin += kStage) {
    const int64_t n = span.end - begin < kStage ? span.end - begin : kStage;
    stage(a, begin, n, s.d);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) s.ratio[i] = exp2_simd(s.d[i] * kLog2E);
    for (int64_t i = 0; i < n; i++) {
      s.w[i] = per_seq ? seq_ratio : s.ratio[i];
      s.level_d[i] = per_seq ? seq_d : s.d[i];
    }
    keep_rows(a, begin, n, verdict, s);
    transform(a, s.w, s.level_d, n);
    write_rows(a, begin, n, per_seq, s, units);
  }
  a.partial[3 * seq] = units.count;
  a.partial[3 * seq + 1] = units.sum;
  a.partial[3 * seq + 2] = units.square;
}

void scale_rows(const OffPolicyArgs& a, int64_t seq, double mean) {
  const Span span = span_of(a, seq);
  // A mean of 0 has only zero weights behind it.
  const float factor = mean == 0 ? 0.0f : static_cast<float>(1 / mean);
  for (int64_t t = span.begin; t < span.end; t++) {
    a.weight[t] = a.kept[t] ? a.weight[t] * factor : 0.0f;
  }
}

// Divides by the mean over the units of each group; returns the effective sample size after it.
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
