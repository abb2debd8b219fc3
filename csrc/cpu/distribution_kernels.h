// The CPU kernels that compare or restrict whole distributions.
#pragma once

#include "cpu/kernels.h"

namespace tokfuse {

inline int64_t kept_seen_words(int64_t vocab) { return (vocab + 63) / 64; }

#define TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa)                                                 \
  namespace isa {                                                                                 \
  /* first unmasked row with a target, temperature or kept id out of range, or an id twice; -1 */ \
  int64_t kept_bad_row(const KeptArgs& args);                                                     \
  void kept_token_stats_fwd(const KeptArgs& args, const TokenStatsOut& out);                      \
  void kept_token_stats_bwd(const KeptArgs& args, const TokenStatsGrad& grad);                    \
  void paired_divergence_fwd(const DivergenceArgs& args, const DivergenceOut& out);               \
  void paired_divergence_bwd(const DivergenceArgs& args, const DivergenceGrad& grad);             \
  }

#if defined(TOKFUSE_ISA_LEVELS)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v2)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v3)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v4)
#else
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_base)
#endif

}  // namespace tokfuse
