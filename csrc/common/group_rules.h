// The divisor of the advantages of a prompt group. Shared by the CPU and CUDA kernels.
#pragma once

#include "common/objective.h"
#include "common/packed_args.h"

namespace tokfuse {

TOKFUSE_HD double group_divisor(const GroupAdvantageArgs& a, double group_std, double batch_std,
                                double mean) {
  switch (a.scale) {
    case Scale::kStd:
      return group_std + a.eps;
    case Scale::kBatchStd:
      return batch_std + a.eps;
    case Scale::kMean:
      return mean + a.eps;
    case Scale::kNone:
      break;
  }
  return 1;
}

// Returns the advantage of the only row of a group, which has reward x.
TOKFUSE_HD double singleton_advantage(const GroupAdvantageArgs& a, double x, double batch_std) {
  if (!a.singleton_reward) return x == x ? 0.0 : x;
  if (a.scale == Scale::kBatchStd) return x / (batch_std + a.eps);
  return a.scale == Scale::kNone ? x : x / (1 + a.eps);
}

}  // namespace tokfuse
