// Launchers of the kernels in policy_loss.cuh.
#include "cuda/policy_loss.cuh"

namespace tokfuse {
namespace cuda {

int64_t policy_partials(int64_t tokens, int64_t seqs) {
  return policy_segments(tokens, seqs) * (1 + kMetricCount);
}

cudaError_t policy_loss(const ObjectiveArgs& o, const LossArgs& loss, cudaStream_t stream) {
  return launch_grid(&policy_loss_kernel, policy_segments(o.tokens, o.seqs), kBlock, stream, o,
                     loss, o.partial);
}

cudaError_t policy_prepare(const PrepareArgs& a, cudaStream_t stream) {
  if (a.seqs == 0) return cudaSuccess;
  return launch(&policy_prepare_kernel, LaunchShape{a.seqs, kBlock}, stream, a);
}

cudaError_t policy_count(const CountArgs& a, cudaStream_t stream) {
  return launch(&policy_count_kernel, LaunchShape{1, kBlock}, stream, a);
}

cudaError_t policy_metrics(const MetricsArgs& a, const LossArgs& loss, cudaStream_t stream) {
  return launch_grid(&policy_metrics_kernel, policy_segments(a.tokens, 0), kBlock, stream, a, loss,
                     a.partial, a.sums);
}

}  // namespace cuda
}  // namespace tokfuse
