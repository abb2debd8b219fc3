// CUDA kernels over packed vectors. Scratch memory comes from the caller, who asks how much.
#include "bindings/bind_cuda.h"
#include "cuda/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

int64_t size_of(int64_t size) {
  require(size >= 0, "a size must be >= 0");
  return size;
}

void bind_segment_moments(const py::tuple& place, Address values, bool is_double, Address ids,
                          Address order, Address cu_seqlens, Address mask, Address count,
                          Address sum, Address sum_sq, Address min, Address max, Address table,
                          Address tickets, int64_t rows, int64_t segments) {
  MomentsArgs a = {};
  a.rows = size_of(rows);
  a.segments = size_of(segments);
  require((ids == 0) == (order == 0), "sorted ids come with their order");
  require(cu_seqlens == 0 || ids == 0, "ids or cu_seqlens, not both");
  a.values = as<void>(values);
  a.is_double = is_double;
  a.ids = as<int64_t>(ids);
  a.cu_seqlens = as<int32_t>(cu_seqlens);
  a.mask = as<uint8_t>(mask);
  a.count = as<int64_t>(count);
  a.sum = as<void>(sum);
  a.sum_sq = as<void>(sum_sq);
  a.min = as<void>(min);
  a.max = as<void>(max);
  const MomentsScratch scratch = {as<int64_t>(order), moments_parts(rows, segments),
                                  as<double>(table), as<unsigned>(tickets)};
  require(scratch.parts == 1 || (table != 0 && tickets != 0), "scratch memory is missing");
  run("segment_moments", "segment_moments_kernel", place_of(place),
      [&](cudaStream_t stream) { return segment_moments(a, scratch, stream); });
}

ScanArgs scan_args(Address reward, Address value, Address cu_seqlens, Address mask,
                   Address finished, int64_t tokens, int64_t seqs, double gamma, double lam) {
  ScanArgs a = {};
  a.tokens = size_of(tokens);
  a.seqs = size_of(seqs);
  a.reward = as<float>(reward);
  a.value = as<float>(value);
  a.cu_seqlens = as<int32_t>(cu_seqlens);
  a.mask = as<uint8_t>(mask);
  a.finished = as<uint8_t>(finished);
  a.gamma = gamma;
  a.lam = lam;
  return a;
}

void bind_gae(const py::tuple& place, Address reward, Address value, Address cu_seqlens,
              Address mask, Address finished, Address lam_per_seq, Address advantage,
              Address returns, int64_t tokens, int64_t seqs, double gamma, double lam,
              double alpha) {
  ScanArgs a = scan_args(reward, value, cu_seqlens, mask, finished, tokens, seqs, gamma, lam);
  a.lam_per_seq = as<float>(lam_per_seq);
  a.alpha = alpha;
  a.advantage = as<float>(advantage);
  a.returns = as<float>(returns);
  run("gae", "gae_kernel", place_of(place), [&](cudaStream_t stream) { return gae(a, stream); });
}

void bind_vtrace(const py::tuple& place, Address log_ratio, Address reward, Address value,
                 Address cu_seqlens, Address mask, Address finished, Address target,
                 Address advantage, Address rho, int64_t tokens, int64_t seqs, double gamma,
                 double lam, double rho_bar, double c_bar) {
  ScanArgs a = scan_args(reward, value, cu_seqlens, mask, finished, tokens, seqs, gamma, lam);
  a.log_ratio = as<float>(log_ratio);
  a.rho_bar = static_cast<float>(rho_bar);
  a.c_bar = static_cast<float>(c_bar);
  a.target = as<float>(target);
  a.advantage = as<float>(advantage);
  a.rho = as<float>(rho);
  run("vtrace", "vtrace_kernel", place_of(place),
      [&](cudaStream_t stream) { return vtrace(a, stream); });
}

void bind_whiten(const py::tuple& place, Address x, Address mask, Address mean, Address var,
                 Address out, Address scratch, int64_t tokens, bool shift_mean, double eps) {
  require((mean == 0) == (var == 0), "mean and var come together");
  require(mean != 0 || scratch != 0 || tokens == 0, "scratch memory is missing");
  WhitenArgs a = {};
  a.tokens = size_of(tokens);
  a.x = as<float>(x);
  a.mask = as<uint8_t>(mask);
  a.mean = as<double>(mean);
  a.var = as<double>(var);
  a.out = as<float>(out);
  a.scratch = as<double>(scratch);
  a.shift_mean = shift_mean;
  a.eps = eps;
  run("whiten", "whiten_kernel", place_of(place),
      [&](cudaStream_t stream) { return whiten(a, stream); });
}

void bind_ope(const py::tuple& place, Address weight, Address reward, Address q_pi, Address q_a,
              Address mask, Address out, Address scratch, int64_t rows) {
  require(q_pi != 0 || q_a == 0 || rows == 0, "q_a needs q_pi");
  OpeArgs a = {};
  a.rows = size_of(rows);
  a.weight = as<float>(weight);
  a.reward = as<float>(reward);
  a.q_pi = as<float>(q_pi);
  a.q_a = as<float>(q_a);
  a.mask = as<uint8_t>(mask);
  a.out = as<double>(out);
  a.scratch = as<double>(scratch);
  run("ope", "ope_kernel", place_of(place), [&](cudaStream_t stream) { return ope(a, stream); });
}

void bind_group_advantage(const py::tuple& place, Address reward, Address ids, Address order,
                          Address lengths, Address greedy, Address advantage, int64_t seqs,
                          int baseline, int scale, int ddof, double eps, bool singleton_reward) {
  GroupAdvantageArgs a = {};
  a.seqs = size_of(seqs);
  a.baseline = code_of(baseline, Baseline::kNone, "unknown baseline code");
  a.scale = code_of(scale, Scale::kMean, "unknown scale code");
  const bool grouped = a.baseline != Baseline::kGreedy && a.baseline != Baseline::kNone;
  require(seqs == 0 || (grouped == (ids != 0) && grouped == (order != 0)),
          "sorted group ids and their order come with a group baseline");
  require(ddof == 0 || ddof == 1, "ddof must be 0 or 1");
  a.reward = as<float>(reward);
  a.lengths = as<int64_t>(lengths);
  a.greedy = as<float>(greedy);
  a.advantage = as<float>(advantage);
  a.ddof = ddof;
  a.eps = eps;
  a.singleton_reward = singleton_reward;
  const SortedIds groups = {as<int64_t>(ids), as<int64_t>(order)};
  run("group_advantage", "group_advantage_kernel", place_of(place),
      [&](cudaStream_t stream) { return group_advantage(a, groups, stream); });
}

KeepRule rule_of(const py::tuple& t) {
  require(t.size() == 5, "a keep rule has 5 fields");
  return {code_of(t[0].cast<int>(), Statistic::kK3, "unknown statistic code"),
          code_of(t[1].cast<int>(), Over::kMax, "unknown reduction code"), t[2].cast<double>(),
          t[3].cast<double>(), t[4].cast<bool>()};
}

// Spans of a call without borders: every row where units are grouped, else blocks.
int64_t rows_per_span(int normalize) {
  return normalize == static_cast<int>(Normalize::kGroup) ? 1 : 4096;
}

int64_t offpolicy_spans(int64_t tokens, int64_t seqs, bool borders, int normalize) {
  const int64_t span = rows_per_span(normalize);
  return borders ? seqs : (tokens + span - 1) / span;
}

void bind_offpolicy_weights(const py::tuple& place, Address logp, Address behavior,
                            Address cu_seqlens, Address mask, Address ids, Address order,
                            Address advantage, Address weight, Address kept, Address ess,
                            Address partial, int64_t tokens, int64_t seqs, int level, int mode,
                            double low, double high, double param, int normalize,
                            const py::list& rules) {
  OffPolicyArgs a = {};
  a.tokens = size_of(tokens);
  a.level = code_of(level, WeightLevel::kExternal, "unknown level code");
  a.mode = code_of(mode, WeightMode::kKeep, "unknown mode code");
  a.normalize = code_of(normalize, Normalize::kGroup, "unknown normalize code");
  a.cu_seqlens = as<int32_t>(cu_seqlens);
  a.seqs = offpolicy_spans(tokens, seqs, cu_seqlens != 0, normalize);
  a.block_tokens = cu_seqlens != 0 ? 0 : rows_per_span(normalize);
  require(rules.size() <= kMaxRules, "at most 8 keep rules");
  for (const py::handle& item : rules) {
    const KeepRule rule = rule_of(item.cast<py::tuple>());
    require(rule.over == Over::kToken || cu_seqlens != 0, "a sequence rule needs cu_seqlens");
    require(!rule.negative_only || advantage != 0 || tokens == 0, "advantage is null");
    a.rules[a.num_rules++] = rule;
  }
  require(cu_seqlens != 0 || a.level == WeightLevel::kToken || a.level == WeightLevel::kExternal,
          "a sequence level needs cu_seqlens");
  require(a.normalize != Normalize::kGroup || a.seqs == 0 || (ids != 0 && order != 0),
          "groups need sorted ids and their order");
  a.logp = as<float>(logp);
  a.behavior = as<float>(behavior);
  a.mask = as<uint8_t>(mask);
  a.advantage = as<float>(advantage);
  a.low = low;
  a.high = high;
  a.param = param;
  a.weight = as<float>(weight);
  a.kept = as<uint8_t>(kept);
  a.partial = as<double>(partial);
  const SortedIds groups = {as<int64_t>(ids), as<int64_t>(order)};
  run("offpolicy_weights", "offpolicy_weights_kernel", place_of(place),
      [&](cudaStream_t stream) { return offpolicy_weights(a, groups, as<float>(ess), stream); });
}

void bind_sketch(const py::tuple& place, Address left, Address right, Address cu_seqlens,
                 Address out, int64_t tokens, int64_t seqs, int64_t rank) {
  const SketchArgs a = {size_of(tokens),  size_of(seqs),           size_of(rank), as<float>(left),
                        as<float>(right), as<int32_t>(cu_seqlens), as<float>(out)};
  run("influence.sketch", "sketch_kernel", place_of(place),
      [&](cudaStream_t stream) { return sketch(a, stream); });
}

}  // namespace

void bind_packed(py::module_& m) {
  m.def("moments_parts", &moments_parts);
  m.def("segment_moments", &bind_segment_moments);
  m.def("gae", &bind_gae);
  m.def("vtrace", &bind_vtrace);
  m.def("whiten", &bind_whiten);
  m.def("ope", &bind_ope);
  m.def("group_advantage", &bind_group_advantage);
  m.def("offpolicy_spans", &offpolicy_spans);
  m.def("offpolicy_weights", &bind_offpolicy_weights);
  m.def("sketch", &bind_sketch);
  m.attr("WHITEN_BLOCK") = kWhitenBlock;
  m.attr("OPE_BLOCK") = kOpeBlock;
}

}  // namespace cuda
}  // namespace tokfuse
