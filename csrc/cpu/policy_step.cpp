// policy_step from logits, token-level objectives: statistics, objective and gradient of each row
// in one visit. The row is read from memory once; the gradient sweep finds it in the L2 cache.
//
// Bytes per row: V * sizeof(T) read and as much written. Exponentials per element: 2, or 1 where
// the final coefficient of the row is zero.
#include "cpu/objective_tokens.h"
#include "cpu/rows.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

template <class T, bool kTransform>
void step(const LogitsArgs& a, const TokenStatsOut& o, const ObjectiveArgs& obj, T* grad,
          int64_t grad_stride) {
  const Transform f = transform_of(a);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(a))
  for (int64_t t = 0; t < a.tokens; t++) {
    const Row<T> row = row_of<T>(a, t);
    const float temperature = temperature_of(a, t), c = base2_scale(a, temperature);
    RowStats stats = {};
    if (!masked(a, t)) stats = row_forward<T, kTransform, false>(row, f, c);
    write_row(o, t, stats);
    token_objective_at(obj, t, o.logp[t], o.entropy[t]);
    row_backward<T, kTransform>(row, f, c, a.logit_scale / temperature, stats.shift, stats.inv_sum,
                                static_cast<float>(stats.entropy), obj.d_logp[t], obj.d_entropy[t],
                                grad + t * grad_stride);
  }
}

}  // namespace

void policy_step(const LogitsArgs& a, const TokenStatsOut& o, const ObjectiveArgs& obj, void* grad,
                 int64_t grad_stride) {
  objective_prepare(obj);
  by_dtype(a, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    has_transform(a) ? step<T, true>(a, o, obj, static_cast<T*>(grad), grad_stride)
                     : step<T, false>(a, o, obj, static_cast<T*>(grad), grad_stride);
  });
  objective_metrics(obj);
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
