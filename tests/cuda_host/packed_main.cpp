// Runs every kernel over packed vectors on small problems, for the sanitizers, the checker and
// shuffled orders. The arrays are not padded. Prints one line per launch: a hash of its outputs.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda/packed_kernels.h"
#include "program.h"

namespace tokfuse {
namespace cuda {
namespace {

constexpr int64_t kTokens = 700, kSeqs = 5;
constexpr int32_t kBorders[kSeqs + 1] = {0, 1, 1, 300, 640, 700};

int failures = 0;

void report(const char* what, cudaError_t error, std::initializer_list<const float*> outputs,
            size_t count) {
  Hash hash;
  for (const float* out : outputs) hash.add(out, count * sizeof(float));
  printf("%s %s %016lx\n", what, cudaGetErrorName(error), static_cast<unsigned long>(hash.value()));
  failures += error != cudaSuccess;
}

struct Batch {
  Memory memory;
  float *x, *y, *z;  // (kTokens)
  int32_t* borders;
  uint8_t* mask;
  uint8_t* finished;
  SortedIds groups;    // ids of the sequences
  SortedIds segments;  // ids of the tokens, 0 to 6
  double* scratch;     // large enough for every kernel
  unsigned* tickets;

  Batch() {
    x = memory.uniform(kTokens, -1.0f, 1.0f);
    y = memory.uniform(kTokens, -1.0f, 1.0f);
    z = memory.uniform(kTokens, 0.1f, 2.0f);
    borders = memory.of<int32_t>(kSeqs + 1);
    std::copy(kBorders, kBorders + kSeqs + 1, borders);
    mask = memory.of<uint8_t>(kTokens);
    for (int64_t t = 0; t < kTokens; t++) mask[t] = t % 7 != 3;
    finished = memory.of<uint8_t>(kSeqs);
    for (int64_t i = 0; i < kSeqs; i++) finished[i] = i != 2;
    groups = sorted(kSeqs, 2);
    segments = sorted(kTokens, 7);
    scratch = memory.of<double>(kTokens * 20);
    tickets = memory.of<unsigned>(kTokens);
  }

  float* out(size_t count = kTokens) { return memory.of<float>(count); }

  // Returns the sorted ids i % n of `rows` rows.
  SortedIds sorted(int64_t rows, int64_t n) {
    int64_t* ids = memory.of<int64_t>(rows);
    int64_t* order = memory.of<int64_t>(rows);
    int64_t at = 0;
    for (int64_t id = 0; id < n; id++) {
      for (int64_t i = id; i < rows; i += n, at++) {
        ids[at] = id;
        order[at] = i;
      }
    }
    return {ids, order};
  }
};

void scans(Batch& b) {
  GaeArgs a = {};
  a.tokens = kTokens;
  a.seqs = kSeqs;
  a.reward = b.x;
  a.value = b.y;
  a.cu_seqlens = b.borders;
  a.mask = b.mask;
  a.finished = b.finished;
  a.gamma = 0.9;
  a.lam = 0.8;
  a.length_adaptive_alpha = 0.1;
  a.advantage = b.out();
  a.returns = b.out();
  report("gae", gae(a, nullptr), {a.advantage, a.returns}, kTokens);
  VtraceArgs v = {};
  static_cast<ScanArgs&>(v) = a;
  v.log_ratio = b.x;
  v.rho_bar = v.c_bar = 1.0f;
  v.value_target = b.out();
  v.rho = b.out();
  report("vtrace", vtrace(v, nullptr), {v.advantage, v.value_target, v.rho}, kTokens);
}

void sums(Batch& b) {
  WhitenArgs w = {};
  w.tokens = kTokens;
  w.x = b.x;
  w.mask = b.mask;
  w.out = b.out();
  w.scratch = b.scratch;
  report("whiten", whiten(w, nullptr), {w.out}, kTokens);
  OpeArgs o = {};
  o.rows = kTokens;
  o.weight = b.z;
  o.reward = b.x;
  o.q_pi = o.q_a = b.y;
  o.mask = b.mask;
  o.out = b.memory.of<double>(10);
  o.scratch = b.scratch;
  report("ope", ope(o, nullptr), {reinterpret_cast<const float*>(o.out)}, 20);
}

void segments(Batch& b, bool by_id) {
  MomentsArgs m = {};
  m.rows = kTokens;
  m.segments = by_id ? 7 : kSeqs;
  m.values = b.x;
  m.segment_ids = by_id ? b.segments.ids : nullptr;
  m.cu_seqlens = by_id ? nullptr : b.borders;
  m.mask = b.mask;
  m.count = b.memory.of<int64_t>(m.segments);
  float* out[4];
  for (float*& p : out) p = b.out(m.segments);
  m.sum = out[0];
  m.sum_sq = out[1];
  m.min = out[2];
  m.max = out[3];
  // Force two blocks. So few rows would use one block.
  m.order = by_id ? b.segments.order : nullptr;
  m.parts = by_id ? 2 : 1;
  m.table = b.scratch;
  m.tickets = b.tickets;
  report("segment_moments", segment_moments(m, nullptr), {out[0], out[1], out[2], out[3]},
         m.segments);
}

void groups(Batch& b, Baseline baseline, Scale scale) {
  GroupAdvantageArgs g = {};
  g.seqs = kSeqs;
  g.reward = b.x;
  int64_t* lengths = b.memory.of<int64_t>(kSeqs);
  for (int64_t i = 0; i < kSeqs; i++) lengths[i] = i + 1;
  g.lengths = lengths;
  g.greedy_reward = baseline == Baseline::kGreedy ? b.y : nullptr;
  g.advantage = b.out(kSeqs);
  g.baseline = baseline;
  g.scale = scale;
  if (baseline != Baseline::kGreedy) {
    g.group_ids = b.groups.ids;
    g.order = b.groups.order;
  }
  report("group_advantage", group_advantage(g, nullptr), {g.advantage}, kSeqs);
}

void weights(Batch& b, WeightLevel level, Normalize normalize) {
  OffPolicyArgs a = {};
  a.tokens = kTokens;
  a.logp = b.x;
  a.behavior_logp = b.y;
  a.mask = b.mask;
  a.advantage = b.x;
  a.level = level;
  a.mode = WeightMode::kMask;
  a.low = 0.5;
  a.high = 3.0;
  a.normalize = normalize;
  const bool external = level == WeightLevel::kExternal;
  a.cu_seqlens = external ? nullptr : b.borders;
  a.block_tokens = external ? 1 : 0;
  a.seqs = external ? kTokens : kSeqs;
  if (!external) a.rules[a.num_rules++] = {Statistic::kK3, Over::kMean, -1.0, 1.0, 1};
  a.rules[a.num_rules++] = {Statistic::kK1, Over::kToken, -1.0, 1.5, 0};
  a.weight = b.out();
  a.kept = b.memory.of<uint8_t>(kTokens);
  a.partial = b.scratch;
  a.ess = b.out(1);
  const SortedIds ids = external ? b.segments : b.groups;
  a.group_ids = ids.ids;
  a.order = ids.order;
  report("offpolicy_weights", offpolicy_weights(a, nullptr), {a.weight}, kTokens);
  report("ess", cudaSuccess, {a.ess}, 1);
}

void objective(Batch& b, Level level) {
  ObjectiveArgs o = {};
  o.params.shape = Shape::kPPOClip;
  o.params.level = level;
  o.params.kl = Kl::kK3;
  o.params.seq_mean = 1;
  const PPOClipParameters clip = {0.8f, 1.2f, 1e9f, 1e9f};
  memcpy(o.params.p, &clip, sizeof clip);
  o.params.kl_coef = 0.1f;
  o.params.kl_clamp = o.params.log_ratio_clamp = 20.0f;
  o.params.entropy_coef = 0.01f;
  o.tokens = kTokens;
  o.seqs = kSeqs;
  o.logp = b.x;
  o.old_logp = o.ref_logp = b.y;
  o.advantage = b.x;
  o.advantage_per_seq = 1;
  o.mask = b.mask;
  o.cu_seqlens = b.borders;
  o.entropy = b.z;
  o.inv_normalizer = -1;
  o.normalize_by_seqs = 1;
  o.token_loss = b.out();
  o.d_logp = b.out();
  o.d_entropy = b.out();
  o.sums = b.memory.of<double>(kMetricCount);
  o.partial = b.scratch;
  const LossArgs loss = {o.inv_normalizer, o.normalize_by_seqs, b.out(1), b.out(1)};
  report("policy_loss", policy_loss(o, loss, nullptr), {o.token_loss, o.d_logp, o.d_entropy},
         kTokens);
  report("loss", cudaSuccess, {loss.loss, loss.loss_sum}, 1);
  report("metrics", cudaSuccess, {reinterpret_cast<const float*>(o.sums)}, 2 * kMetricCount);
  const PrepareArgs p = {kSeqs,   b.borders, b.mask, b.x, b.memory.of<int32_t>(kSeqs),
                         b.out(), b.out()};
  report("policy_prepare", policy_prepare(p, nullptr), {p.agg_weight, p.advantage}, kTokens);
  for (int32_t* counts : {static_cast<int32_t*>(nullptr), p.counts}) {
    const CountArgs n = {kTokens, kSeqs, b.mask, counts, b.out(1)};
    report("policy_count", policy_count(n, nullptr), {n.batch_inv_normalizer}, 1);
  }
  int32_t* flags = b.memory.of<int32_t>(kTokens);
  std::fill(flags, flags + kTokens, 0);
  MetricsArgs m = {};
  m.tokens = kTokens;
  m.seqs = kSeqs;
  m.logp = b.x;
  m.entropy = m.ratio = b.z;
  m.old_logp = m.ref_logp = b.y;
  m.mask = b.mask;
  m.token_loss = o.token_loss;
  m.d_logp = o.d_logp;
  m.d_entropy = o.d_entropy;
  m.flags = flags;
  m.counts = p.counts;
  m.partial = b.scratch;
  m.sums = o.sums;
  report("policy_metrics", policy_metrics(m, loss, nullptr),
         {reinterpret_cast<const float*>(o.sums)}, 2 * kMetricCount);
}

void outer_products(Batch& b, int64_t rank) {
  const SketchArgs s = {kTokens,
                        kSeqs,
                        rank,
                        b.memory.uniform(kTokens * rank, -1.0f, 1.0f),
                        b.memory.uniform(kTokens * rank, -1.0f, 1.0f),
                        b.borders,
                        b.out(kSeqs * rank * rank)};
  report("sketch", sketch(s, nullptr), {s.out}, kSeqs * rank * rank);
}

int run_all() {
  Batch b;
  scans(b);
  sums(b);
  segments(b, false);
  segments(b, true);
  groups(b, Baseline::kMean, Scale::kStd);
  groups(b, Baseline::kMedian, Scale::kBatchStd);
  groups(b, Baseline::kLengthWeighted, Scale::kNone);
  groups(b, Baseline::kGreedy, Scale::kBatchStd);
  weights(b, WeightLevel::kToken, Normalize::kBatch);
  weights(b, WeightLevel::kSequence, Normalize::kGroup);
  weights(b, WeightLevel::kExternal, Normalize::kGroup);
  objective(b, Level::kToken);
  objective(b, Level::kSequence);
  objective(b, Level::kSequenceToken);
  outer_products(b, 5);
  outer_products(b, 66);
  return failures;
}

}  // namespace
}  // namespace cuda
}  // namespace tokfuse

int main() { return tokfuse::cuda::run_all(); }
