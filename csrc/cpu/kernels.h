// Declarations of the CPU kernels over rows of logits. Their argument structs are in common/.
#pragma once

#include <cstdint>

#include "common/objective_args.h"
#include "common/row_args.h"

namespace tokfuse {

// first_bad_row returns the first token whose target or temperature is out of range, or -1.
// keep_gradient_rows returns the number of rows with a gradient, or -1 if memory is exhausted.
#define TOKFUSE_DECLARE_KERNELS(isa)                                                 \
  namespace isa {                                                                    \
  int64_t first_bad_row(const LogitsArgs& args);                                     \
  void token_stats_fwd(const LogitsArgs& args, const TokenStatsOut& out);            \
  void token_stats_bwd(const LogitsArgs& args, const TokenStatsGrad& grad);          \
  void policy_loss(const ObjectiveArgs& args);                                       \
  void policy_prepare(const ObjectiveArgs& args);                                    \
  void policy_metrics(const ObjectiveArgs& args);                                    \
  void policy_rows(const LogitsArgs& args, const TokenStatsOut& out,                 \
                   const ObjectiveArgs& objective, const GradRows& grad);            \
  int64_t keep_gradient_rows(const LogitsArgs& args, const ObjectiveArgs& objective, \
                             int64_t* grad_tokens);                                  \
  }

// A build has three instruction-set levels on x86-64, else one. A build with sanitizers also has
// one, because three take minutes to compile.
#if defined(__x86_64__) && !defined(TOKFUSE_ONE_ISA)
#define TOKFUSE_ISA_LEVELS
#endif

#if defined(TOKFUSE_ISA_LEVELS)
TOKFUSE_DECLARE_KERNELS(isa_v2)
TOKFUSE_DECLARE_KERNELS(isa_v3)
TOKFUSE_DECLARE_KERNELS(isa_v4)
#else
TOKFUSE_DECLARE_KERNELS(isa_base)
#endif

// TOKFUSE_CALL calls `function` of the instruction-set level that was selected at load time.
enum class Isa { kBase, kV2, kV3, kV4 };
Isa active_isa();

#if defined(TOKFUSE_ISA_LEVELS)
#define TOKFUSE_CALL(function, ...)                                                            \
  (::tokfuse::active_isa() == ::tokfuse::Isa::kV4   ? ::tokfuse::isa_v4::function(__VA_ARGS__) \
   : ::tokfuse::active_isa() == ::tokfuse::Isa::kV3 ? ::tokfuse::isa_v3::function(__VA_ARGS__) \
                                                    : ::tokfuse::isa_v2::function(__VA_ARGS__))
#else
#define TOKFUSE_CALL(function, ...) ::tokfuse::isa_base::function(__VA_ARGS__)
#endif

}  // namespace tokfuse
