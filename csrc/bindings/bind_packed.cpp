// Kernels over packed vectors: advantages, scans, moments, off-policy weights. Scratch memory is
// allocated here.
#include <memory>
#include <vector>

#include "bindings/bind.h"
#include "cpu/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

// True for borders that run from 0 to `tokens` and never decrease: their values, not only the
// address, because the kernels index by them.
bool is_cu_seqlens(const int32_t* borders, int64_t seqs, int64_t tokens) {
  require(seqs >= 0, "seqs must be >= 0");
  require_pointer(borders, seqs + 1, "cu_seqlens");
  bool ok = borders[0] == 0 && borders[seqs] == tokens;
  for (int64_t i = 0; i < seqs; i++) ok &= borders[i] <= borders[i + 1];
  return ok;
}

bool cu_seqlens_ok(const py::object& cu_seqlens, int64_t seqs, int64_t tokens) {
  const int32_t* borders = nullptr;
  if (!read_value(cu_seqlens.ptr(), &borders)) throw py::error_already_set();
  return is_cu_seqlens(borders, seqs, tokens);
}

void require_cu_seqlens(const int32_t* borders, int64_t seqs, int64_t tokens) {
  require(is_cu_seqlens(borders, seqs, tokens),
          "cu_seqlens must run from 0 to the number of tokens and never decrease");
}

void group_advantage(GroupAdvantageArgs a) {
  require(a.seqs >= 0, "seqs must be >= 0");
  require_pointers({a.reward, a.advantage}, a.seqs, "reward or advantage");
  const bool grouped = a.baseline != Baseline::kGreedy && a.baseline != Baseline::kNone;
  require(grouped == (a.group_ids != nullptr) || a.seqs == 0,
          "group ids come with a group baseline");
  require(grouped || a.scale == Scale::kNone || a.scale == Scale::kBatchStd,
          "a baseline without groups takes no group scale");
  if (a.baseline == Baseline::kLengthWeighted) require_pointer(a.lengths, a.seqs, "lengths");
  if (a.baseline == Baseline::kGreedy) require_pointer(a.greedy_reward, a.seqs, "greedy_reward");
  require(a.ddof == 0 || a.ddof == 1, "ddof must be 0 or 1");
  require(a.eps >= 0, "eps must be >= 0");
  require_threads(a.threads);
  py::gil_scoped_release release;
  // Not value-initialised: clearing it would cost more than grouping a few thousand rows.
  std::unique_ptr<int64_t[]> ints(grouped ? new int64_t[grouping_scratch(a.seqs)] : nullptr);
  std::unique_ptr<double[]> doubles(grouped ? new double[a.seqs] : nullptr);
  a.scratch_int = ints.get();
  a.scratch_double = doubles.get();
  TOKFUSE_CALL(group_advantage, a);
}

void check_scan(const ScanArgs& a) {
  require(a.tokens >= 0, "tokens must be >= 0");
  require_pointers({a.reward, a.value, a.advantage}, a.tokens, "reward, value or advantage");
  require_cu_seqlens(a.cu_seqlens, a.seqs, a.tokens);
  require(a.gamma >= 0 && a.gamma <= 1, "gamma must be in [0, 1]");
  require(a.lam >= 0 && a.lam <= 1, "lam must be in [0, 1]");
  require_threads(a.threads);
}

void gae(const GaeArgs& a) {
  check_scan(a);
  require_pointer(a.returns, a.tokens, "returns");
  require(a.length_adaptive_alpha >= 0, "length_adaptive_alpha must be >= 0");
  py::gil_scoped_release release;
  TOKFUSE_CALL(gae, a);
}

void vtrace(const VtraceArgs& a) {
  check_scan(a);
  require_pointers({a.log_ratio, a.value_target, a.rho}, a.tokens,
                   "log_ratio, value_target or rho");
  require(a.rho_bar > 0 && a.c_bar > 0, "rho_bar and c_bar must be > 0");
  py::gil_scoped_release release;
  TOKFUSE_CALL(vtrace, a);
}

void whiten(WhitenArgs a) {
  require(a.tokens >= 0, "tokens must be >= 0");
  require_pointers({a.x, a.out}, a.tokens, "x or out");
  require((a.mean == nullptr) == (a.var == nullptr), "mean and var come together");
  require(a.eps >= 0, "eps must be >= 0");
  require_threads(a.threads);
  py::gil_scoped_release release;
  std::vector<double> scratch(static_cast<size_t>((a.tokens / kWhitenBlock + 1) * 3));
  a.scratch = scratch.data();
  TOKFUSE_CALL(whiten, a);
}

void ope(OpeArgs a) {
  require(a.rows >= 0, "rows must be >= 0");
  require_pointers({a.weight, a.reward}, a.rows, "weight or reward");
  require_pointer(a.out, 10, "out");
  require(a.q_pi != nullptr || a.q_a == nullptr, "q_a needs q_pi");
  require_threads(a.threads);
  py::gil_scoped_release release;
  std::vector<double> scratch(static_cast<size_t>((a.rows / kOpeBlock + 1) * 5));
  a.scratch = scratch.data();
  TOKFUSE_CALL(ope, a);
}

// First valid row with an id outside [0, segments), or -1.
int64_t segment_moments(MomentsArgs a) {
  require(a.rows >= 0, "rows must be >= 0");
  require(a.segments >= 0, "segments must be >= 0");
  require_pointer(a.values, a.rows, "values");
  require_pointers({a.count, a.sum, a.sum_sq, a.min, a.max}, a.segments, "an output");
  const bool by_ids = a.cu_seqlens == nullptr;
  if (by_ids) {
    require_pointer(a.segment_ids, a.rows, "segment_ids");
  } else {
    require(a.segment_ids == nullptr, "segment_ids or cu_seqlens, not both");
    require_cu_seqlens(a.cu_seqlens, a.segments, a.rows);
  }
  require_threads(a.threads);
  // Eight tables if they are small beside the values; otherwise one.
  a.chunks = a.segments * 64 <= a.rows ? 8 : 1;
  py::gil_scoped_release release;
  std::vector<double> scratch(by_ids ? static_cast<size_t>(a.chunks * a.segments * 5) : 0);
  a.scratch = scratch.data();
  return TOKFUSE_CALL(segment_moments, a);
}

// Returns the effective sample size.
double offpolicy_weights(OffPolicyArgs a) {
  require(a.tokens >= 0, "tokens must be >= 0");
  require_pointers({a.behavior_logp, a.weight, a.kept}, a.tokens, "an argument");
  const bool borders = a.cu_seqlens != nullptr;
  if (borders) {
    require_cu_seqlens(a.cu_seqlens, a.seqs, a.tokens);
  } else {
    a.block_tokens = a.normalize == Normalize::kGroup ? 1 : 4096;
    a.seqs = (a.tokens + a.block_tokens - 1) / a.block_tokens;
  }
  for (int i = 0; i < a.num_rules; i++) {
    require(a.rules[i].over == Over::kToken || borders, "a sequence rule needs cu_seqlens");
    if (a.rules[i].negative_only) require_pointer(a.advantage, a.tokens, "advantage");
  }
  require(borders || a.level == WeightLevel::kToken || a.level == WeightLevel::kExternal,
          "a sequence level needs cu_seqlens");
  if (a.normalize == Normalize::kGroup) require_pointer(a.group_ids, a.seqs, "group_ids");
  require_threads(a.threads);
  py::gil_scoped_release release;
  std::vector<double> partial(static_cast<size_t>(3 * a.seqs));
  std::vector<int64_t> ints(
      a.normalize == Normalize::kGroup ? static_cast<size_t>(grouping_scratch(a.seqs)) : 0);
  a.partial = partial.data();
  a.scratch_int = ints.data();
  return TOKFUSE_CALL(offpolicy_weights, a);
}

}  // namespace

void bind_packed(py::module_& m) {
  m.def("cu_seqlens_ok", &cu_seqlens_ok, py::kw_only(), py::arg("cu_seqlens"), py::arg("seqs"),
        py::arg("tokens"));
  m.def("group_advantage", &group_advantage);
  m.def("gae", &gae);
  m.def("vtrace", &vtrace);
  m.def("whiten", &whiten);
  m.def("ope", &ope);
  m.def("segment_moments", &segment_moments);
  m.def("offpolicy_weights", &offpolicy_weights);
}

}  // namespace tokfuse
