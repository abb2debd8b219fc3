// Bindings of the CUDA kernels over rows of logits.
#include "bindings/bind_cuda.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

// The kernels count the columns of a row in int.
void check_vocab(int64_t vocab) { require(vocab <= INT32_MAX, "vocab must be < 2^31"); }

void check_rows(const LogitsArgs& a) {
  check_args(a);
  check_vocab(a.vocab);
  require(a.tile == 0 && a.tile_stride == 0, "rows come in one piece");
}

}  // namespace

void run_token_stats_fwd(const Place& place, const LogitsArgs& a, const TokenStatsOut& out) {
  check_rows(a);
  run("token_stats", "token_stats_fwd_kernel", place,
      [&](cudaStream_t stream) { return token_stats_fwd(a, out, stream); });
}

void run_token_stats_bwd(const Place& place, const LogitsArgs& a, const TokenStatsGrad& grad) {
  check_rows(a);
  run("token_stats", "token_stats_bwd_kernel", place,
      [&](cudaStream_t stream) { return token_stats_bwd(a, grad, stream); });
}

namespace {

void check_ids(const LogitsArgs& a, const IdsArgs& ids) {
  check_rows(a);
  require(ids.num_ids >= 0 && (ids.num_ids == 0 || (ids.ids != nullptr && ids.logp_at != nullptr)),
          "ids or logp_at are null");
  require(ids.offsets != nullptr, "offsets are null");
}

void bind_token_stats_at_fwd(const Place& place, const LogitsArgs& a, const TokenStatsOut& out,
                             const IdsArgs& ids) {
  check_ids(a, ids);
  require(a.rows == 0 || (out.row_max != nullptr && out.inv_sum != nullptr),
          "row_max or inv_sum is null");
  run("token_stats_at", "token_stats_fwd_kernel or log_probs_at_kernel", place,
      [&](cudaStream_t stream) { return token_stats_at_fwd(a, out, ids, stream); });
}

void bind_token_stats_at_bwd(const Place& place, const LogitsArgs& a, const TokenStatsGrad& grad,
                             const IdsArgs& ids) {
  check_ids(a, ids);
  require(ids.num_ids == 0 || (ids.grad_logp_at != nullptr && ids.grad_at != nullptr),
          "grad_logp_at or grad_at is null");
  require(a.rows == 0 || (ids.grad_total != nullptr && ids.grad_at_target != nullptr),
          "grad_total or grad_at_target is null");
  run("token_stats_at", "gradient_at_kernel, token_stats_bwd_kernel or store_at_kernel", place,
      [&](cudaStream_t stream) { return token_stats_at_bwd(a, grad, ids, stream); });
}

}  // namespace

void run_policy_step(const Place& place, const LogitsArgs& a, const TokenStatsOut& stats,
                     const TokenObjectiveArgs& o, const GradRows& grad) {
  check_rows(a);
  require(a.bias_logits == nullptr, "policy_step takes no bias_logits");
  require(o.params.level == Level::kToken, "policy_step fuses token-level objectives only");
  check_inputs(o.params, o.signal, o.ref_logp, o.anchor_logp, a.rows);
  require(grad.grad_tokens == nullptr, "grad_tokens is for the CPU");
  run("policy_step", "policy_step_kernel", place,
      [&](cudaStream_t stream) { return policy_step(a, stats, o, grad, stream); });
}

namespace {

void bind_kept_fwd(const Place& place, const KeptArgs& a, const TokenStatsOut& out) {
  check_args(a);
  run("kept_token_stats", "kept_token_stats_fwd_kernel", place,
      [&](cudaStream_t stream) { return kept_token_stats_fwd(a, out, stream); });
}

void bind_kept_bwd(const Place& place, const KeptArgs& a, const TokenStatsGrad& grad) {
  check_args(a);
  require(grad.grad_dtype == a.logits.dtype, "the gradient has the dtype of the logits");
  run("kept_token_stats", "kept_token_stats_bwd_kernel", place,
      [&](cudaStream_t stream) { return kept_token_stats_bwd(a, grad, stream); });
}

void bind_divergence_fwd(const Place& place, const DivergenceArgs& a, const DivergenceOut& out) {
  check_args(a);
  check_vocab(a.vocab);
  run("paired_divergence", "paired_divergence_fwd_kernel", place,
      [&](cudaStream_t stream) { return paired_divergence_fwd(a, out, stream); });
}

void bind_divergence_bwd(const Place& place, const DivergenceArgs& a, const DivergenceGrad& grad) {
  check_args(a);
  check_vocab(a.vocab);
  run("paired_divergence", "paired_divergence_bwd_kernel", place,
      [&](cudaStream_t stream) { return paired_divergence_bwd(a, grad, stream); });
}

}  // namespace

void bind_rows(py::module_& m) {
  m.def("token_stats_fwd", &run_token_stats_fwd);
  m.def("token_stats_bwd", &run_token_stats_bwd);
  m.def("token_stats_at_fwd", &bind_token_stats_at_fwd);
  m.def("token_stats_at_bwd", &bind_token_stats_at_bwd);
  m.def("policy_step", &run_policy_step, py::arg("place"), py::arg("logits"), py::arg("stats"),
        py::arg("objective"), py::arg("grad"));
  m.def("kept_token_stats_fwd", &bind_kept_fwd);
  m.def("kept_token_stats_bwd", &bind_kept_bwd);
  m.def("paired_divergence_fwd", &bind_divergence_fwd);
  m.def("paired_divergence_bwd", &bind_divergence_bwd);
  m.attr("DIVERGENCE_STATE") = kDivergenceState;
}

}  // namespace cuda
}  // namespace tokfuse
