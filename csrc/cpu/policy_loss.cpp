// policy_loss: token losses, d loss / d logp, d loss / d entropy and metric sums of a policy
// objective.
//
// Three passes over vectors of (T): aggregation weights, the objective (which reads the tokens of a
// sequence up to three times for sequence-level ratios) and the metrics. Per token, up to 44 bytes
// of input vectors (eleven float32; a mask adds 1) are read. 12 bytes of results and 16 bytes of
// scratch memory are written.
#include "cpu/objective_tokens.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialTokens = 4096;  // below this, starting threads costs more than the work
constexpr int64_t kMetricBlock = 1024;   // fixed, so that sums do not depend on the thread count

int threads_for(const ObjectiveArgs& o) { return o.tokens < kSerialTokens ? 1 : o.threads; }

int64_t valid_in(const ObjectiveArgs& o, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t t = begin; t < end; t++) count += valid_token(o, t);
  return count;
}

void block_metrics(const ObjectiveArgs& o, int64_t begin, int64_t end, double* m) {
  const Scratch s = scratch_of(o);
  for (int i = 0; i < kMetricCount; i++) m[i] = 0;
  m[kRatioMin] = __builtin_inf();
  m[kRatioMax] = -__builtin_inf();
  for (int64_t t = begin; t < end; t++) {
    if (!valid_token(o, t)) continue;
    const double d = static_cast<double>(o.logp[t]) - o.old_logp[t];
    m[kTokens] += 1;
    m[kLoss] += o.token_loss[t];
    m[kClipLow] += (s.flags[t] & kClippedLow) != 0;
    m[kClipHigh] += (s.flags[t] & kClippedHigh) != 0;
    m[kDualClip] += (s.flags[t] & kClippedDual) != 0;
    m[kKlK1] -= d;
    m[kKlK3] += ::expm1(d) - d;
    if (o.ref_logp != nullptr) {
      const double k = static_cast<double>(o.logp[t]) - o.ref_logp[t];
      m[kRefKlK1] += k;
      m[kRefKlK3] += ::expm1(-k) + k;
    }
    m[kRatio] += s.ratio[t];
    if (s.ratio[t] < m[kRatioMin]) m[kRatioMin] = s.ratio[t];
    if (s.ratio[t] > m[kRatioMax]) m[kRatioMax] = s.ratio[t];
    if (o.entropy != nullptr) m[kEntropy] += o.entropy[t];
    m[kGradRows] += o.d_logp[t] != 0.0f || o.d_entropy[t] != 0.0f;
  }
}

}  // namespace

// Computes the aggregation weight and the advantage of every token. If inv_normalizer < 0, the
// normaliser is the count of valid tokens in this batch, or of its sequences with
// normalize_by_seqs.
void objective_prepare(const ObjectiveArgs& o) {
  const Scratch s = scratch_of(o);
  int64_t seqs = 0;
  for (int64_t i = 0; i < o.seqs; i++) {
    const int64_t begin = o.cu_seqlens[i], end = o.cu_seqlens[i + 1];
    const int64_t count = valid_in(o, begin, end);
    seqs += count > 0;
    const float w = o.params.seq_mean && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
    for (int64_t t = begin; t < end; t++) {
      s.agg_weight[t] = w;
      if (o.advantage_per_seq) s.advantage[t] = o.advantage[i];
    }
  }
  double inv = o.inv_normalizer;
  if (inv < 0) {
    const int64_t count = o.normalize_by_seqs ? seqs : valid_in(o, 0, o.tokens);
    inv = count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
  }
  const float scale = static_cast<float>(inv);
  for (int64_t t = 0; t < o.tokens; t++) {
    s.agg_weight[t] = valid_token(o, t) ? (o.seqs > 0 ? s.agg_weight[t] : 1.0f) * scale : 0.0f;
    if (!o.advantage_per_seq) s.advantage[t] = o.advantage[t];
  }
  o.sums[kSeqs] = static_cast<double>(seqs);
}

void objective_metrics(const ObjectiveArgs& o) {
  const int64_t blocks = (o.tokens + kMetricBlock - 1) / kMetricBlock;
  const double seqs = o.sums[kSeqs];
  double* total = o.sums;
  block_metrics(o, 0, 0, total);
  // Up to 64 blocks are computed in parallel, then added in block order.
  constexpr int64_t kGroup = 64;
  double parts[kGroup][kMetricCount];
  for (int64_t first = 0; first < blocks; first += kGroup) {
    const int64_t n = blocks - first < kGroup ? blocks - first : kGroup;
#pragma omp parallel for schedule(static) num_threads(threads_for(o))
    for (int64_t b = 0; b < n; b++) {
      const int64_t begin = (first + b) * kMetricBlock, end = begin + kMetricBlock;
      block_metrics(o, begin, end < o.tokens ? end : o.tokens, parts[b]);
    }
    for (int64_t b = 0; b < n; b++) {
      for (int i = 0; i < kMetricCount; i++) {
        if (i == kRatioMin) {
          if (parts[b][i] < total[i]) total[i] = parts[b][i];
        } else if (i == kRatioMax) {
          if (parts[b][i] > total[i]) total[i] = parts[b][i];
        } else {
          total[i] += parts[b][i];
        }
      }
    }
  }
  total[kAll] = static_cast<double>(o.tokens);
  total[kMaskedCount] = total[kAll] - total[kTokens];
  total[kSeqs] = seqs;
}

void policy_loss(const ObjectiveArgs& o) {
  objective_prepare(o);
  if (o.params.level == Level::kToken) {
#pragma omp parallel for schedule(static) num_threads(threads_for(o))
    for (int64_t t = 0; t < o.tokens; t++) {
      token_objective_at(o, t, o.logp[t], optional(o.entropy, t, 0.0f));
    }
  } else {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads_for(o))
    for (int64_t i = 0; i < o.seqs; i++) {
      sequence_objective(o, o.cu_seqlens[i], o.cu_seqlens[i + 1]);
    }
  }
  objective_metrics(o);
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
