#include <new>

#include "bindings/bind.h"

namespace py = pybind11;

namespace tokfuse {

void check_objective(const ObjectiveArgs& o) {
  check_objective_inputs(o);
  require_threads(o.threads);
  require(o.metrics != nullptr, "metrics is null");
  for (const float* p :
       {o.old_logp, static_cast<const float*>(o.token_loss), static_cast<const float*>(o.d_logp),
        static_cast<const float*>(o.d_entropy), static_cast<const float*>(o.scratch)}) {
    require(p != nullptr || o.tokens == 0, "a vector is null");
  }
  require(o.advantage != nullptr || (o.advantage_per_seq ? o.seqs : o.tokens) == 0,
          "advantage is null");
  for (int64_t i = 0; i < o.seqs; i++) {
    require(o.cu_seqlens[i] >= 0 && o.cu_seqlens[i] <= o.cu_seqlens[i + 1],
            "cu_seqlens must be non-decreasing from 0");
  }
  require(o.cu_seqlens == nullptr || (o.cu_seqlens[0] == 0 && o.cu_seqlens[o.seqs] == o.tokens),
          "cu_seqlens must start at 0 and end at tokens");
}

namespace {

// The fields of objective_args, then (threads, scratch).
ObjectiveArgs policy_args(const py::tuple& t) {
  require(t.size() == kObjectiveFields + 2, "policy record must have 23 fields");
  ObjectiveArgs o = objective_args(t);
  o.threads = t[kObjectiveFields].cast<int>();
  o.scratch = as<float>(t[kObjectiveFields + 1].cast<Address>());
  check_objective(o);
  return o;
}

void policy_loss(const py::tuple& record) {
  const ObjectiveArgs o = policy_args(record);
  require(o.logp != nullptr || o.tokens == 0, "logp is null");
  require(o.params.entropy_coef == 0.0f || o.entropy != nullptr || o.tokens == 0,
          "entropy is null");
  py::gil_scoped_release release;
  TOKFUSE_CALL(policy_loss, o);
}

enum Phase { kPrepare = 1, kRows = 2, kMetrics = 4 };

// One fused step, or its phases apart when the logits come in chunks: prepare once, rows for every
// chunk, metrics once. Returns the first token whose target or temperature is out of range, before
// anything is written, or -1 - n, with n the rows kept in `kept` (0 without it).
int64_t policy_step(int phases, const py::tuple& logits, const py::tuple& record, Address lse,
                    Address sum_sq, Address top1, Address shift, Address inv_sum,
                    Address grad_logits, int64_t grad_stride, Address kept) {
  const LogitsArgs a = logits_args(logits);
  const ObjectiveArgs o = policy_args(record);
  require(o.tokens == a.total, "logits and policy records must have the same tokens");
  require(o.params.level == Level::kToken, "policy_step fuses token-level objectives only");
  require(grad_stride >= (a.tile > 0 ? a.tile : a.vocab) || a.tokens <= 1,
          "grad_stride must be >= vocab");
  require(a.tile == 0 || grad_logits == reinterpret_cast<Address>(a.logits),
          "tiled logits are overwritten by their gradient");
  for (Address p : {lse, sum_sq, top1, shift, inv_sum, grad_logits}) {
    require_pointer(p, a.tokens, "an output");
  }
  require((o.logp != nullptr && o.entropy != nullptr) || o.tokens == 0,
          "logp and entropy receive the statistics and must not be null");
  require(kept == 0 ||
              (grad_logits == reinterpret_cast<Address>(a.logits) && a.dtype == DType::kFloat32),
          "kept needs float32 logits overwritten by their gradient");
  TokenStatsOut out = {};
  out.logp = const_cast<float*>(o.logp);
  out.entropy = const_cast<float*>(o.entropy);
  out.lse = as<float>(lse);
  out.sum_sq = as<float>(sum_sq);
  out.top1 = as<float>(top1);
  out.shift = as<float>(shift);
  out.inv_sum = as<float>(inv_sum);
  py::gil_scoped_release release;
  const int64_t bad = TOKFUSE_CALL(first_bad_row, a);
  if (bad >= 0) return bad;
  int64_t n = 0;
  if (phases & kPrepare) TOKFUSE_CALL(policy_prepare, o);
  if (phases & kRows) {
    // Rows that are dropped need no zeros.
    TOKFUSE_CALL(policy_rows, a, out, o, as<void>(grad_logits), grad_stride, kept == 0);
    if (kept != 0) n = TOKFUSE_CALL(keep_gradient_rows, a, o, as<int64_t>(kept));
    if (n < 0) throw std::bad_alloc();
  }
  if (phases & kMetrics) TOKFUSE_CALL(policy_metrics, o);
  return -1 - n;
}

}  // namespace

void bind_policy(py::module_& m) {
  m.def("policy_loss", &policy_loss);
  m.def("policy_step", &policy_step);
}

}  // namespace tokfuse
