// Bindings of the CPU kernels of policy objectives.
#include <new>

#include "bindings/bind.h"

namespace py = pybind11;

namespace tokfuse {

void check_objective(const ObjectiveArgs& o) {
  check_args(o);
  require_threads(o.threads);
  require(o.sums != nullptr, "sums is null");
  require_pointers({o.old_logp, o.token_loss, o.d_logp, o.d_entropy, o.scratch}, o.tokens,
                   "a vector");
  require_pointer(o.advantage, o.advantage_per_seq ? o.seqs : o.tokens, "advantage");
  for (int64_t i = 0; i < o.seqs; i++) {
    require(o.cu_seqlens[i] >= 0 && o.cu_seqlens[i] <= o.cu_seqlens[i + 1],
            "cu_seqlens must be non-decreasing from 0");
  }
  require(o.cu_seqlens == nullptr || (o.cu_seqlens[0] == 0 && o.cu_seqlens[o.seqs] == o.tokens),
          "cu_seqlens must start at 0 and end at tokens");
}

namespace {

void policy_loss(const ObjectiveArgs& o) {
  check_objective(o);
  require_pointer(o.logp, o.tokens, "logp");
  py::gil_scoped_release release;
  TOKFUSE_CALL(policy_loss, o);
}

enum Phase { kPrepare = 1, kRows = 2, kMetrics = 4 };

// One fused step. If the logits come in chunks, its phases are called apart: prepare once, rows for
// every chunk, metrics once.
//
// Returns the first token whose target or temperature is out of range; nothing has been written
// then. Otherwise returns -1 - n, where n rows are listed in grad.grad_tokens (0 without it).
int64_t policy_step(const LogitsArgs& a, const TokenStatsOut& out, const ObjectiveArgs& o,
                    const GradRows& grad, int phases) {
  check_logits(a);
  check_objective(o);
  const bool in_place = grad.grad_logits == a.logits;
  require(o.tokens == a.tokens, "logits and objective must have the same tokens");
  require(o.params.level == Level::kToken, "policy_step fuses token-level objectives only");
  require(grad.grad_stride >= (a.tile > 0 ? a.tile : a.vocab) || a.rows <= 1,
          "grad_stride must be >= vocab");
  require(grad.grad_dtype == a.dtype, "the gradient has the dtype of the logits");
  require(a.tile == 0 || in_place, "tiled logits are overwritten by their gradient");
  require_pointers({out.lse, out.sum_sq, out.top1, out.row_max, out.inv_sum, grad.grad_logits},
                   a.rows, "an output");
  require_pointers({out.logp, out.entropy}, o.tokens, "logp or entropy");
  require(out.second_logp == nullptr && out.sum_p2_logp == nullptr && out.sum_p2_logp2 == nullptr,
          "policy_step has no second temperature and no moments");
  require(o.logp == out.logp && o.entropy == out.entropy,
          "logp and entropy of the objective are those that the statistics are written to");
  require(grad.grad_tokens == nullptr || (in_place && a.dtype == DType::kFloat32),
          "grad_tokens needs float32 logits overwritten by their gradient");
  py::gil_scoped_release release;
  const int64_t bad = TOKFUSE_CALL(first_bad_row, a);
  if (bad >= 0) return bad;
  int64_t n = 0;
  if (phases & kPrepare) TOKFUSE_CALL(policy_prepare, o);
  if (phases & kRows) {
    TOKFUSE_CALL(policy_rows, a, out, o, grad);
    if (grad.grad_tokens != nullptr) n = TOKFUSE_CALL(keep_gradient_rows, a, o, grad.grad_tokens);
    if (n < 0) throw std::bad_alloc();
  }
  if (phases & kMetrics) TOKFUSE_CALL(policy_metrics, o);
  return -1 - n;
}

}  // namespace

void bind_policy(py::module_& m) {
  m.def("policy_loss", &policy_loss);
  m.def("policy_step", &policy_step, py::arg("logits"), py::arg("stats"), py::arg("objective"),
        py::arg("grad"), py::arg("phases"));
  m.attr("PREPARE") = static_cast<int>(kPrepare);
  m.attr("ROWS") = static_cast<int>(kRows);
  m.attr("METRICS") = static_cast<int>(kMetrics);
}

}  // namespace tokfuse
