// The CUDA kernels of policy objectives over packed tokens.
#include "bindings/bind_cuda.h"
#include "bindings/objective_params.h"
#include "cuda/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

// (params, tokens, seqs, logp, old_logp, advantage, advantage_per_seq, mask, cu_seqlens, weight,
// signal, ref_logp, kl_weight, entropy, entropy_weight, inv_normalizer, normalize_by_seqs,
// token_loss, d_logp, d_entropy, metrics)
ObjectiveArgs objective_args(const py::tuple& t) {
  require(t.size() == 21, "policy record must have 21 fields");
  auto floats = [&](size_t i) { return as<float>(t[i].cast<Address>()); };
  ObjectiveArgs o = {};
  o.params = objective_params(t[0].cast<py::tuple>());
  o.tokens = t[1].cast<int64_t>();
  o.seqs = t[2].cast<int64_t>();
  o.logp = floats(3);
  o.old_logp = floats(4);
  o.advantage = floats(5);
  o.advantage_per_seq = t[6].cast<int>();
  o.mask = as<uint8_t>(t[7].cast<Address>());
  o.cu_seqlens = as<int32_t>(t[8].cast<Address>());
  o.weight = floats(9);
  o.signal = floats(10);
  o.ref_logp = floats(11);
  o.kl_weight = floats(12);
  o.entropy = floats(13);
  o.entropy_weight = floats(14);
  o.inv_normalizer = t[15].cast<double>();
  o.normalize_by_seqs = t[16].cast<int>();
  o.token_loss = floats(17);
  o.d_logp = floats(18);
  o.d_entropy = floats(19);
  o.metrics = as<double>(t[20].cast<Address>());
  require(o.tokens >= 0 && o.seqs >= 0, "tokens and seqs must be >= 0");
  require(o.seqs == 0 || o.cu_seqlens != nullptr, "cu_seqlens is null");
  const bool needs_seqs = o.params.level != Level::kToken || o.params.seq_mean != 0 ||
                          o.advantage_per_seq != 0 ||
                          (o.inv_normalizer < 0 && o.normalize_by_seqs != 0);
  require(!needs_seqs || o.cu_seqlens != nullptr || o.tokens == 0, "cu_seqlens is null");
  require(o.params.kl == Kl::kNone || o.ref_logp != nullptr || o.tokens == 0, "ref_logp is null");
  require(o.params.entropy_coef == 0.0f || o.entropy != nullptr || o.tokens == 0,
          "entropy is null");
  return o;
}

void bind_policy_loss(const py::tuple& place, const py::tuple& record, Address partial) {
  const ObjectiveArgs o = objective_args(record);
  require(partial != 0 || policy_partials(o.tokens, o.seqs) == 0, "scratch memory is missing");
  run("policy_loss", "policy_loss_kernel", place_of(place),
      [&](cudaStream_t stream) { return policy_loss(o, as<double>(partial), stream); });
}

void bind_policy_prepare(const py::tuple& place, Address cu_seqlens, Address mask,
                         Address seq_advantage, Address counts, Address agg_weight,
                         Address advantage, int64_t seqs) {
  require((seq_advantage == 0) == (advantage == 0) || seqs == 0,
          "advantages of tokens come from those of sequences");
  const PrepareArgs a = {seqs,
                         as<int32_t>(cu_seqlens),
                         as<uint8_t>(mask),
                         as<float>(seq_advantage),
                         as<int32_t>(counts),
                         as<float>(agg_weight),
                         as<float>(advantage)};
  run("policy_step", "policy_prepare_kernel", place_of(place),
      [&](cudaStream_t stream) { return policy_prepare(a, stream); });
}

// (tokens, logp, entropy, old_logp, ref_logp, mask, token_loss, d_logp, d_entropy, ratio, flags,
// counts, seqs)
void bind_policy_metrics(const py::tuple& place, const py::tuple& t, Address partial,
                         Address metrics) {
  require(t.size() == 13, "results record must have 13 fields");
  auto floats = [&](size_t i) { return as<float>(t[i].cast<Address>()); };
  TokenResults r = {};
  r.tokens = t[0].cast<int64_t>();
  r.logp = floats(1);
  r.entropy = floats(2);
  r.old_logp = floats(3);
  r.ref_logp = floats(4);
  r.mask = as<uint8_t>(t[5].cast<Address>());
  r.token_loss = floats(6);
  r.d_logp = floats(7);
  r.d_entropy = floats(8);
  r.ratio = floats(9);
  r.flags = as<int32_t>(t[10].cast<Address>());
  r.counts = as<int32_t>(t[11].cast<Address>());
  r.seqs = t[12].cast<int64_t>();
  run("policy_step", "policy_metrics_kernel", place_of(place), [&](cudaStream_t stream) {
    return policy_metrics(r, as<double>(partial), as<double>(metrics), stream);
  });
}

}  // namespace

void bind_policy(py::module_& m) {
  m.def("policy_partials", &policy_partials);
  m.def("policy_loss", &bind_policy_loss);
  m.def("policy_prepare", &bind_policy_prepare);
  m.def("policy_metrics", &bind_policy_metrics);
}

}  // namespace cuda
}  // namespace tokfuse
