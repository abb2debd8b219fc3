// Launchers of the CUDA kernels over packed vectors. Each makes one launch on `stream` of the
// current device; all pointers are the device's. Records as in common/, but for what is written
// here.
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

// MomentsArgs::ids is sorted; `order` holds its rows. A row whose id is outside [0, K) counts
// nowhere. `scratch` and `tickets` hold what moments_parts asks for.
struct MomentsScratch {
  const int64_t* order;
  int parts;
  double* table;      // (K, parts, 5) with more than one part
  unsigned* tickets;  // (K)
};
int moments_parts(int64_t rows, int64_t segments);
cudaError_t segment_moments(const MomentsArgs& args, const MomentsScratch& scratch,
                            cudaStream_t stream);

cudaError_t gae(const ScanArgs& args, cudaStream_t stream);
cudaError_t vtrace(const ScanArgs& args, cudaStream_t stream);

// args.scratch: 3 per block of kWhitenBlock rows.
cudaError_t whiten(const WhitenArgs& args, cudaStream_t stream);

// args.scratch: 10 per block of kOpeBlock rows.
cudaError_t ope(const OpeArgs& args, cudaStream_t stream);

// Groups as `groups` has them; args.ids is not read.
cudaError_t group_advantage(const GroupAdvantageArgs& args, const SortedIds& groups,
                            cudaStream_t stream);

// `ess` receives the effective sample size. args.partial: 5 S. Groups as above, only for kGroup.
cudaError_t offpolicy_weights(const OffPolicyArgs& args, const SortedIds& groups, float* ess,
                              cudaStream_t stream);

// `partial` holds policy_partials(tokens, seqs) numbers.
int64_t policy_partials(int64_t tokens, int64_t seqs);
cudaError_t policy_loss(const ObjectiveArgs& args, double* partial, cudaStream_t stream);

// What sequences mean for their tokens: (S) counts, and (T) vectors or null where not wanted.
struct PrepareArgs {
  int64_t seqs;
  const int32_t* cu_seqlens;   // (S + 1)
  const uint8_t* mask;         // (T) or null
  const float* seq_advantage;  // (S) or null
  int32_t* counts;             // (S) valid tokens of each sequence
  float* agg_weight;           // (T) 1 / valid tokens of its sequence, or null
  float* advantage;            // (T), with seq_advantage
};
cudaError_t policy_prepare(const PrepareArgs& args, cudaStream_t stream);

// What a row kernel left of each token, and the metrics of all; (T) each, or null where "or null".
struct TokenResults {
  int64_t tokens;
  const float* logp;
  const float* entropy;
  const float* old_logp;
  const float* ref_logp;  // or null
  const uint8_t* mask;    // or null
  const float* token_loss;
  const float* d_logp;
  const float* d_entropy;
  const float* ratio;
  const int32_t* flags;
  const int32_t* counts;  // (S) valid tokens of each sequence, or null: sequences are not counted
  int64_t seqs;           // S
};
// `partial` holds policy_partials(tokens, 0) numbers, `metrics` kMetricCount.
cudaError_t policy_metrics(const TokenResults& results, double* partial, double* metrics,
                           cudaStream_t stream);

// out (S, R, R) = sum over the tokens of each sequence of left_t right_t^T.
struct SketchArgs {
  int64_t tokens, seqs, rank;
  const float* left;          // (T, R)
  const float* right;         // (T, R)
  const int32_t* cu_seqlens;  // (S + 1)
  float* out;                 // (S, R, R)
};
cudaError_t sketch(const SketchArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace tokfuse
