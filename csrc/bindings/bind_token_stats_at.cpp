// Log-probs at a few ids per row. Working memory is allocated here.
#include <vector>

#include "bindings/bind.h"
#include "cpu/ids_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

void check_ids(const LogitsArgs& a, const IdsArgs& ids) {
  check_logits(a);
  require_pointers({ids.ids, ids.logp_at}, ids.num_ids, "an argument of the ids");
  require_pointer(ids.offsets, 1, "offsets");
  require(ids.offsets[0] == 0 && ids.offsets[a.tokens] == ids.num_ids,
          "offsets must run from 0 to num_ids");
  for (int64_t t = 0; t < a.tokens; t++) {
    require(ids.offsets[t] <= ids.offsets[t + 1], "offsets must not decrease");
  }
}

// First unmasked row with a value out of range, or -1 after a complete run.
int64_t token_stats_at_fwd(const LogitsArgs& a, const TokenStatsOut& out, const IdsArgs& ids) {
  check_ids(a, ids);
  require_pointers({out.logp, out.entropy, out.lse, out.sum_sq, out.top1, out.row_max, out.inv_sum},
                   a.rows, "an output");
  require(out.second_logp == nullptr && out.sum_p2_logp == nullptr && out.sum_p2_logp2 == nullptr,
          "log-probs at ids come without the optional statistics");
  py::gil_scoped_release release;
  const int64_t bad = TOKFUSE_CALL(first_bad_row, a);
  return bad < 0 ? TOKFUSE_CALL(token_stats_at_fwd, a, out, ids) : bad;
}

void token_stats_at_bwd(const LogitsArgs& a, const TokenStatsGrad& grad, const IdsArgs& ids) {
  check_ids(a, ids);
  require_pointers({grad.row_max, grad.inv_sum, grad.logp, grad.entropy, grad.grad_logits}, a.rows,
                   "a backward argument");
  require_pointer(ids.grad_logp_at, ids.num_ids, "grad_logp_at");
  require(grad.grad_stride >= (a.tile > 0 ? a.tile : a.vocab) || a.rows <= 1,
          "grad_stride must be >= vocab");
  require(grad.grad_dtype == a.dtype, "the gradient has the dtype of the logits");
  py::gil_scoped_release release;
  require(TOKFUSE_CALL(first_bad_row, a) < 0, "a target or temperature is out of range");
  int64_t longest = 0;
  for (int64_t t = 0; t < a.tokens; t++) {
    const int64_t count = ids.offsets[t + 1] - ids.offsets[t];
    longest = count > longest ? count : longest;
  }
  require(longest < (int64_t{1} << 28), "a row has too many ids");
  IdsScratch scratch = {};
  scratch.num_columns = longest + 1;
  scratch.table_size = table_places(scratch.num_columns);
  const size_t columns = static_cast<size_t>(a.threads * scratch.num_columns);
  std::vector<int64_t> column(columns);
  std::vector<double> incoming(columns);
  std::vector<float> logp(columns), gradient(columns);
  std::vector<int32_t> table(static_cast<size_t>(a.threads * scratch.table_size));
  scratch.column = column.data();
  scratch.incoming = incoming.data();
  scratch.logp = logp.data();
  scratch.grad = gradient.data();
  scratch.table = table.data();
  const int64_t bad = TOKFUSE_CALL(token_stats_at_bwd, a, grad, ids, scratch);
  require(bad < 0, "an id is out of range");
}

}  // namespace

void bind_token_stats_at(py::module_& m) {
  m.def("token_stats_at_fwd", &token_stats_at_fwd);
  m.def("token_stats_at_bwd", &token_stats_at_bwd);
}

}  // namespace tokfuse
