#include "bindings/bind.h"

namespace py = pybind11;

namespace tokfuse {

LogitsArgs logits_args(const py::tuple& t) {
  require(t.size() == 19, "logits record must have 19 fields");
  LogitsArgs a;
  const Address logits = t[0].cast<Address>(), target = t[5].cast<Address>();
  a.logits = as<void>(logits);
  a.stride = t[1].cast<int64_t>();
  a.dtype = dtype_of(t[2].cast<int>());
  a.tokens = t[3].cast<int64_t>();
  a.vocab = t[4].cast<int64_t>();
  a.target = as<int64_t>(target);
  a.mask = as<uint8_t>(t[6].cast<Address>());
  a.temperatures = as<float>(t[7].cast<Address>());
  a.temperature = t[8].cast<float>();
  a.softcap = t[9].cast<float>();
  a.logit_scale = t[10].cast<float>();
  a.bias_logits = as<void>(t[11].cast<Address>());
  a.bias_stride = t[12].cast<int64_t>();
  a.bias_scale = t[13].cast<float>();
  a.threads = t[14].cast<int>();
  a.index = as<int64_t>(t[15].cast<Address>());
  a.total = t[16].cast<int64_t>();
  a.tile = t[17].cast<int64_t>();
  a.tile_stride = t[18].cast<int64_t>();
  require(a.tile >= 0 && a.tile % 2048 == 0, "tile must be a multiple of 2048 columns, or 0");
  require(a.tile == 0 || (a.stride >= a.tile && a.tile_stride >= a.tile), "tiles must not overlap");
  require(a.tile > 0 || a.tile_stride == 0, "tile_stride needs a tile");
  require(a.tile == 0 || a.bias_stride == 0, "tiled logits take no bias_logits");
  require(a.index != nullptr || a.tokens == 0 || a.total == a.tokens,
          "total must equal tokens without an index");
  require(a.total >= 0, "total must be >= 0");
  require(a.tokens >= 0 && a.vocab >= 1, "tokens must be >= 0 and vocab >= 1");
  require(a.stride >= 0 && a.bias_stride >= 0, "row strides must be >= 0");
  require(a.softcap >= 0.0f && a.logit_scale > 0.0f, "softcap must be >= 0, logit_scale > 0");
  require(a.temperatures != nullptr || a.temperature > 0.0f, "temperature must be > 0");
  require_threads(a.threads);
  require_pointer(logits, a.tokens, "logits");
  require_pointer(target, a.tokens, "target");
  for (int64_t i = 0; a.index != nullptr && i < a.tokens; i++) {
    require(a.index[i] >= 0 && a.index[i] < a.total, "index out of range");
  }
  return a;
}

namespace {

// Returns the first row whose target or temperature is out of range, or -1 after a complete run.
int64_t token_stats_fwd(const py::tuple& logits, Address logp, Address entropy, Address lse,
                        Address sum_sq, Address top1, Address shift, Address inv_sum,
                        Address p2_logp, Address p2_logp2, Address second_logp,
                        float second_temperature) {
  const LogitsArgs a = logits_args(logits);
  for (Address p : {logp, entropy, lse, sum_sq, top1, shift, inv_sum}) {
    require_pointer(p, a.tokens, "an output");
  }
  require((p2_logp == 0) == (p2_logp2 == 0), "p2_logp and p2_logp2 come together");
  require(second_logp == 0 || second_temperature > 0.0f, "second_temperature must be > 0");
  const TokenStatsOut out = {as<float>(logp),        as<float>(entropy), as<float>(lse),
                             as<float>(sum_sq),      as<float>(top1),    as<float>(shift),
                             as<float>(inv_sum),     as<float>(p2_logp), as<float>(p2_logp2),
                             as<float>(second_logp), second_temperature};
  py::gil_scoped_release release;
  const int64_t bad = TOKFUSE_CALL(first_bad_row, a);
  if (bad < 0) TOKFUSE_CALL(token_stats_fwd, a, out);
  return bad;
}

// The forward has checked the targets. One outside the columns here has no one-hot term: it lies in
// another shard of the vocabulary.
void token_stats_bwd(const py::tuple& logits, Address shift, Address inv_sum, Address logp,
                     Address entropy, Address grad_logp, Address grad_entropy, Address grad_logits,
                     int64_t grad_stride) {
  const LogitsArgs a = logits_args(logits);
  for (Address p : {shift, inv_sum, logp, entropy, grad_logits}) {
    require_pointer(p, a.tokens, "a backward argument");
  }
  require(a.tile == 0, "the backward takes rows in one piece");
  require(grad_stride >= a.vocab || a.tokens <= 1, "grad_stride must be >= vocab");
  const TokenStatsGrad grad = {as<float>(shift),      as<float>(inv_sum),   as<float>(logp),
                               as<float>(entropy),    as<float>(grad_logp), as<float>(grad_entropy),
                               as<void>(grad_logits), grad_stride};
  py::gil_scoped_release release;
  TOKFUSE_CALL(token_stats_bwd, a, grad);
}

}  // namespace

void bind_token_stats(py::module_& m) {
  m.def("token_stats_fwd", &token_stats_fwd);
  m.def("token_stats_bwd", &token_stats_bwd);
}

}  // namespace tokfuse
