// Runs every row kernel on small problems, for the sanitizers, the checker and shuffled orders. The
// arrays are not padded. Prints one line per launch: a hash of its outputs. `rows OP BYTES VOCAB`
// runs only one op, on logits of that many bytes each.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/kernels.h"
#include "cuda/vectors.cuh"
#include "program.h"

namespace tokfuse {
namespace cuda {
namespace {

constexpr int64_t kTokens = 5;

int report(const char* what, DType dtype, int64_t vocab, cudaError_t error, const Hash& hash) {
  printf("%s %d %ld %s %016lx\n", what, static_cast<int>(dtype), static_cast<long>(vocab),
         cudaGetErrorName(error), static_cast<unsigned long>(hash.value()));
  return error != cudaSuccess;
}

struct Problem {
  Memory memory;
  LogitsArgs args = {};
  TokenStatsOut stats = {};
  void* grad = nullptr;

  Problem(DType dtype, int64_t vocab, int64_t stride, bool options) {
    args.logits = memory.logits(dtype, kTokens, stride, vocab);
    args.stride = stride;
    args.dtype = dtype;
    args.rows = args.tokens = kTokens;
    args.vocab = vocab;
    int64_t* target = memory.of<int64_t>(kTokens);
    uint8_t* mask = memory.of<uint8_t>(kTokens);
    for (int64_t t = 0; t < kTokens; t++) {
      target[t] = t == 0 ? vocab - 1 : t * 7 % vocab;
      mask[t] = t != 2;
    }
    args.target = target;
    args.mask = mask;
    args.temperature = args.logit_scale = args.bias_scale = 1.0f;
    if (options) {
      args.temperatures = memory.uniform(kTokens, 0.5f, 2.0f);
      args.softcap = 20.0f;
      args.bias_logits = memory.logits(dtype, kTokens, stride, vocab);
      args.bias_stride = stride;
    }
    float** outputs[] = {&stats.logp,        &stats.entropy,     &stats.lse,     &stats.sum_sq,
                         &stats.top1,        &stats.row_max,     &stats.inv_sum, &stats.second_logp,
                         &stats.sum_p2_logp, &stats.sum_p2_logp2};
    for (size_t i = 0; i < (options ? 10u : 7u); i++) *outputs[i] = memory.of<float>(kTokens);
    stats.second_temperature = 0.7f;
    grad = memory.logits(dtype, kTokens, stride, vocab);
  }

  // Makes a column by far the likeliest of its row.
  void peak(int64_t row, int64_t column) {
    void* logits = const_cast<void*>(args.logits);
    const int64_t at = row * args.stride + column;
    if (args.dtype == DType::kFloat32) {
      static_cast<float*>(logits)[at] = 40.0f;
    } else {
      store_element(static_cast<BFloat16*>(logits) + at, 40.0f);
    }
  }

  void hash_stats(Hash* hash) const {
    for (const float* p :
         {stats.logp, stats.entropy, stats.lse, stats.sum_sq, stats.top1, stats.row_max,
          stats.inv_sum, stats.second_logp, stats.sum_p2_logp, stats.sum_p2_logp2}) {
      if (p != nullptr) hash->add(p, kTokens * 4);
    }
  }
};

int token_stats(DType dtype, int64_t vocab, int64_t stride, bool options) {
  Problem x(dtype, vocab, stride, options);
  const char* name = options ? "token_stats_options" : "token_stats";
  Hash hash;
  cudaError_t error = token_stats_fwd(x.args, x.stats, nullptr);
  x.hash_stats(&hash);
  const int failed = report(name, dtype, vocab, error, hash);
  const float *ga = x.memory.uniform(kTokens, -1.0f, 1.0f),
              *gh = x.memory.uniform(kTokens, -1.0f, 1.0f);
  error = token_stats_bwd(x.args,
                          {x.stats.row_max, x.stats.inv_sum, x.stats.logp, x.stats.entropy, ga, gh,
                           x.grad, stride, dtype, nullptr, nullptr, nullptr},
                          nullptr);
  hash.rows(x.grad, dtype, kTokens, stride, vocab);
  return failed + report(name, dtype, vocab, error, hash);
}

// The statistic of cross_entropy, and the gradients of lse and of this statistic.
int cross_entropy(DType dtype, int64_t vocab, int64_t stride, bool weighted) {
  Problem x(dtype, vocab, stride, false);
  x.stats.logit_sum = x.memory.of<float>(kTokens);
  if (weighted) x.stats.class_weight = x.memory.uniform(vocab, 0.1f, 1.0f);
  Hash hash;
  cudaError_t error = token_stats_fwd(x.args, x.stats, nullptr);
  x.hash_stats(&hash);
  hash.add(x.stats.logit_sum, kTokens * 4);
  const int failed = report("cross_entropy", dtype, vocab, error, hash);
  const float* g = x.memory.uniform(kTokens, -1.0f, 1.0f);
  error = token_stats_bwd(x.args,
                          {x.stats.row_max, x.stats.inv_sum, x.stats.logp, x.stats.entropy, g,
                           nullptr, x.grad, stride, dtype, g, g, x.stats.class_weight},
                          nullptr);
  hash.rows(x.grad, dtype, kTokens, stride, vocab);
  return failed + report("cross_entropy", dtype, vocab, error, hash);
}

int policy(DType dtype, int64_t vocab, int64_t stride, bool in_place) {
  Problem x(dtype, vocab, stride, false);
  TokenObjectiveArgs o = {};
  o.params.shape = Shape::kPPOClip;
  o.params.kl = Kl::kK3;
  const PPOClipParameters clip = {0.8f, 1.2f, 100.0f, 100.0f};
  memcpy(o.params.p, &clip, sizeof clip);
  o.params.kl_coef = 0.1f;
  o.params.kl_clamp = o.params.log_ratio_clamp = 20.0f;
  o.params.entropy_coef = 0.01f;
  float* old_logp = x.memory.uniform(kTokens, -9.0f, -6.0f);
  float* advantage = x.memory.uniform(kTokens, -1.0f, 1.0f);
  o.old_logp = old_logp;
  o.advantage = advantage;
  o.ref_logp = x.memory.uniform(kTokens, -9.0f, -6.0f);
  o.inv_normalizer = 0.5f;
  float** results[] = {&o.token_loss, &o.d_logp, &o.d_entropy, &o.ratio};
  for (float** p : results) *p = x.memory.of<float>(kTokens);
  o.flags = x.memory.of<int32_t>(kTokens);
  void* grad = in_place ? const_cast<void*>(x.args.logits) : x.grad;
  const cudaError_t error =
      policy_step(x.args, x.stats, o, {grad, stride, dtype, nullptr}, nullptr);
  Hash hash;
  x.hash_stats(&hash);
  for (float** p : results) hash.add(*p, kTokens * 4);
  hash.add(o.flags, kTokens * 4);
  hash.rows(grad, dtype, kTokens, stride, vocab);
  return report(in_place ? "policy_step_" : "policy_step", dtype, vocab, error, hash);
}

int kept(DType dtype, int64_t vocab) {
  Problem x(dtype, vocab, vocab, false);
  constexpr int64_t kIds = 150;
  int64_t* ids = x.memory.of<int64_t>(kIds);
  for (int64_t i = 0; i < kIds; i++) ids[i] = i * 7 % vocab;
  int64_t* offsets = x.memory.of<int64_t>(kTokens + 1);
  for (int64_t t = 0; t <= kTokens; t++) offsets[t] = t < 3 ? t : kIds;
  const KeptArgs args = {x.args, ids, offsets, kIds, nullptr};
  cudaError_t error = kept_token_stats_fwd(args, x.stats, nullptr);
  const float* ones = x.memory.uniform(kTokens, 1.0f, 2.0f);
  if (error == cudaSuccess) {
    error = kept_token_stats_bwd(args,
                                 {x.stats.row_max, x.stats.inv_sum, x.stats.logp, x.stats.entropy,
                                  ones, ones, x.grad, vocab, dtype, nullptr, nullptr, nullptr},
                                 nullptr);
  }
  Hash hash;
  x.hash_stats(&hash);
  hash.rows(x.grad, dtype, kTokens, vocab, vocab);
  return report("kept_token_stats", dtype, vocab, error, hash);
}

// Duplicates, padding, and a confident id that is not the target; in place for the gradient.
int at_ids(DType dtype, int64_t vocab, int64_t stride, bool options) {
  Problem x(dtype, vocab, stride, options);
  x.stats.second_logp = x.stats.sum_p2_logp = x.stats.sum_p2_logp2 = nullptr;
  constexpr int64_t kIds = 150;
  int64_t* ids = x.memory.of<int64_t>(kIds);
  for (int64_t i = 0; i < kIds; i++) ids[i] = i % 11 == 5 ? -1 : i % 50 * 7 % vocab;
  int64_t* offsets = x.memory.of<int64_t>(kTokens + 1);
  for (int64_t t = 0; t <= kTokens; t++) offsets[t] = t < 3 ? t : t * kIds / kTokens;
  for (int64_t t : {1, 3}) {
    ids[offsets[t]] = 3;
    x.peak(t, 3);
  }
  IdsArgs at = {};
  at.ids = ids;
  at.offsets = offsets;
  at.num_ids = kIds;
  at.logp_at = x.memory.of<float>(kIds);
  at.grad_logp_at = x.memory.uniform(kIds, -1.0f, 1.0f);
  at.grad_at = x.memory.of<float>(kIds);
  at.grad_at_target = x.memory.of<float>(kTokens);
  at.grad_total = x.memory.of<float>(kTokens);
  cudaError_t error = token_stats_at_fwd(x.args, x.stats, at, nullptr);
  Hash hash;
  x.hash_stats(&hash);
  hash.add(at.logp_at, kIds * 4);
  const float* gh = x.memory.uniform(kTokens, -1.0f, 1.0f);
  void* grad = const_cast<void*>(x.args.logits);
  if (error == cudaSuccess) {
    error = token_stats_at_bwd(x.args,
                               {x.stats.row_max, x.stats.inv_sum, x.stats.logp, x.stats.entropy,
                                nullptr, gh, grad, stride, dtype, nullptr, nullptr, nullptr},
                               at, nullptr);
  }
  hash.rows(grad, dtype, kTokens, stride, vocab);
  return report(options ? "token_stats_at_options" : "token_stats_at", dtype, vocab, error, hash);
}

int divergence(DType dtype, int64_t vocab, Divergence kind) {
  Problem x(dtype, vocab, vocab, false);
  const void* q = x.memory.logits(dtype, kTokens, vocab, vocab);
  DivergenceArgs args = {};
  args.logits_p = x.args.logits;
  args.logits_q = q;
  args.stride_p = args.stride_q = args.vocab = vocab;
  args.dtype = dtype;
  args.tokens = kTokens;
  args.mask = x.args.mask;
  args.temperature = args.logit_scale = 1.0f;
  args.mix_weight = 0.5f;
  args.bound = 100.0f;
  args.kind = kind;
  float* out = x.memory.of<float>(kTokens);
  float* state = x.memory.of<float>(kTokens * kDivergenceState);
  const float* ones = x.memory.uniform(kTokens, 1.0f, 2.0f);
  cudaError_t error = paired_divergence_fwd(args, {out, state}, nullptr);
  if (error == cudaSuccess) {
    error = paired_divergence_bwd(args, {state, ones, x.grad, vocab}, nullptr);
  }
  Hash hash;
  hash.add(out, kTokens * 4);
  hash.rows(x.grad, dtype, kTokens, vocab, vocab);
  return report("paired_divergence", dtype, vocab, error, hash);
}

int everything() {
  int failed = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    failed += token_stats(dtype, 4099, 4104, false);  // aligned rows with a tail
    failed += token_stats(dtype, 1001, 1001, false);  // rows that start at any address
    failed += token_stats(dtype, 1032, 1032, true);
    failed += cross_entropy(dtype, 4099, 4104, false);
    failed += cross_entropy(dtype, 1001, 1001, true);
    failed += policy(dtype, 4099, 4104, false);
    failed += policy(dtype, 1001, 1001, true);
  }
  failed += policy(DType::kFloat32, 28705, 28708, true);  // a cluster of two
  failed += kept(DType::kBFloat16, 1001);
  failed += at_ids(DType::kBFloat16, 1001, 1001, false);
  failed += at_ids(DType::kFloat32, 1032, 1032, true);
  for (Divergence kind :
       {Divergence::kJsd, Divergence::kForwardKl, Divergence::kReverseKl, Divergence::kSkewForward,
        Divergence::kSkewReverse, Divergence::kTotalVariation}) {
    failed += divergence(DType::kBFloat16, 2056, kind);
    failed += divergence(DType::kFloat32, 1001, kind);
  }
  return failed;
}

int one(const char* op, int bytes, int64_t vocab) {
  const DType dtype = bytes == 4 ? DType::kFloat32 : DType::kBFloat16;
  if (strcmp(op, "token_stats") == 0) return token_stats(dtype, vocab, vocab, false);
  return policy(dtype, vocab, vocab, strcmp(op, "policy_step_") == 0);
}

}  // namespace
}  // namespace cuda
}  // namespace tokfuse

int main(int count, char** given) {
  if (count < 4) return tokfuse::cuda::everything();
  return tokfuse::cuda::one(given[1], atoi(given[2]), atoll(given[3]));
}
