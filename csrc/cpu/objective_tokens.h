// Evaluates an objective over packed tokens: aggregation weights, per-token terms and metrics.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {

// Layout of ObjectiveArgs::scratch, each (T).
struct Scratch {
  float* agg_weight;  // 0 for masked tokens; includes 1 / normaliser
  float* advantage;   // of each token, also if the objective's advantage is per sequence
  float* ratio;       // at the objective's level
  uint32_t* flags;
};

static inline Scratch scratch_of(const ObjectiveArgs& o) {
  return {o.scratch, o.scratch + o.tokens, o.scratch + 2 * o.tokens,
          reinterpret_cast<uint32_t*>(o.scratch + 3 * o.tokens)};
}

static inline bool valid_token(const ObjectiveArgs& o, int64_t t) {
  return o.mask == nullptr || o.mask[t] != 0;
}

// Stores token_terms in the outputs. `chain` receives the weighted derivative through the ratio.
static inline void store_terms(const ObjectiveArgs& o, int64_t t, float log_ratio, float logp,
                               float entropy, float* chain) {
  const Scratch s = scratch_of(o);
  const TokenTerms x = token_terms(o, t, log_ratio, logp, entropy, s.advantage[t], s.agg_weight[t]);
  *chain = x.chain;
  o.token_loss[t] = x.loss;
  o.d_logp[t] = x.d_logp;
  o.d_entropy[t] = x.d_entropy;
  s.ratio[t] = x.ratio;
  s.flags[t] = x.flags;
}

static inline void zero_token(const ObjectiveArgs& o, int64_t t) {
  o.token_loss[t] = o.d_logp[t] = o.d_entropy[t] = 0.0f;
}

// Evaluates a token-level objective for one token. objective_prepare must have run before.
static inline void token_objective_at(const ObjectiveArgs& o, int64_t t, float logp,
                                      float entropy) {
  if (!valid_token(o, t)) return zero_token(o, t);
  float inside, chain;
  const float d = bounded_log_ratio(o.params, kBothStages, logp - o.old_logp[t],
                                    scratch_of(o).advantage[t], &inside);
  store_terms(o, t, d, logp, entropy, &chain);
  o.d_logp[t] += inside * chain;
}

// Evaluates a sequence-level objective for the tokens [begin, end). The log-ratio of the sequence
// is the mean (or sum) of its tokens' log-ratios. The derivative with respect to it is the sum over
// the tokens; each token receives its share of that sum.
static inline void sequence_objective(const ObjectiveArgs& o, int64_t begin, int64_t end) {
  const Scratch s = scratch_of(o);
  double sum = 0;
  int64_t count = 0;
  for (int64_t t = begin; t < end; t++) {
    if (!valid_token(o, t)) {
      zero_token(o, t);
      continue;
    }
    float inside;
    sum += bounded_log_ratio(o.params, kTokenStage, o.logp[t] - o.old_logp[t], s.advantage[t],
                             &inside);
    count++;
  }
  if (count == 0) return;
  const bool is_sum = o.params.level == Level::kSequenceSum;
  const double share = is_sum ? 1.0 : 1.0 / static_cast<double>(count);
  float level_inside, chain;
  const float d = bounded_log_ratio(o.params, kLevelStage, static_cast<float>(sum * share), 0.0f,
                                    &level_inside);
  double chain_sum = 0;
  for (int64_t t = begin; t < end; t++) {
    if (!valid_token(o, t)) continue;
    store_terms(o, t, d, o.logp[t], optional(o.entropy, t, 0.0f), &chain);
    chain_sum += chain;
    if (o.params.level == Level::kSequenceToken) o.d_logp[t] += level_inside * chain;
  }
  if (o.params.level == Level::kSequenceToken) return;
  const float each = static_cast<float>(level_inside * chain_sum * share);
  for (int64_t t = begin; t < end; t++) {
    if (!valid_token(o, t)) continue;
    float inside;
    bounded_log_ratio(o.params, kTokenStage, o.logp[t] - o.old_logp[t], s.advantage[t], &inside);
    o.d_logp[t] += inside * each;
  }
}

void objective_prepare(const ObjectiveArgs& o);
void objective_metrics(const ObjectiveArgs& o);

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
