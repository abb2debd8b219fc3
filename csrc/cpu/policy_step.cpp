// policy_step from logits for token-level objectives: statistics, objective and gradient of a row
// are computed one after the other, before the next row. The row is read from memory once. The
// gradient sweep finds the row, and the exponentials of the first sweep, in the L2 cache.
//
// Bytes per row: V * sizeof(T) read, V * sizeof(T) written. Exponentials per element: 1. Scratch
// memory: 4 bytes per column and thread.
#include <stdlib.h>

#include "cpu/objective_tokens.h"
#include "cpu/row_gradient.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

bool has_gradient(const ObjectiveArgs& obj, int64_t t) {
  return obj.d_logp[t] != 0.0f || obj.d_entropy[t] != 0.0f;
}

template <class T, bool kTransform>
void step(const LogitsArgs& a, const TokenStatsOut& o, const ObjectiveArgs& obj,
          const GradRows& grad) {
  const Transform f = transform_of(a);
  const int64_t blocks = (a.vocab + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads_for(a))
  {
    // If the allocation fails (null), the exponentials are computed twice.
    float* work = static_cast<float*>(
        aligned_alloc(64, static_cast<size_t>(blocks * kBlock + (blocks + 15) / 16 * 16) * 4));
    const KeptExps kept = {work, work + blocks * kBlock};
#pragma omp for schedule(guided, 2)
    for (int64_t i = 0; i < a.rows; i++) {
      const int64_t t = token_of(a, i);
      const Row<T> row = row_of<T>(a, i);
      const float temperature = temperature_of(a, t), c = base2_scale(a, temperature);
      RowStats stats = {};
      if (!masked(a, t)) {
        stats = work == nullptr
                    ? row_forward<T, kTransform, false>(row, f, c)
                    : row_forward<T, kTransform, false, true>(row, f, c, nullptr, 0, kept);
      }
      write_row(o, t, stats);
      token_objective_at(obj, t, o.logp[t], o.entropy[t]);
      // With grad_tokens, keep_gradient_rows drops a row without gradient, so it needs no zeros.
      if (grad.grad_tokens != nullptr && !has_gradient(obj, t)) continue;
      row_backward<T, kTransform>(row, f, c, a.logit_scale / temperature, stats.shift,
                                  stats.inv_sum, o.logp[t], o.entropy[t], obj.d_logp[t],
                                  obj.d_entropy[t],
                                  static_cast<T*>(grad.grad_logits) + i * grad.grad_stride,
                                  work == nullptr ? nullptr : &kept);
    }
    free(work);
  }
}

}  // namespace

void policy_prepare(const ObjectiveArgs& obj) { objective_prepare(obj); }

void policy_metrics(const ObjectiveArgs& obj) { objective_metrics(obj); }

void policy_rows(const LogitsArgs& a, const TokenStatsOut& o, const ObjectiveArgs& obj,
                 const GradRows& grad) {
  by_dtype(a, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    has_transform(a) ? step<T, true>(a, o, obj, grad) : step<T, false>(a, o, obj, grad);
  });
}

// Moves the float32 rows with a gradient to the front of the buffer and lists their tokens in
// grad_tokens. Returns their number n, or -1 if memory is exhausted. Such rows among the first n
// stay in place; later ones are copied over the rows without gradient there. This takes at most
// min(n, rows - n) row copies.
int64_t keep_gradient_rows(const LogitsArgs& a, const ObjectiveArgs& obj, int64_t* grad_tokens) {
  int64_t n = 0;
  for (int64_t i = 0; i < a.rows; i++) n += has_gradient(obj, token_of(a, i));
  // Pairs (row to copy, row that it replaces).
  int64_t from = n, holes = 0;
  int64_t* moved = static_cast<int64_t*>(malloc(static_cast<size_t>(n) * 2 * sizeof(int64_t)));
  if (n > 0 && moved == nullptr) return -1;
  for (int64_t i = 0; i < n; i++) {
    grad_tokens[i] = token_of(a, i);
    if (has_gradient(obj, grad_tokens[i])) continue;
    while (!has_gradient(obj, token_of(a, from))) from++;
    grad_tokens[i] = token_of(a, from);
    moved[2 * holes] = from++;
    moved[2 * holes++ + 1] = i;
  }
  float* rows = static_cast<float*>(const_cast<void*>(a.logits));
  const int64_t piece = a.tile > 0 ? a.tile : a.vocab;
#pragma omp parallel for schedule(static) num_threads(threads_for(a))
  for (int64_t k = 0; k < holes; k++) {
    for (int64_t begin = 0; begin < a.vocab; begin += piece) {
      const int64_t width = a.vocab - begin < piece ? a.vocab - begin : piece;
      float* tile = rows + begin / piece * a.tile_stride;
      memcpy(tile + moved[2 * k + 1] * a.stride, tile + moved[2 * k] * a.stride,
             static_cast<size_t>(width) * 4);
    }
  }
  free(moved);
  return n;
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
