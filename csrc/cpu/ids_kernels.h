// The CPU kernels of log-probs at a few ids per row.
#pragma once

#include "cpu/kernels.h"

namespace tokfuse {

// Working memory of the backward. Each thread has as many columns as the longest row needs, and a
// hash table of at least four times as many places. With twice as many, a fifth of the insertions
// meet another column, which costs a mispredicted branch each time.
struct IdsScratch {
  int64_t* column;
  double* incoming;  // d loss / d log p of the column
  float* logp;
  float* grad;     // d loss / d logit
  int32_t* table;  // place of a column, or -1
  int64_t num_columns, table_size;
};

// Both functions return the first unmasked row with an id outside [-1, V), or -1 after a complete
// run. The caller has checked the targets and temperatures.
#define TOKFUSE_DECLARE_IDS_KERNELS(isa)                                         \
  namespace isa {                                                                \
  int64_t token_stats_at_fwd(const LogitsArgs& args, const TokenStatsOut& out,   \
                             const IdsArgs& ids);                                \
  int64_t token_stats_at_bwd(const LogitsArgs& args, const TokenStatsGrad& grad, \
                             const IdsArgs& ids, const IdsScratch& scratch);     \
  }

#if defined(TOKFUSE_ISA_LEVELS)
TOKFUSE_DECLARE_IDS_KERNELS(isa_v2)
TOKFUSE_DECLARE_IDS_KERNELS(isa_v3)
TOKFUSE_DECLARE_IDS_KERNELS(isa_v4)
#else
TOKFUSE_DECLARE_IDS_KERNELS(isa_base)
#endif

}  // namespace tokfuse
