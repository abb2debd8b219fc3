// The CPU kernels of log-probs at a few ids per row.
#pragma once

#include "cpu/kernels.h"

namespace tokfuse {

// A column of a row that a gradient arrives at.
struct IdEntry {
  int64_t column;
  double incoming;  // d loss / d log p of the column
  float logp;
  float grad;  // d loss / d logit
};

// Working memory of the backward: for each thread as many entries as the longest row needs, and a
// hash table of at least twice as many places.
struct IdsScratch {
  IdEntry* entries;
  int32_t* table;
  int64_t num_entries, table_size;
};

#define TOKFUSE_DECLARE_IDS_KERNELS(isa)                                                           \
  namespace isa {                                                                                  \
  /* first unmasked row with a target or temperature out of range, or an id outside [-1, V); -1 */ \
  int64_t ids_bad_row(const LogitsArgs& args, const IdsArgs& ids);                                 \
  void token_stats_at_fwd(const LogitsArgs& args, const TokenStatsOut& out, const IdsArgs& ids);   \
  void token_stats_at_bwd(const LogitsArgs& args, const TokenStatsGrad& grad, const IdsArgs& ids,  \
                          const IdsScratch& scratch);                                              \
  }

#if defined(TOKFUSE_ISA_LEVELS)
TOKFUSE_DECLARE_IDS_KERNELS(isa_v2)
TOKFUSE_DECLARE_IDS_KERNELS(isa_v3)
TOKFUSE_DECLARE_IDS_KERNELS(isa_v4)
#else
TOKFUSE_DECLARE_IDS_KERNELS(isa_base)
#endif

}  // namespace tokfuse
