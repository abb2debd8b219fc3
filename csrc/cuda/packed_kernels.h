// Launchers of the CUDA kernels over packed vectors. Each makes one launch on `stream` of the
// current device. Their argument structs are in common/; every pointer is the device's.
#pragma once

#include "common/objective_args.h"
#include "common/packed_args.h"
#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tokfuse {
namespace cuda {

// Rows of equal id, from a stable sort of the ids: `order` are the rows, `ids` the sorted ids.
struct SortedIds {
  const int64_t* ids;
  const int64_t* order;
};

// What segment_moments needs beside its inputs; see MomentsArgs.
struct MomentsScratch {
  const int64_t* order;
  int parts;
  double* table;
  unsigned* tickets;
};
int moments_parts(int64_t rows, int64_t segments);
// A row whose id is outside [0, K) counts nowhere.
cudaError_t segment_moments(const MomentsArgs& args, cudaStream_t stream);

cudaError_t gae(const GaeArgs& args, cudaStream_t stream);
cudaError_t vtrace(const VtraceArgs& args, cudaStream_t stream);
cudaError_t whiten(const WhitenArgs& args, cudaStream_t stream);
cudaError_t ope(const OpeArgs& args, cudaStream_t stream);
cudaError_t group_advantage(const GroupAdvantageArgs& args, cudaStream_t stream);
cudaError_t offpolicy_weights(const OffPolicyArgs& args, cudaStream_t stream);

// Numbers of ObjectiveArgs::partial and of MetricsArgs::partial.
int64_t policy_partials(int64_t tokens, int64_t seqs);
cudaError_t policy_loss(const ObjectiveArgs& args, cudaStream_t stream);
cudaError_t policy_prepare(const PrepareArgs& args, cudaStream_t stream);
cudaError_t policy_metrics(const MetricsArgs& args, cudaStream_t stream);

cudaError_t sketch(const SketchArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace tokfuse
