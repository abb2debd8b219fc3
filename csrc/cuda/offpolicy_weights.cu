// Launcher of the kernel in offpolicy_weights.cuh.
#include "cuda/offpolicy_weights.cuh"

namespace tokfuse {
namespace cuda {

cudaError_t offpolicy_weights(const OffPolicyArgs& a, cudaStream_t stream) {
  const int64_t blocks = a.block_tokens == 1 ? (a.tokens + kBlock - 1) / kBlock : a.seqs;
  return launch_grid(&offpolicy_weights_kernel, blocks, kBlock, stream, a,
                     SortedIds{a.group_ids, a.order}, a.ess);
}

}  // namespace cuda
}  // namespace tokfuse
