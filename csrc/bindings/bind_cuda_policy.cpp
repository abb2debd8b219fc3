// The CUDA kernels of policy objectives over packed tokens.
#include "bindings/bind_cuda.h"
#include "bindings/objective_params.h"
#include "cuda/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

ObjectiveArgs policy_args(const py::tuple& t) {
  require(t.size() == kObjectiveFields, "policy record must have 21 fields");
  const ObjectiveArgs o = objective_args(t);
  check_objective_inputs(o);
  require(o.params.entropy_coef == 0.0f || o.entropy != nullptr || o.tokens == 0,
          "entropy is null");
  return o;
}

void bind_policy_loss(const py::tuple& place, const py::tuple& record, Address partial) {
  const ObjectiveArgs o = policy_args(record);
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
