// policy_loss: token losses, d loss / d logp, d loss / d entropy and metric sums of a policy
// objective. Per token, up to 44 bytes are read (eleven float32 vectors; a mask adds 1) and 12 are
// written. Sequence-level ratios read logp, old_logp and the advantage twice more, from the cache.
//
// The unit of work is a segment: a sequence, or 1024 tokens without cu_seqlens. The kernel has
// three phases, separated by grid-wide barriers: (1) count the valid tokens of each segment,
// because every block may need the total as the normaliser; (2) the objective, with the metrics of
// each segment; (3) the sum of the metrics in the order of the segments.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/packed_kernels.h"
#include "cuda/policy_metrics.cuh"

namespace tokfuse {
namespace cuda {

constexpr int64_t kSegmentTokens = 1024;

__host__ __device__ inline int64_t policy_segments(int64_t tokens, int64_t seqs) {
  return seqs > 0 ? seqs : (tokens + kSegmentTokens - 1) / kSegmentTokens;
}

struct Segment {
  int64_t begin, end, index;
  float agg;  // aggregation weight of its valid tokens, includes 1 / normaliser
  double valid;
};

__device__ inline Segment segment_of(const ObjectiveArgs& o, int64_t i) {
  if (o.seqs > 0) return {o.cu_seqlens[i], o.cu_seqlens[i + 1], i, 0, 0};
  const int64_t begin = i * kSegmentTokens;
  return {begin, min(begin + kSegmentTokens, o.tokens), i, 0, 0};
}

__device__ inline double valid_tokens(const ObjectiveArgs& o, const Segment& s) {
  if (o.mask == nullptr) return static_cast<double>(s.end - s.begin);
  Sums<1> n = {};
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += kBlock) n.at[0] += o.mask[t] != 0;
  return block_sum(n).at[0];
}

__device__ __forceinline__ float advantage_at(const ObjectiveArgs& o, const Segment& s, int64_t t) {
  return o.advantage[o.advantage_per_seq ? s.index : t];
}

__device__ inline void store_zeros(const ObjectiveArgs& o, int64_t t) {
  o.token_loss[t] = o.d_logp[t] = o.d_entropy[t] = 0.0f;
}

// Stores the terms of token t and adds them to the metrics. Returns the derivative through the
// ratio.
__device__ inline float store_token(const ObjectiveArgs& o, const Segment& s, int64_t t,
                                    float log_ratio, float inside, PolicyMetrics* m) {
  const TokenTerms x = token_terms(o, t, log_ratio, o.logp[t], optional(o.entropy, t, 0.0f),
                                   advantage_at(o, s, t), s.agg);
  o.token_loss[t] = x.loss;
  o.d_logp[t] = x.d_logp + inside * x.chain;
  o.d_entropy[t] = x.d_entropy;
  add_token(m, o.logp[t], o.old_logp[t], o.ref_logp, o.entropy, t, x.loss, x.ratio, x.flags);
  return x.chain;
}

__device__ inline void count_gradient(const ObjectiveArgs& o, int64_t t, PolicyMetrics* m) {
  m->at[kGradRows] += o.d_logp[t] != 0.0f || o.d_entropy[t] != 0.0f;
}

__device__ inline void token_segment(const ObjectiveArgs& o, const Segment& s, PolicyMetrics* m) {
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += kBlock) {
    if (!counts(o.mask, t)) {
      store_zeros(o, t);
      continue;
    }
    float inside;
    const float d = bounded_log_ratio(o.params, kBothStages, o.logp[t] - o.old_logp[t],
                                      advantage_at(o, s, t), &inside);
    store_token(o, s, t, d, inside, m);
    count_gradient(o, t, m);
  }
}

// The log-ratio of a sequence is the mean (or sum) of its tokens' log-ratios. The derivative with
// respect to it is the sum over the tokens; each token receives its share of that sum. Every pass
// gives a token to the same thread, so a thread reads only outputs that it wrote itself.
__device__ inline void sequence_segment(const ObjectiveArgs& o, const Segment& s,
                                        PolicyMetrics* m) {
  Sums<1> sum = {};
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += kBlock) {
    if (!counts(o.mask, t)) {
      store_zeros(o, t);
      continue;
    }
    float inside;
    sum.at[0] += bounded_log_ratio(o.params, kTokenStage, o.logp[t] - o.old_logp[t],
                                   advantage_at(o, s, t), &inside);
  }
  sum = block_sum(sum);
  if (s.valid == 0) return;
  const double share = o.params.level == Level::kSequenceSum ? 1.0 : 1.0 / s.valid;
  float level_inside;
  const float d = bounded_log_ratio(o.params, kLevelStage, static_cast<float>(sum.at[0] * share),
                                    0.0f, &level_inside);
  const bool own = o.params.level == Level::kSequenceToken;  // derivatives are not shared
  Sums<1> chain = {};
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += kBlock) {
    if (!counts(o.mask, t)) continue;
    chain.at[0] += store_token(o, s, t, d, own ? level_inside : 0.0f, m);
    if (own) count_gradient(o, t, m);
  }
  if (own) return;
  const float each = static_cast<float>(level_inside * block_sum(chain).at[0] * share);
  for (int64_t t = s.begin + threadIdx.x; t < s.end; t += kBlock) {
    if (!counts(o.mask, t)) continue;
    float inside;
    bounded_log_ratio(o.params, kTokenStage, o.logp[t] - o.old_logp[t], advantage_at(o, s, t),
                      &inside);
    o.d_logp[t] += inside * each;
    count_gradient(o, t, m);
  }
}

// Returns the number of valid tokens and the number of segments that have at least one.
__device__ inline Sums<2> batch_counts(const double* valid, int64_t segments) {
  Sums<2> mine = {};
  for (int64_t i = threadIdx.x; i < segments; i += kBlock) {
    mine.add({{valid[i], valid[i] > 0 ? 1.0 : 0.0}});
  }
  return block_sum(mine);
}

__device__ inline double inverse_normalizer(const ObjectiveArgs& o, const double* valid,
                                            int64_t segments) {
  if (o.inv_normalizer >= 0) return o.inv_normalizer;
  const Sums<2> n = batch_counts(valid, segments);
  const double count = o.normalize_by_seqs ? (o.seqs > 0 ? n.at[1] : 0) : n.at[0];
  return count > 0 ? 1.0 / count : 0.0;
}

__global__ void __launch_bounds__(kBlock)
    policy_loss_kernel(const ObjectiveArgs o, const LossArgs loss, double* const partial) {
  const int64_t segments = policy_segments(o.tokens, o.seqs);
  double* valid = partial;
  PolicyMetrics* metrics = reinterpret_cast<PolicyMetrics*>(partial + segments);
  for (int64_t i = blockIdx.x; i < segments; i += gridDim.x) {
    const double n = valid_tokens(o, segment_of(o, i));
    if (threadIdx.x == 0) valid[i] = n;
  }
  grid_sync();
  const float scale = static_cast<float>(inverse_normalizer(o, valid, segments));
  for (int64_t i = blockIdx.x; i < segments; i += gridDim.x) {
    Segment s = segment_of(o, i);
    s.valid = valid[i];
    const bool mean = o.params.seq_mean && s.valid > 0;
    s.agg = (mean ? 1.0f / static_cast<float>(s.valid) : 1.0f) * scale;
    PolicyMetrics m = no_metrics();
    if (o.params.level == Level::kToken) {
      token_segment(o, s, &m);
    } else {
      sequence_segment(o, s, &m);
    }
    m = block_sum(m);
    if (threadIdx.x == 0) metrics[i] = m;
  }
  grid_sync();
  if (blockIdx.x != 0) return;
  const double seqs = o.seqs > 0 ? batch_counts(valid, segments).at[1] : 0;
  const PolicyMetrics all = block_sum_of(metrics, segments, no_metrics());
  if (threadIdx.x == 0) store_metrics(all, o.tokens, seqs, o.sums, loss);
}

// Metric sums of a step whose token results a row kernel wrote. `partial` has one record per
// segment of kSegmentTokens.
__global__ void __launch_bounds__(kBlock)
    policy_metrics_kernel(const MetricsArgs r, const LossArgs loss, double* const partial,
                          double* const out) {
  const int64_t segments = policy_segments(r.tokens, 0);
  PolicyMetrics* metrics = reinterpret_cast<PolicyMetrics*>(partial);
  for (int64_t i = blockIdx.x; i < segments; i += gridDim.x) {
    const int64_t end = min((i + 1) * kSegmentTokens, r.tokens);
    PolicyMetrics m = no_metrics();
    for (int64_t t = i * kSegmentTokens + threadIdx.x; t < end; t += kBlock) {
      if (!counts(r.mask, t)) continue;
      add_token(&m, r.logp[t], r.old_logp[t], r.ref_logp, r.entropy, t, r.token_loss[t], r.ratio[t],
                static_cast<uint32_t>(r.flags[t]));
      m.at[kGradRows] += r.d_logp[t] != 0.0f || r.d_entropy[t] != 0.0f;
    }
    m = block_sum(m);
    if (threadIdx.x == 0) metrics[i] = m;
  }
  grid_sync();
  if (blockIdx.x != 0) return;
  const PolicyMetrics all = block_sum_of(metrics, segments, no_metrics());
  Sums<1> seqs = {};
  for (int64_t i = threadIdx.x; r.counts != nullptr && i < r.seqs; i += kBlock) {
    seqs.at[0] += r.counts[i] > 0;
  }
  seqs = block_sum(seqs);
  if (threadIdx.x == 0) store_metrics(all, r.tokens, seqs.at[0], out, loss);
}

// One block per sequence: counts its valid tokens, and writes the aggregation weight and the
// advantage of each token.
__global__ void __launch_bounds__(kBlock) policy_prepare_kernel(const PrepareArgs a) {
  const int64_t seq = blockIdx.x, begin = a.cu_seqlens[seq], end = a.cu_seqlens[seq + 1];
  Sums<1> n = {};
  for (int64_t t = begin + threadIdx.x; t < end; t += kBlock) n.at[0] += counts(a.mask, t);
  n = block_sum(n);
  if (threadIdx.x == 0) a.counts[seq] = static_cast<int32_t>(n.at[0]);
  const float weight = n.at[0] > 0 ? 1.0f / static_cast<float>(n.at[0]) : 1.0f;
  for (int64_t t = begin + threadIdx.x; t < end; t += kBlock) {
    if (a.agg_weight != nullptr) a.agg_weight[t] = weight;
    if (a.advantage != nullptr) a.advantage[t] = a.seq_advantage[seq];
  }
}

// One block: the inverse of the number of valid tokens, or of sequences with a valid token.
__global__ void __launch_bounds__(kBlock) policy_count_kernel(const CountArgs a) {
  Sums<1> n = {};
  if (a.counts != nullptr) {
    for (int64_t i = threadIdx.x; i < a.seqs; i += kBlock) n.at[0] += a.counts[i] > 0;
  } else {
    for (int64_t t = threadIdx.x; t < a.tokens; t += kBlock) n.at[0] += counts(a.mask, t);
  }
  n = block_sum(n);
  if (threadIdx.x == 0) {
    *a.batch_inv_normalizer = static_cast<float>(n.at[0] > 0 ? 1.0 / n.at[0] : 0.0);
  }
}

}  // namespace cuda
}  // namespace tokfuse
