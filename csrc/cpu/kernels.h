// Argument records of the CPU kernels, and the kernels of each instruction-set level.
//
// Shapes in comments: T tokens, V vocabulary, S sequences. "or null" marks optional pointers.
// Strides and offsets are 64-bit element counts. The binding layer has checked sizes and codes; the
// functions here trust them.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/objective_args.h"

namespace tokfuse {

// Logits and everything that turns them into a distribution.
struct LogitsArgs {
  const void* logits;         // (T, V)
  int64_t stride;             // elements between rows
  int64_t tile;               // 0: rows in one piece; else columns come in tiles of this many
  int64_t tile_stride;        // elements between tiles
  DType dtype;                //
  int64_t tokens, vocab;      // rows and columns of the logits
  const int64_t* index;       // (rows) or null: logits row i belongs to token index[i]
  int64_t total;              // T; equals tokens without an index
  const int64_t* target;      // (T)
  const uint8_t* mask;        // (T) or null: 0 = row is not read
  const float* temperatures;  // (T) or null
  float temperature;          // used when temperatures is null
  float softcap;              // 0: none
  float logit_scale;          //
  const void* bias_logits;    // (T, V) same dtype, or null
  int64_t bias_stride;        //
  float bias_scale;           //
  int threads;                //
};

struct TokenStatsOut {
  float* logp;         // (T)
  float* entropy;      // (T)
  float* lse;          // (T)
  float* sum_sq;       // (T)
  float* top1;         // (T)
  float* shift;        // (T) base-2 row maximum      } what the gradient
  float* inv_sum;      // (T) 1 / sum of exponentials } needs besides the logits
  float* p2_logp;      // (T) or null: sum p^2 log p
  float* p2_logp2;     // (T) or null: sum p^2 log^2 p
  float* second_logp;  // (T) or null: logp at `second_temperature`
  float second_temperature;
};

struct TokenStatsGrad {
  const float* shift;         // (T)
  const float* inv_sum;       // (T)
  const float* logp;          // (T)
  const float* entropy;       // (T)
  const float* grad_logp;     // (T) or null
  const float* grad_entropy;  // (T) or null
  void* grad_logits;          // (T, V), dtype of the logits; may be the logits themselves
  int64_t grad_stride;        //
};

// Target checks that need values: index of the first bad row, or -1.
#define TOKFUSE_DECLARE_KERNELS(isa)                                                       \
  namespace isa {                                                                          \
  int64_t first_bad_row(const LogitsArgs& args);                                           \
  void token_stats_fwd(const LogitsArgs& args, const TokenStatsOut& out);                  \
  void token_stats_bwd(const LogitsArgs& args, const TokenStatsGrad& grad);                \
  void policy_loss(const ObjectiveArgs& args);                                             \
  void policy_prepare(const ObjectiveArgs& args);                                          \
  void policy_metrics(const ObjectiveArgs& args);                                          \
  void policy_rows(const LogitsArgs& args, const TokenStatsOut& out,                       \
                   const ObjectiveArgs& objective, void* grad_logits, int64_t grad_stride, \
                   bool fill_zeros);                                                       \
  int64_t keep_gradient_rows(const LogitsArgs& args, const ObjectiveArgs& objective,       \
                             int64_t* kept);                                               \
  }

// One level only: on other machines, and in builds with sanitizers, where three take minutes.
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

// Calls `function` of the instruction-set level chosen at load time.
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
