// The CUDA kernels over rows of logits.
#include "bindings/bind_cuda.h"
#include "bindings/objective_params.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

DType dtype_of(int code) {
  return code_of(code, DType::kFloat16,
                 "dtype code must be 0 (float32), 1 (bfloat16), 2 (float16)");
}

// (logits, stride, dtype, rows, vocab, index, target, mask, temperatures, temperature, softcap,
// logit_scale, bias_logits, bias_stride, bias_scale)
LogitsArgs logits_args(const py::tuple& t) {
  require(t.size() == 15, "logits record must have 15 fields");
  LogitsArgs a = {};
  a.logits = as<void>(t[0].cast<Address>());
  a.stride = t[1].cast<int64_t>();
  a.dtype = dtype_of(t[2].cast<int>());
  a.rows = t[3].cast<int64_t>();
  a.vocab = t[4].cast<int64_t>();
  a.index = as<int64_t>(t[5].cast<Address>());
  a.target = as<int64_t>(t[6].cast<Address>());
  a.mask = as<uint8_t>(t[7].cast<Address>());
  a.temperatures = as<float>(t[8].cast<Address>());
  a.temperature = t[9].cast<float>();
  a.softcap = t[10].cast<float>();
  a.logit_scale = t[11].cast<float>();
  a.bias_logits = as<void>(t[12].cast<Address>());
  a.bias_stride = t[13].cast<int64_t>();
  a.bias_scale = t[14].cast<float>();
  require(a.rows >= 0 && a.vocab >= 1, "rows must be >= 0 and vocab >= 1");
  require(a.stride >= 0 && a.bias_stride >= 0, "row strides must be >= 0");
  require(a.softcap >= 0.0f && a.logit_scale > 0.0f, "softcap must be >= 0, logit_scale > 0");
  require(a.temperatures != nullptr || a.temperature > 0.0f, "temperature must be > 0");
  require((a.logits != nullptr && a.target != nullptr) || a.rows == 0, "logits or target is null");
  return a;
}

// (logp, entropy, lse, sum_sq, top1, row_max, inv_sum, second_logp, p2_logp, p2_logp2,
// second_temperature)
TokenStatsOut stats_out(const py::tuple& t) {
  require(t.size() == 11, "statistics record must have 11 fields");
  auto floats = [&](size_t i) { return as<float>(t[i].cast<Address>()); };
  return {floats(0), floats(1), floats(2), floats(3), floats(4),          floats(5),
          floats(6), floats(7), floats(8), floats(9), t[10].cast<float>()};
}

void bind_token_stats_fwd(const py::tuple& place, const py::tuple& logits, const py::tuple& out) {
  const LogitsArgs a = logits_args(logits);
  const TokenStatsOut o = stats_out(out);
  run("token_stats", "token_stats_fwd_kernel", place_of(place),
      [&](cudaStream_t stream) { return token_stats_fwd(a, o, stream); });
}

// (row_max, inv_sum, logp, entropy, grad_logp, grad_entropy, grad_logits, grad_stride, grad_dtype)
TokenStatsGrad stats_grad(const py::tuple& t) {
  require(t.size() == 9, "gradient record must have 9 fields");
  auto floats = [&](size_t i) { return as<float>(t[i].cast<Address>()); };
  return {floats(0),
          floats(1),
          floats(2),
          floats(3),
          floats(4),
          floats(5),
          as<void>(t[6].cast<Address>()),
          t[7].cast<int64_t>(),
          dtype_of(t[8].cast<int>())};
}

void bind_token_stats_bwd(const py::tuple& place, const py::tuple& logits, const py::tuple& grad) {
  const LogitsArgs a = logits_args(logits);
  const TokenStatsGrad g = stats_grad(grad);
  run("token_stats", "token_stats_bwd_kernel", place_of(place),
      [&](cudaStream_t stream) { return token_stats_bwd(a, g, stream); });
}

// (params, old_logp, advantage, agg_weight, weight, signal, ref_logp, kl_weight, entropy_weight,
// scale, scale_value, token_loss, d_logp, d_entropy, ratio, flags)
TokenObjective token_objective_args(const py::tuple& t) {
  require(t.size() == 16, "objective record must have 16 fields");
  auto floats = [&](size_t i) { return as<float>(t[i].cast<Address>()); };
  TokenObjective o = {};
  o.params = objective_params(t[0].cast<py::tuple>());
  require(o.params.level == Level::kToken, "policy_step fuses token-level objectives only");
  o.old_logp = floats(1);
  o.advantage = floats(2);
  o.agg_weight = floats(3);
  o.weight = floats(4);
  o.signal = floats(5);
  o.ref_logp = floats(6);
  o.kl_weight = floats(7);
  o.entropy_weight = floats(8);
  o.scale = floats(9);
  o.scale_value = t[10].cast<float>();
  o.token_loss = floats(11);
  o.d_logp = floats(12);
  o.d_entropy = floats(13);
  o.ratio = floats(14);
  o.flags = as<int32_t>(t[15].cast<Address>());
  return o;
}

void bind_policy_step(const py::tuple& place, const py::tuple& logits, const py::tuple& out,
                      const py::tuple& objective, Address grad_logits, int64_t grad_stride,
                      int grad_dtype) {
  const LogitsArgs a = logits_args(logits);
  const TokenStatsOut stats = stats_out(out);
  const TokenObjective o = token_objective_args(objective);
  const DType dtype = dtype_of(grad_dtype);
  check_token_inputs(o.params, o.signal, o.ref_logp, a.rows);
  run("policy_step", "policy_step_kernel", place_of(place), [&](cudaStream_t stream) {
    return policy_step(a, stats, o, as<void>(grad_logits), grad_stride, dtype, stream);
  });
}

KeptArgs kept_args(const py::tuple& logits, Address ids, Address offsets, int64_t kept) {
  KeptArgs a = {logits_args(logits), as<int64_t>(ids), as<int64_t>(offsets), kept};
  require(a.logits.index == nullptr && a.logits.bias_logits == nullptr,
          "kept rows take neither an index nor bias_logits");
  require(kept >= 0 && (ids != 0 || kept == 0), "ids are null");
  require(offsets != 0, "offsets are null");
  return a;
}

void bind_kept_fwd(const py::tuple& place, const py::tuple& logits, Address ids, Address offsets,
                   int64_t kept, const py::tuple& out) {
  const KeptArgs a = kept_args(logits, ids, offsets, kept);
  const TokenStatsOut o = stats_out(out);
  run("kept_token_stats", "kept_token_stats_fwd_kernel", place_of(place),
      [&](cudaStream_t stream) { return kept_token_stats_fwd(a, o, stream); });
}

void bind_kept_bwd(const py::tuple& place, const py::tuple& logits, Address ids, Address offsets,
                   int64_t kept, const py::tuple& grad) {
  const KeptArgs a = kept_args(logits, ids, offsets, kept);
  const TokenStatsGrad g = stats_grad(grad);
  run("kept_token_stats", "kept_token_stats_bwd_kernel", place_of(place),
      [&](cudaStream_t stream) { return kept_token_stats_bwd(a, g, stream); });
}

// (p, p_stride, q, q_stride, dtype, tokens, vocab, mask, temperatures, temperature, softcap,
// logit_scale, kind, beta)
DivergenceArgs divergence_args(const py::tuple& t) {
  require(t.size() == 14, "divergence record must have 14 fields");
  DivergenceArgs a = {};
  a.p = as<void>(t[0].cast<Address>());
  a.p_stride = t[1].cast<int64_t>();
  a.q = as<void>(t[2].cast<Address>());
  a.q_stride = t[3].cast<int64_t>();
  a.dtype = dtype_of(t[4].cast<int>());
  a.tokens = t[5].cast<int64_t>();
  a.vocab = t[6].cast<int64_t>();
  a.mask = as<uint8_t>(t[7].cast<Address>());
  a.temperatures = as<float>(t[8].cast<Address>());
  a.temperature = t[9].cast<float>();
  a.softcap = t[10].cast<float>();
  a.logit_scale = t[11].cast<float>();
  a.kind = code_of(t[12].cast<int>(), Divergence::kReverseKl, "unknown divergence code");
  a.beta = t[13].cast<float>();
  require(a.tokens >= 0 && a.vocab >= 1, "tokens must be >= 0 and vocab >= 1");
  require((a.p != nullptr && a.q != nullptr) || a.tokens == 0, "logits are null");
  return a;
}

void bind_divergence_fwd(const py::tuple& place, const py::tuple& record, Address divergence,
                         Address state) {
  const DivergenceArgs a = divergence_args(record);
  run("paired_divergence", "paired_divergence_fwd_kernel", place_of(place),
      [&](cudaStream_t stream) {
        return paired_divergence_fwd(a, as<float>(divergence), as<float>(state), stream);
      });
}

void bind_divergence_bwd(const py::tuple& place, const py::tuple& record, Address state,
                         Address grad_divergence, Address grad_p, int64_t grad_stride) {
  const DivergenceArgs a = divergence_args(record);
  run("paired_divergence", "paired_divergence_bwd_kernel", place_of(place),
      [&](cudaStream_t stream) {
        return paired_divergence_bwd(a, as<float>(state), as<float>(grad_divergence),
                                     as<void>(grad_p), grad_stride, stream);
      });
}

}  // namespace

void bind_rows(py::module_& m) {
  m.def("token_stats_fwd", &bind_token_stats_fwd);
  m.def("token_stats_bwd", &bind_token_stats_bwd);
  m.def("policy_step", &bind_policy_step);
  m.def("kept_token_stats_fwd", &bind_kept_fwd);
  m.def("kept_token_stats_bwd", &bind_kept_bwd);
  m.def("paired_divergence_fwd", &bind_divergence_fwd);
  m.def("paired_divergence_bwd", &bind_divergence_bwd);
  m.attr("DIVERGENCE_STATE") = kDivergenceState;
}

}  // namespace cuda
}  // namespace tokfuse
