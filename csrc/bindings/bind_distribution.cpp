// Bindings of the CPU kernels that compare two distributions or restrict one to a set of ids.
// Scratch memory is allocated here.
#include <vector>

#include "bindings/bind.h"
#include "cpu/distribution_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

void check_kept(const KeptArgs& a) {
  check_args(a);
  check_logits(a.logits);
  const int64_t rows = a.logits.rows;
  require(a.offsets[0] == 0 && a.offsets[rows] == a.num_ids, "offsets must run from 0 to num_ids");
  for (int64_t t = 0; t < rows; t++) {
    require(a.offsets[t] <= a.offsets[t + 1], "offsets must not decrease");
  }
}

int64_t bad_row(KeptArgs a) {
  std::vector<uint64_t> seen(
      static_cast<size_t>(a.logits.threads * kept_seen_words(a.logits.vocab)));
  a.seen = seen.data();
  return TOKFUSE_CALL(kept_bad_row, a);
}

// Returns the first unmasked row with a value out of range or a repeated id, or -1 after a complete
// run.
int64_t kept_token_stats_fwd(const KeptArgs& a, const TokenStatsOut& out) {
  check_kept(a);
  require_pointers({out.logp, out.entropy, out.lse, out.row_max, out.inv_sum}, a.logits.rows,
                   "an output");
  py::gil_scoped_release release;
  const int64_t bad = bad_row(a);
  if (bad < 0) TOKFUSE_CALL(kept_token_stats_fwd, a, out);
  return bad;
}

void kept_token_stats_bwd(const KeptArgs& a, const TokenStatsGrad& grad) {
  check_kept(a);
  require_pointers({grad.row_max, grad.inv_sum, grad.logp, grad.entropy, grad.grad_logits},
                   a.logits.rows, "a backward argument");
  require(grad.grad_stride >= a.logits.vocab || a.logits.rows <= 1, "grad_stride must be >= vocab");
  require(grad.grad_dtype == a.logits.dtype, "the gradient has the dtype of the logits");
  py::gil_scoped_release release;
  require(bad_row(a) < 0, "a target, temperature or kept id is out of range");
  TOKFUSE_CALL(kept_token_stats_bwd, a, grad);
}

void check_divergence(const DivergenceArgs& a) {
  check_args(a);
  require_threads(a.threads);
}

// Returns the first unmasked row whose temperature is not positive, or -1 after a complete run.
int64_t paired_divergence_fwd(const DivergenceArgs& a, const DivergenceOut& out) {
  check_divergence(a);
  require_pointers({out.divergence, out.state}, a.tokens, "an output");
  for (int64_t t = 0; a.temperatures != nullptr && t < a.tokens; t++) {
    if ((a.mask == nullptr || a.mask[t] != 0) && !(a.temperatures[t] > 0.0f)) return t;
  }
  py::gil_scoped_release release;
  TOKFUSE_CALL(paired_divergence_fwd, a, out);
  return -1;
}

void paired_divergence_bwd(const DivergenceArgs& a, const DivergenceGrad& grad) {
  check_divergence(a);
  require_pointers({grad.state, grad.grad_divergence, grad.grad_logits}, a.tokens,
                   "a backward argument");
  require(grad.grad_stride >= a.vocab || a.tokens <= 1, "grad_stride must be >= vocab");
  py::gil_scoped_release release;
  TOKFUSE_CALL(paired_divergence_bwd, a, grad);
}

// First unmasked row whose target or temperature is out of range, or -1 after a complete run.
int64_t distill_rows(const DistillArgs& a, const DistillOut& out, const DistillGrad& grad) {
  check_logits(a.student);
  check_logits(a.teacher);
  const int64_t rows = a.student.rows;
  require(a.student.vocab == a.teacher.vocab, "student and teacher have one vocabulary");
  require(a.student.tokens == a.teacher.tokens, "student and teacher have the same tokens");
  require(a.teacher.rows == (a.teacher.index == nullptr ? a.teacher.tokens : rows),
          "the teacher has a row for every token, or for every row of the student");
  for (int64_t i = 0; a.teacher.index != nullptr && i < rows; i++) {
    require(a.teacher.index[i] == (a.student.index == nullptr ? i : a.student.index[i]),
            "rows of student and teacher belong to the same tokens");
  }
  require(a.mix_weight > 0.0f && a.mix_weight < 1.0f, "mix_weight must be in (0, 1)");
  require(a.bound > 0.0f, "bound must be > 0");
  require_pointers({out.divergence, out.entropy, out.logp, out.teacher_logp, out.top1_agreement},
                   rows, "an output");
  if (grad.grad_logits != nullptr) {
    require_pointer(grad.grad_divergence, rows, "grad_divergence");
    const int64_t width = a.student.tile > 0 ? a.student.tile : a.student.vocab;
    require(grad.grad_stride >= width || rows <= 1, "grad_stride must be >= vocab");
    require(a.student.tile == 0 || grad.grad_logits == a.student.logits,
            "the gradient of tiled logits overwrites them");
  }
  py::gil_scoped_release release;
  LogitsArgs teacher = a.teacher;
  teacher.mask = a.student.mask;
  for (const LogitsArgs* side : {&a.student, static_cast<const LogitsArgs*>(&teacher)}) {
    const int64_t bad = TOKFUSE_CALL(first_bad_row, *side);
    if (bad >= 0) return bad;
  }
  TOKFUSE_CALL(distill_rows, a, out, grad);
  return -1;
}

}  // namespace

void bind_distribution(py::module_& m) {
  m.def("kept_token_stats_fwd", &kept_token_stats_fwd);
  m.def("kept_token_stats_bwd", &kept_token_stats_bwd);
  m.def("paired_divergence_fwd", &paired_divergence_fwd);
  m.def("paired_divergence_bwd", &paired_divergence_bwd);
  m.def("distill_rows", &distill_rows);
  m.attr("DIVERGENCE_STATE") = kDivergenceState;
}

}  // namespace tokfuse
