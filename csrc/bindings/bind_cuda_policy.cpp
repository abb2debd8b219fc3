// Bindings of the CUDA kernels of policy objectives over packed tokens.
#include "bindings/bind_cuda.h"
#include "cuda/packed_kernels.h"

namespace py = pybind11;

namespace tokfuse {
namespace cuda {
namespace {

void check_loss(const LossArgs& loss) {
  require(loss.loss != nullptr && loss.loss_sum != nullptr, "loss or loss_sum is null");
}

}  // namespace

void run_policy_loss(const Place& place, const ObjectiveArgs& o, const LossArgs& loss) {
  check_args(o);
  check_loss(loss);
  require(o.partial != nullptr || policy_partials(o.tokens, o.seqs) == 0,
          "scratch memory is missing");
  run("policy_loss", "policy_loss_kernel", place,
      [&](cudaStream_t stream) { return policy_loss(o, loss, stream); });
}

void run_policy_prepare(const Place& place, const PrepareArgs& a) {
  require(a.seqs >= 0, "a size must be >= 0");
  require((a.seq_advantage == nullptr) == (a.advantage == nullptr) || a.seqs == 0,
          "advantage and seq_advantage come together");
  run("policy_step", "policy_prepare_kernel", place,
      [&](cudaStream_t stream) { return policy_prepare(a, stream); });
}

void run_policy_count(const Place& place, const CountArgs& a) {
  require(a.tokens >= 0 && a.seqs >= 0, "a size must be >= 0");
  require(a.batch_inv_normalizer != nullptr, "batch_inv_normalizer is null");
  run("policy_step", "policy_count_kernel", place,
      [&](cudaStream_t stream) { return policy_count(a, stream); });
}

void run_policy_metrics(const Place& place, const MetricsArgs& a, const LossArgs& loss) {
  check_loss(loss);
  require(a.tokens >= 0 && a.seqs >= 0, "a size must be >= 0");
  require(a.partial != nullptr || policy_partials(a.tokens, 0) == 0, "scratch memory is missing");
  require(a.sums != nullptr, "sums is null");
  run("policy_step", "policy_metrics_kernel", place,
      [&](cudaStream_t stream) { return policy_metrics(a, loss, stream); });
}

void bind_policy(py::module_& m) {
  m.def("policy_partials", &policy_partials, py::kw_only(), py::arg("tokens"), py::arg("seqs"));
  m.def("policy_loss", &run_policy_loss);
  m.def("policy_prepare", &run_policy_prepare);
  m.def("policy_count", &run_policy_count);
  m.def("policy_metrics", &run_policy_metrics);
}

}  // namespace cuda
}  // namespace tokfuse
