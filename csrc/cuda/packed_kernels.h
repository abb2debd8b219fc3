// Launchers of the CUDA kernels over packed vectors. Each makes one launch on `stream` of the
// current device; segment_moments may first clear its tickets with a memset. Their argument structs
// are in common/. All pointers are device pointers.
#pragma once

#include "common/loss_args.h"
#include "common/objective_args.h"
#include "common/packed_args.h"
#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tokfuse {
namespace cuda {

// The result of a stable sort of ids: the sorted ids, and the row of each of them.
struct SortedIds {
  const int64_t* ids;
  const int64_t* order;
};

// The working memory of segment_moments. MomentsArgs describes the fields.
struct MomentsScratch {
  const int64_t* order;
  int parts;
  double* table;
  unsigned* tickets;
};
// Returns MomentsArgs::parts.
int moments_parts(int64_t rows, int64_t segments);
// A row whose id is outside [0, K) is ignored.
cudaError_t segment_moments(const MomentsArgs& args, cudaStream_t stream);

cudaError_t gae(const GaeArgs& args, cudaStream_t stream);
cudaError_t vtrace(const VtraceArgs& args, cudaStream_t stream);
cudaError_t whiten(const WhitenArgs& args, cudaStream_t stream);
cudaError_t ope(const OpeArgs& args, cudaStream_t stream);
cudaError_t group_advantage(const GroupAdvantageArgs& args, cudaStream_t stream);
cudaError_t offpolicy_weights(const OffPolicyArgs& args, cudaStream_t stream);

// Returns the number of doubles in ObjectiveArgs::partial and in MetricsArgs::partial.
int64_t policy_partials(int64_t tokens, int64_t seqs);
cudaError_t policy_loss(const ObjectiveArgs& args, const LossArgs& loss, cudaStream_t stream);
cudaError_t policy_prepare(const PrepareArgs& args, cudaStream_t stream);
cudaError_t policy_count(const CountArgs& args, cudaStream_t stream);
cudaError_t policy_metrics(const MetricsArgs& args, const LossArgs& loss, cudaStream_t stream);

cudaError_t sketch(const SketchArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace tokfuse
