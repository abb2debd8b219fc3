// Bindings of the CUDA kernels of policy objectives over packed tokens.
#include "bindings/bind_cuda.h"
#include "cuda/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

void bind_policy_loss(const Place& place, const ObjectiveArgs& o) {
  check_args(o);
  require(o.partial != nullptr || policy_partials(o.tokens, o.seqs) == 0,
          "scratch memory is missing");
  run("policy_loss", "policy_loss_kernel", place,
      [&](cudaStream_t stream) { return policy_loss(o, stream); });
}

void bind_policy_prepare(const Place& place, const PrepareArgs& a) {
  require(a.seqs >= 0, "a size must be >= 0");
  require((a.seq_advantage == nullptr) == (a.advantage == nullptr) || a.seqs == 0,
          "advantage and seq_advantage come together");
  run("policy_step", "policy_prepare_kernel", place,
      [&](cudaStream_t stream) { return policy_prepare(a, stream); });
}

void bind_policy_metrics(const Place& place, const MetricsArgs& a) {
  require(a.tokens >= 0 && a.seqs >= 0, "a size must be >= 0");
  require(a.partial != nullptr || policy_partials(a.tokens, 0) == 0, "scratch memory is missing");
  require(a.sums != nullptr, "sums is null");
  run("policy_step", "policy_metrics_kernel", place,
      [&](cudaStream_t stream) { return policy_metrics(a, stream); });
}

}  // namespace

void bind_policy(py::module_& m) {
  m.def("policy_partials", &policy_partials, py::kw_only(), py::arg("tokens"), py::arg("seqs"));
  m.def("policy_loss", &bind_policy_loss);
  m.def("policy_prepare", &bind_policy_prepare);
  m.def("policy_metrics", &bind_policy_metrics);
}

}  // namespace cuda
}  // namespace tokfuse
