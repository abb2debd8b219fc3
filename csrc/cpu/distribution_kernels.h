// Declarations of kept_token_stats and paired_divergence.
#pragma once

#include "cpu/kernels.h"

namespace tokfuse {

// Words of KeptArgs::seen for each thread: one bit per column.
inline int64_t kept_seen_words(int64_t vocab) { return (vocab + 63) / 64; }

#define TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa)                                             \
  namespace isa {                                                                             \
  /* returns the first unmasked row with an invalid target, temperature or kept id, or -1; */ \
  /* an id that occurs twice in a row is invalid */                                           \
  int64_t kept_bad_row(const KeptArgs& args);                                                 \
  void kept_token_stats_fwd(const KeptArgs& args, const TokenStatsOut& out);                  \
  void kept_token_stats_bwd(const KeptArgs& args, const TokenStatsGrad& grad);                \
  void paired_divergence_fwd(const DivergenceArgs& args, const DivergenceOut& out);           \
  void paired_divergence_bwd(const DivergenceArgs& args, const DivergenceGrad& grad);         \
  void distill_rows(const DistillArgs& args, const DistillOut& out, const DistillGrad& grad); \
  }

#if defined(TOKFUSE_ISA_LEVELS)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v2)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v3)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v4)
#else
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_base)
#endif

}  // namespace tokfuse
