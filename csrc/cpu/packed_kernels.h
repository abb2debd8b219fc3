// Declarations of the CPU kernels over packed vectors: advantages, scans, moments, off-policy
// weights.
#pragma once

#include <cstdint>

#include "common/packed_args.h"
#include "cpu/kernels.h"

namespace tokfuse {

// Returns the int64 elements of scratch memory that group_rows needs (csrc/cpu/grouping.h).
inline int64_t grouping_scratch(int64_t rows) {
  int64_t slots = 16;
  while (slots < 2 * rows) slots *= 2;
  return 3 * rows + 1 + 2 * slots;
}

#define TOKFUSE_DECLARE_PACKED_KERNELS(isa)                           \
  namespace isa {                                                     \
  void group_advantage(const GroupAdvantageArgs& args);               \
  void gae(const GaeArgs& args);                                      \
  void vtrace(const VtraceArgs& args);                                \
  void whiten(const WhitenArgs& args);                                \
  void ope(const OpeArgs& args);                                      \
  /* returns the first valid row whose id is outside [0, K), or -1 */ \
  int64_t segment_moments(const MomentsArgs& args);                   \
  /* returns the effective sample size */                             \
  double offpolicy_weights(const OffPolicyArgs& args);                \
  }

#if defined(TOKFUSE_ISA_LEVELS)
TOKFUSE_DECLARE_PACKED_KERNELS(isa_v2)
TOKFUSE_DECLARE_PACKED_KERNELS(isa_v3)
TOKFUSE_DECLARE_PACKED_KERNELS(isa_v4)
#else
TOKFUSE_DECLARE_PACKED_KERNELS(isa_base)
#endif

}  // namespace tokfuse
