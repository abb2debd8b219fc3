// Launcher of the kernel in group_advantage.cuh.
#include "cuda/group_advantage.cuh"
#include "cuda/runtime.h"

namespace tokfuse {
namespace cuda {
namespace {

constexpr int64_t kMaxBlocks = 1024;

}  // namespace

cudaError_t group_advantage(const GroupAdvantageArgs& a, cudaStream_t stream) {
  if (a.seqs == 0) return cudaSuccess;
  const int64_t wanted = (a.seqs + kBlock - 1) / kBlock;
  const int64_t blocks = wanted < kMaxBlocks ? wanted : kMaxBlocks;
  return launch(&group_advantage_kernel, LaunchShape{blocks, kBlock}, stream, a,
                SortedIds{a.group_ids, a.order});
}

}  // namespace cuda
}  // namespace tokfuse
