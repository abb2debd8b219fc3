// Bindings of the CPU kernels over packed vectors: advantages, scans, moments, off-policy weights.
// Scratch memory is allocated here.
#include <memory>
#include <vector>

#include "bindings/bind.h"
#include "cpu/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

// True if the borders run from 0 to `tokens` and never decrease. Their values are checked, because
// the kernels index by them.
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
  check_args(a);
  require_pointers({a.reward, a.advantage}, a.seqs, "reward or advantage");
  require_threads(a.threads);
  const bool grouped = a.group_ids != nullptr;
  py::gil_scoped_release release;
  // Not value-initialised: clearing it would cost more than grouping a few thousand rows.
  std::unique_ptr<int64_t[]> ints(grouped ? new int64_t[grouping_scratch(a.seqs)] : nullptr);
  std::unique_ptr<double[]> doubles(grouped ? new double[a.seqs] : nullptr);
  a.scratch_int = ints.get();
  a.scratch_double = doubles.get();
  TOKFUSE_CALL(group_advantage, a);
}

void check_scan(const ScanArgs& a) {
  require_pointers({a.reward, a.value, a.advantage}, a.tokens, "reward, value or advantage");
  require_cu_seqlens(a.cu_seqlens, a.seqs, a.tokens);
  require_threads(a.threads);
}

void gae(const GaeArgs& a) {
  check_args(a);
  check_scan(a);
  require_pointer(a.returns, a.tokens, "returns");
  py::gil_scoped_release release;
  TOKFUSE_CALL(gae, a);
}

void vtrace(const VtraceArgs& a) {
  check_args(a);
  check_scan(a);
  require_pointers({a.log_ratio, a.value_target, a.rho}, a.tokens,
                   "log_ratio, value_target or rho");
  py::gil_scoped_release release;
  TOKFUSE_CALL(vtrace, a);
}

void whiten(WhitenArgs a) {
  check_args(a);
  require_pointers({a.x, a.out}, a.tokens, "x or out");
  require_threads(a.threads);
  py::gil_scoped_release release;
  std::vector<double> scratch(static_cast<size_t>((a.tokens / kWhitenBlock + 1) * 3));
  a.scratch = scratch.data();
  TOKFUSE_CALL(whiten, a);
}

void ope(OpeArgs a) {
  check_args(a);
  require_pointers({a.weight, a.reward}, a.rows, "weight or reward");
  require_pointer(a.out, 10, "out");
  require_threads(a.threads);
  py::gil_scoped_release release;
  std::vector<double> scratch(static_cast<size_t>((a.rows / kOpeBlock + 1) * 5));
  a.scratch = scratch.data();
  TOKFUSE_CALL(ope, a);
}

// Returns the first valid row with an id outside [0, segments), or -1.
int64_t segment_moments(MomentsArgs a) {
  check_args(a);
  require_pointer(a.values, a.rows, "values");
  require_pointers({a.count, a.sum, a.sum_sq, a.min, a.max}, a.segments, "an output");
  const bool by_ids = a.cu_seqlens == nullptr;
  if (by_ids) {
    require_pointer(a.segment_ids, a.rows, "segment_ids");
  } else {
    require_cu_seqlens(a.cu_seqlens, a.segments, a.rows);
  }
  require_threads(a.threads);
  // Eight tables of partial sums if they are small compared with the values; otherwise one.
  a.chunks = a.segments * 64 <= a.rows ? 8 : 1;
  py::gil_scoped_release release;
  std::vector<double> scratch(by_ids ? static_cast<size_t>(a.chunks * a.segments * 5) : 0);
  a.scratch = scratch.data();
  return TOKFUSE_CALL(segment_moments, a);
}

// Returns the effective sample size.
double offpolicy_weights(OffPolicyArgs a) {
  check_args(a);
  require_pointers({a.behavior_logp, a.weight, a.kept}, a.tokens, "an argument");
  if (a.cu_seqlens != nullptr) require_cu_seqlens(a.cu_seqlens, a.seqs, a.tokens);
  require_threads(a.threads);
  set_spans(&a);
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
