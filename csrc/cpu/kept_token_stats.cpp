// kept_token_stats: log-probability, entropy and log-sum-exp over the kept ids of each row, and
// their gradient. The gradient is zero for all other columns.
//
// Bytes per row with k kept ids: the forward gathers k * (8 + sizeof(T)); the backward gathers the
// same and writes V * sizeof(T). Both compute one exponential per kept id.
#include <omp.h>

#include "cpu/distribution_kernels.h"
#include "cpu/row_gradient.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

struct KeptRow {
  const int64_t* ids;
  int64_t count;
};

KeptRow kept_of(const KeptArgs& a, int64_t t) {
  return {a.ids + a.offsets[t], a.offsets[t + 1] - a.offsets[t]};
}

int threads_for_kept(const KeptArgs& a) {
  const int64_t kept = a.logits.rows > 0 ? a.offsets[a.logits.rows] : 0;
  return kept < kSerialElements / 4 ? 1 : a.logits.threads;
}

template <class T, bool kTransform>
float kept_logit(const Row<T>& row, const Transform& f, int64_t id) {
  const float z = load(row.z, id);
  if (!kTransform) return z;
  const float u = z * f.pre;
  return f.cap == 0.0f || u == -kInf ? u : f.cap * tanh_simd(u);  // an excluded logit stays -inf
}

// Returns the largest kept logit, or -inf without one. A NaN is ignored here; the sums keep it.
template <class T, bool kTransform>
float kept_max(const Row<T>& row, const Transform& f, const KeptRow& kept) {
  float m = -kInf;
  for (int64_t k = 0; k < kept.count; k++) {
    const float u = kept_logit<T, kTransform>(row, f, kept.ids[k]);
    m = u > m ? u : m;
  }
  return m;
}

// Stores the kept logits minus `max` as float32 in `buffer`.
template <class T, bool kTransform>
void gather(const Row<T>& row, const Transform& f, const int64_t* ids, int64_t n, float max,
            float* buffer) {
  for (int64_t k = 0; k < n; k++) buffer[k] = kept_logit<T, kTransform>(row, f, ids[k]) - max;
}

// Returns the position of the target among the kept ids, or -1.
int64_t find_target(const KeptRow& kept, int64_t target) {
  for (int64_t k = 0; k < kept.count; k++) {
    if (kept.ids[k] == target) return k;
  }
  return -1;
}

template <class T, bool kTransform>
void forward_row(const KeptArgs& a, const TokenStatsOut& o, const Transform& f, int64_t t) {
  const Row<T> row = row_of<T>(a.logits, t);
  const KeptRow kept = kept_of(a, t);
  const float c = base2_scale(a.logits, temperature_of(a.logits, t));
  const int64_t at = find_target(kept, row.target);
  // Two gathers: the second one finds the cache lines of the first.
  float m = kept_max<T, kTransform>(row, f, kept);
  if (m == -kInf) m = 0.0f;  // -inf - -inf would be NaN
  alignas(64) float buffer[kBlock];
  Accumulator<false> acc;
  acc.shift = 0.0f;
  float target_u = -kInf;
  for (int64_t begin = 0; begin < kept.count; begin += kBlock) {
    const int64_t left = kept.count - begin, n = left < kBlock ? left : kBlock;
    gather<T, kTransform>(row, f, kept.ids + begin, n, m, buffer);
    if (at >= begin && at < begin + n) {
      target_u = buffer[at - begin];
      buffer[at - begin] = -kInf;  // the sums exclude the target, see rows.h
    }
    sum_block<false>(buffer, n, c, 0.0f, acc);
  }
  const RowStats r = finish<false>(acc, c, target_u, 0.0f);
  o.logp[t] = at < 0 ? -kInf : static_cast<float>(r.logp);
  o.entropy[t] = static_cast<float>(r.entropy);
  o.lse[t] = static_cast<float>(r.lse + kLn2 * static_cast<double>(m) * c);
  o.row_max[t] = m;
  o.inv_sum[t] = r.inv_sum;
}

template <class T, bool kTransform>
void forward(const KeptArgs& a, const TokenStatsOut& o) {
  const Transform f = transform_of(a.logits);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for_kept(a))
  for (int64_t t = 0; t < a.logits.rows; t++) {
    if (masked(a.logits, t)) {
      o.logp[t] = o.entropy[t] = o.lse[t] = o.row_max[t] = o.inv_sum[t] = 0.0f;
    } else {
      forward_row<T, kTransform>(a, o, f, t);
    }
  }
}

// Scatters du = e (a0 + a1 x) (formula in rows.h) to the kept columns.
template <class T, bool kTransform>
void backward_row(const KeptArgs& a, const TokenStatsGrad& g, const Transform& f, int64_t t) {
  T* out = static_cast<T*>(g.grad_logits) + t * g.grad_stride;
  memset(static_cast<void*>(out), 0, static_cast<size_t>(a.logits.vocab) * sizeof(T));
  if (masked(a.logits, t) || g.inv_sum[t] == 0.0f) return;
  const Row<T> row = row_of<T>(a.logits, t);
  const KeptRow kept = kept_of(a, t);
  const int64_t at = find_target(kept, row.target);
  // A target outside the support has logp = -inf for any logits, so its gradient is 0.
  const float ga = at < 0 || g.grad_logp == nullptr ? 0.0f : g.grad_logp[t];
  const float gh = g.grad_entropy == nullptr ? 0.0f : g.grad_entropy[t];
  const float gl = g.grad_lse == nullptr ? 0.0f : g.grad_lse[t];
  if (ga == 0.0f && gh == 0.0f && gl == 0.0f) return;
  const float temperature = temperature_of(a.logits, t), inv_sum = g.inv_sum[t];
  const float c = base2_scale(a.logits, temperature), scale = a.logits.logit_scale / temperature;
  const double ln_s = -::log(static_cast<double>(inv_sum));
  const float a0 = static_cast<float>(-scale * inv_sum * (ga - gl + gh * (g.entropy[t] - ln_s)));
  const float a1 = static_cast<float>(-scale * inv_sum * gh * kLn2);
  alignas(64) float buffer[kBlock];
  for (int64_t begin = 0; begin < kept.count; begin += kBlock) {
    const int64_t left = kept.count - begin, n = left < kBlock ? left : kBlock;
    gather<T, kTransform>(row, f, kept.ids + begin, n, g.row_max[t], buffer);
    gradient_block(buffer, n, c, 0.0f, a0, a1, buffer);
    if (at >= begin && at < begin + n) {
      buffer[at - begin] = target_gradient(scale, g.logp[t], g.entropy[t], ga, gh, gl);
    }
    for (int64_t k = 0; k < n; k++) {
      const int64_t j = kept.ids[begin + k];
      const float tanh_u = f.cap != 0.0f ? tanh_simd(load(row.z, j) * f.pre) : 0.0f;
      store(out, j, buffer[k] * (1.0f - tanh_u * tanh_u));
    }
  }
}

template <class T, bool kTransform>
void backward(const KeptArgs& a, const TokenStatsGrad& g) {
  const Transform f = transform_of(a.logits);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(a.logits))
  for (int64_t t = 0; t < a.logits.rows; t++) backward_row<T, kTransform>(a, g, f, t);
}

// True if row t is valid. `seen` is all zero before and after the call.
bool row_is_good(const KeptArgs& a, int64_t t, uint64_t* seen) {
  const int64_t target = a.logits.target[t], vocab = a.logits.vocab;
  if (target < 0 || target >= vocab || !(temperature_of(a.logits, t) > 0.0f)) return false;
  const KeptRow kept = kept_of(a, t);
  int64_t good = 0;
  for (; good < kept.count; good++) {
    const int64_t id = kept.ids[good];
    if (id < 0 || id >= vocab) break;
    const uint64_t bit = uint64_t{1} << (id & 63);
    if (seen[id >> 6] & bit) break;
    seen[id >> 6] |= bit;
  }
  for (int64_t k = 0; k < good; k++) seen[kept.ids[k] >> 6] = 0;
  return good == kept.count;
}

}  // namespace

int64_t kept_bad_row(const KeptArgs& a) {
  int64_t bad = a.logits.rows;
  const int64_t words = kept_seen_words(a.logits.vocab);
#pragma omp parallel for schedule(static) reduction(min : bad) num_threads(threads_for_kept(a))
  for (int64_t t = 0; t < a.logits.rows; t++) {
    if (masked(a.logits, t) || row_is_good(a, t, a.seen + omp_get_thread_num() * words)) continue;
    bad = t < bad ? t : bad;
  }
  return bad == a.logits.rows ? -1 : bad;
}

void kept_token_stats_fwd(const KeptArgs& a, const TokenStatsOut& o) {
  by_dtype(a.logits, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    has_transform(a.logits) ? forward<T, true>(a, o) : forward<T, false>(a, o);
  });
}

void kept_token_stats_bwd(const KeptArgs& a, const TokenStatsGrad& g) {
  by_dtype(a.logits, [&](auto* tag) {
    using T = typename RemovePointer<decltype(tag)>::type;
    has_transform(a.logits) ? backward<T, true>(a, g) : backward<T, false>(a, g);
  });
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
