// The CPU kernels of log-probs at a few ids per row.
#pragma once

#include "cpu/kernels.h"

namespace tokfuse {

// Places of the hash table for a row with this many columns: a power of two, at least four times as
// many. With twice as many, a fifth of the insertions meet another column, which costs a
// mispredicted branch each time.
inline int64_t table_places(int64_t columns) {
  int64_t places = 4;
  while (places < 4 * columns) places *= 2;
  return places;
}

// Working memory of the backward. Each thread has the columns and the table of the longest row.
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
