// Argument structs of the ends of a policy objective on CUDA: the loss, and the count of a batch.
//
// Shapes in comments: T tokens, S sequences. docs/names.md defines every field.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace tokfuse {

// CUDA. Where the kernel that writes the metric sums also writes the loss.
struct LossArgs {
  double inv_normalizer;  // as in ObjectiveArgs
  int normalize_by_seqs;  // as in ObjectiveArgs
  float* loss;            // ()
  float* loss_sum;        // () loss before the division by the normaliser
};

// CUDA. Counts the tokens or the sequences that normalise a batch.
struct CountArgs {
  int64_t tokens, seqs;
  const uint8_t* mask;          // (T) or null; not read with counts
  const int32_t* counts;        // (S) valid tokens of each sequence; null: count tokens
  float* batch_inv_normalizer;  // () 1 / count; 0 if the count is 0
};

// Returns the loss before the division by the normaliser. `count` normalises it if inv_normalizer
// is negative.
TOKFUSE_HD float undivided_loss(float loss, double inv_normalizer, double count) {
  if (inv_normalizer < 0) return loss * static_cast<float>(count);
  return loss / static_cast<float>(inv_normalizer);
}

}  // namespace tokfuse
