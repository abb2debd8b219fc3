// Kernels that compare or restrict whole distributions. Scratch memory is allocated here.
#include <vector>

#include "bindings/bind.h"
#include "cpu/distribution_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace {

KeptArgs kept_args(const py::tuple& logits, Address ids, Address offsets, int64_t kept) {
  KeptArgs a = {};
  a.logits = logits_args(logits);
  require(a.logits.index == nullptr && a.logits.bias_logits == nullptr,
          "kept rows take neither an index nor bias_logits");
  require_pointer(ids, kept, "ids");
  require_pointer(offsets, 1, "offsets");
  a.ids = as<int64_t>(ids);
  a.offsets = as<int64_t>(offsets);
  const int64_t tokens = a.logits.tokens;
  require(a.offsets[0] == 0 && a.offsets[tokens] == kept, "offsets must run from 0 to kept");
  for (int64_t t = 0; t < tokens; t++) {
    require(a.offsets[t] <= a.offsets[t + 1], "offsets must not decrease");
  }
  return a;
}

int64_t bad_row(KeptArgs& a) {
  std::vector<uint64_t> seen(
      static_cast<size_t>(a.logits.threads * kept_seen_words(a.logits.vocab)));
  a.seen = seen.data();
  return TOKFUSE_CALL(kept_bad_row, a);
}

// First unmasked row with a value out of range or an id twice, or -1 after a complete run.
int64_t kept_token_stats_fwd(const py::tuple& logits, Address ids, Address offsets, int64_t kept,
                             Address logp, Address entropy, Address lse, Address shift,
                             Address inv_sum) {
  KeptArgs a = kept_args(logits, ids, offsets, kept);
  for (Address p : {logp, entropy, lse, shift, inv_sum}) {
    require_pointer(p, a.logits.tokens, "an output");
  }
  const KeptOut out = {as<float>(logp), as<float>(entropy), as<float>(lse), as<float>(shift),
                       as<float>(inv_sum)};
  py::gil_scoped_release release;
  const int64_t bad = bad_row(a);
  if (bad < 0) TOKFUSE_CALL(kept_token_stats_fwd, a, out);
  return bad;
}

void kept_token_stats_bwd(const py::tuple& logits, Address ids, Address offsets, int64_t kept,
                          Address shift, Address inv_sum, Address logp, Address entropy,
                          Address grad_logp, Address grad_entropy, Address grad_logits,
                          int64_t grad_stride) {
  KeptArgs a = kept_args(logits, ids, offsets, kept);
  for (Address p : {shift, inv_sum, logp, entropy, grad_logits}) {
    require_pointer(p, a.logits.tokens, "a backward argument");
  }
  require(grad_stride >= a.logits.vocab || a.logits.tokens <= 1, "grad_stride must be >= vocab");
  const TokenStatsGrad grad = {as<float>(shift),      as<float>(inv_sum),   as<float>(logp),
                               as<float>(entropy),    as<float>(grad_logp), as<float>(grad_entropy),
                               as<void>(grad_logits), grad_stride};
  py::gil_scoped_release release;
  require(bad_row(a) < 0, "a target, temperature or kept id is out of range");
  TOKFUSE_CALL(kept_token_stats_bwd, a, grad);
}

// (p, p_stride, q, q_stride, dtype, tokens, vocab, mask, temperatures, temperature, softcap,
//  logit_scale, kind, beta, threads)
DivergenceArgs divergence_args(const py::tuple& t) {
  require(t.size() == 15, "divergence record must have 15 fields");
  DivergenceArgs a;
  const Address p = t[0].cast<Address>(), q = t[2].cast<Address>();
  a.p = as<void>(p);
  a.p_stride = t[1].cast<int64_t>();
  a.q = as<void>(q);
  a.q_stride = t[3].cast<int64_t>();
  a.dtype = dtype_of(t[4].cast<int>());
  a.tokens = t[5].cast<int64_t>();
  a.vocab = t[6].cast<int64_t>();
  a.mask = as<uint8_t>(t[7].cast<Address>());
  a.temperatures = as<float>(t[8].cast<Address>());
  a.temperature = t[9].cast<float>();
  a.softcap = t[10].cast<float>();
  a.logit_scale = t[11].cast<float>();
  const int kind = t[12].cast<int>();
  a.beta = t[13].cast<float>();
  a.threads = t[14].cast<int>();
  require(a.tokens >= 0 && a.vocab >= 1, "tokens must be >= 0 and vocab >= 1");
  require(a.p_stride >= 0 && a.q_stride >= 0, "row strides must be >= 0");
  require(a.softcap >= 0.0f && a.logit_scale > 0.0f, "softcap must be >= 0, logit_scale > 0");
  require(a.temperatures != nullptr || a.temperature > 0.0f, "temperature must be > 0");
  require(kind >= 0 && kind <= static_cast<int>(Divergence::kReverseKl), "unknown kind code");
  a.kind = static_cast<Divergence>(kind);
  require(a.beta > 0.0f && a.beta < 1.0f, "beta must be in (0, 1)");
  require_threads(a.threads);
  require_pointer(p, a.tokens, "p");
  require_pointer(q, a.tokens, "q");
  return a;
}

// First unmasked row whose temperature is not positive, or -1 after a complete run.
int64_t paired_divergence_fwd(const py::tuple& record, Address divergence, Address state) {
  const DivergenceArgs a = divergence_args(record);
  for (Address p : {divergence, state}) require_pointer(p, a.tokens, "an output");
  for (int64_t t = 0; a.temperatures != nullptr && t < a.tokens; t++) {
    if ((a.mask == nullptr || a.mask[t] != 0) && !(a.temperatures[t] > 0.0f)) return t;
  }
  py::gil_scoped_release release;
  TOKFUSE_CALL(paired_divergence_fwd, a, as<float>(divergence), as<float>(state));
  return -1;
}

void paired_divergence_bwd(const py::tuple& record, Address state, Address grad_divergence,
                           Address grad_p, int64_t grad_stride) {
  const DivergenceArgs a = divergence_args(record);
  for (Address p : {state, grad_divergence, grad_p}) {
    require_pointer(p, a.tokens, "a backward argument");
  }
  require(grad_stride >= a.vocab || a.tokens <= 1, "grad_stride must be >= vocab");
  py::gil_scoped_release release;
  TOKFUSE_CALL(paired_divergence_bwd, a, as<float>(state), as<float>(grad_divergence),
               as<void>(grad_p), grad_stride);
}

}  // namespace

void bind_distribution(py::module_& m) {
  m.def("kept_token_stats_fwd", &kept_token_stats_fwd);
  m.def("kept_token_stats_bwd", &kept_token_stats_bwd);
  m.def("paired_divergence_fwd", &paired_divergence_fwd);
  m.def("paired_divergence_bwd", &paired_divergence_bwd);
}

}  // namespace tokfuse
