// token_stats. The forward computes log-probability, entropy, log-sum-exp, sum of squared
// probabilities and top-1 hit of every row in one read. The backward computes the gradient of logp,
// entropy, lse and logit_sum in one read and one write.
//
// Bytes per row: forward V * sizeof(T); backward 2 V * sizeof(T), or V * sizeof(T) of zeros for a
// row without gradient. Exponentials per element: 1 forward, 1 backward.
//
// Threads work on whole rows. They take several consecutive rows at a time (schedule guided),
// because the last step of a row prefetches the next one. This saves 10% for bfloat16 rows that are
// not in a cache.
#include "cpu/row_gradient.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

// Returns sum_j weight_j u_j. Called after the statistics of the row, while it is in the cache.
template <class T, bool kTransform>
double logit_sum(const Row<T>& row, const Transform& f, const float* weight) {
  alignas(64) float u[kBlock];
  double sum = 0.0;
  for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
    const int64_t n = row.vocab - begin < kBlock ? row.vocab - begin : kBlock;
    convert_block<T, kTransform>(row, f, begin, n, u);
    sum += weighted_sum(u, weight == nullptr ? nullptr : weight + begin, n);
  }
  return sum;
}

template <class T, bool kTransform, bool kMoments>
void forward(const LogitsArgs& a, const TokenStatsOut& o) {
  const Transform f = transform_of(a);
  const RowStats zero = {};
#pragma omp parallel for schedule(guided, 2) num_threads(threads_for(a))
  for (int64_t i = 0; i < a.rows; i++) {
    const int64_t t = token_of(a, i);
    if (masked(a, t)) {
      write_row(o, t, zero);
      if (o.second_logp != nullptr) o.second_logp[t] = 0.0f;
      if (o.logit_sum != nullptr) o.logit_sum[t] = 0.0f;
      continue;
    }
    const float c = base2_scale(a, temperature_of(a, t));
    RowStats second;
    RowStats* wanted = o.second_logp != nullptr ? &second : nullptr;
    const float c2 = wanted != nullptr ? base2_scale(a, o.second_temperature) : 0.0f;
    write_row(o, t, row_forward<T, kTransform, kMoments>(row_of<T>(a, i), f, c, wanted, c2));
    if (wanted != nullptr) o.second_logp[t] = static_cast<float>(second.logp);
    if (o.logit_sum != nullptr) {
      const double sum = logit_sum<T, kTransform>(row_of<T>(a, i), f, o.class_weight);
      o.logit_sum[t] = static_cast<float>(kLn2 * c * sum);
    }
  }
}

template <class T, bool kTransform>
void backward(const LogitsArgs& a, const TokenStatsGrad& g) {
  const Transform f = transform_of(a);
#pragma omp parallel for schedule(guided, 2) num_threads(threads_for(a))
  for (int64_t i = 0; i < a.rows; i++) {
    const int64_t t = token_of(a, i);
    const bool skip = masked(a, t);
    const float ga = skip || g.grad_logp == nullptr ? 0.0f : g.grad_logp[t];
    const float gh = skip || g.grad_entropy == nullptr ? 0.0f : g.grad_entropy[t];
    const FurtherTerms more = {skip || g.grad_lse == nullptr ? 0.0f : g.grad_lse[t],
                               skip || g.grad_logit_sum == nullptr ? 0.0f : g.grad_logit_sum[t],
                               g.class_weight};
    const float temperature = temperature_of(a, t);
    row_backward<T, kTransform>(row_of<T>(a, i), f, base2_scale(a, temperature),
                                a.logit_scale / temperature, g.row_max[t], g.inv_sum[t], g.logp[t],
                                g.entropy[t], ga, gh,
                                static_cast<T*>(g.grad_logits) + i * g.grad_stride, nullptr, more);
  }
}

}  // namespace

int64_t first_bad_row(const LogitsArgs& a) {
  for (int64_t i = 0; i < a.rows; i++) {
    const int64_t t = token_of(a, i);
    if (masked(a, t)) continue;
    const bool target_ok = a.target[t] >= 0 && a.target[t] < a.vocab;
    if (!target_ok || !(temperature_of(a, t) > 0.0f)) return t;
  }
  return -1;
}

void token_stats_fwd(const LogitsArgs& a, const TokenStatsOut& o) {
  by_dtype(a, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    const bool moments = o.sum_p2_logp != nullptr;
    if (has_transform(a)) {
      moments ? forward<T, true, true>(a, o) : forward<T, true, false>(a, o);
    } else {
      moments ? forward<T, false, true>(a, o) : forward<T, false, false>(a, o);
    }
  });
}

void token_stats_bwd(const LogitsArgs& a, const TokenStatsGrad& g) {
  by_dtype(a, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    has_transform(a) ? backward<T, true>(a, g) : backward<T, false>(a, g);
  });
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
