// Bindings of the CPU kernels of token_stats.
#include "bindings/bind.h"

namespace py = pybind11;

namespace tokfuse {

void check_logits(const LogitsArgs& a) {
  check_args(a);
  require(a.tile >= 0 && a.tile % 2048 == 0, "tile must be a multiple of 2048 columns, or 0");
  require(a.tile == 0 || (a.stride >= a.tile && a.tile_stride >= a.tile), "tiles must not overlap");
  require(a.tile > 0 || a.tile_stride == 0, "tile_stride needs a tile");
  require(a.tile == 0 || a.bias_stride == 0, "tiled logits take no bias_logits");
  require_threads(a.threads);
  for (int64_t i = 0; a.index != nullptr && i < a.rows; i++) {
    require(a.index[i] >= 0 && a.index[i] < a.tokens, "index out of range");
  }
}

namespace {

// Returns the first token whose target or temperature is out of range, or -1 after a complete run.
int64_t token_stats_fwd(const LogitsArgs& a, const TokenStatsOut& out) {
  check_logits(a);
  require_pointers({out.logp, out.entropy, out.lse, out.sum_sq, out.top1, out.row_max, out.inv_sum},
                   a.rows, "an output");
  require((out.sum_p2_logp == nullptr) == (out.sum_p2_logp2 == nullptr),
          "sum_p2_logp and sum_p2_logp2 come together");
  require(out.second_logp == nullptr || out.second_temperature > 0.0f,
          "second_temperature must be > 0");
  py::gil_scoped_release release;
  const int64_t bad = TOKFUSE_CALL(first_bad_row, a);
  if (bad < 0) TOKFUSE_CALL(token_stats_fwd, a, out);
  return bad;
}

// The forward has checked the targets. A target outside these columns has no one-hot term, because
// it belongs to another shard of the vocabulary.
void token_stats_bwd(const LogitsArgs& a, const TokenStatsGrad& grad) {
  check_logits(a);
  require_pointers({grad.row_max, grad.inv_sum, grad.logp, grad.entropy, grad.grad_logits}, a.rows,
                   "a backward argument");
  require(a.tile == 0, "the backward takes rows in one piece");
  require(grad.grad_stride >= a.vocab || a.rows <= 1, "grad_stride must be >= vocab");
  require(grad.grad_dtype == a.dtype, "the gradient has the dtype of the logits");
  py::gil_scoped_release release;
  TOKFUSE_CALL(token_stats_bwd, a, grad);
}

}  // namespace

void bind_token_stats(py::module_& m) {
  m.def("token_stats_fwd", &token_stats_fwd);
  m.def("token_stats_bwd", &token_stats_bwd);
}

}  // namespace tokfuse
