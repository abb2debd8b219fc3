// token_stats_at: log-probs at a few ids of each row, under the log-sum-exp of token_stats.
//
// Forward: token_stats, then one launch that gathers the ids' logits. The sums of token_stats hold
// the rest of a confident target to its digits, not that of another confident id (rows.cuh). A row
// with such an id, p > 3/4, is summed once more without it.
//
// Backward: with g_j the sum of what arrives at column j, grad_logp at the target included, and
// total = sum_i g_i - grad_lse,
//
//     dz_j = f'(z) / T ( g_j (1 - p_j) - p_j (total - g_j) - gh p_j (log p_j + entropy) ).
//
// A column without g is written by the backward of token_stats, whose coefficient of logp is
// `total`. The others are computed before it, because it may write over the logits, and stored
// after it, so that each is rounded once.
//
// Bytes per id: 44 forward, 96 backward with the sectors; duplicates are found by comparing the ids
// of a row with each other, K^2 of them. An id outside [0, V) that is not -1 gives NaN, and where a
// gradient arrives there its row's gradient is NaN. Offsets outside [0, num_ids] are cut to it.
#pragma once

#include "cuda/gradient.cuh"
#include "cuda/rows.cuh"

namespace tokfuse {
namespace cuda {

constexpr int kIdsThreads = 128;
constexpr float kConfident = -0.28768207f;  // ln 3/4
// Summands that are added up before their sum is added to the whole: a shorter chain of roundings.
constexpr int kPartial = 32;

// Positions of a token's ids.
struct RowIds {
  int64_t begin, end;
};

__device__ __forceinline__ RowIds ids_of(const IdsArgs& ids, int64_t token) {
  const int64_t begin = ids.offsets[token], end = ids.offsets[token + 1];
  return {begin > 0 ? begin : 0, end < ids.num_ids ? end : ids.num_ids};
}

__device__ __forceinline__ bool is_column(int64_t id, int64_t vocab) {
  return id >= 0 && id < vocab;
}

template <class T>
__device__ __forceinline__ const T* bias_row(const LogitsArgs& a, int64_t row) {
  const T* bias = static_cast<const T*>(a.bias_logits);
  return bias != nullptr ? bias + row * a.bias_stride : nullptr;
}

// log p of the most likely column `id`, from the sum of all others; the same in all threads.
template <class T, bool kTransform>
__device__ __forceinline__ float log_prob_alone(const Transform& f, const T* logits, const T* bias,
                                                int64_t vocab, int64_t id, float c,
                                                Array<float, kIdsThreads / kWarp>& shared) {
  const float u_id = element_of<T, kTransform>(f, logits, bias, id).x;
  float sum = 0.0f;
  for (int64_t begin = threadIdx.x; begin < vocab; begin += kPartial * kIdsThreads) {
    float part = 0.0f;
    for (int i = 0; i < kPartial; i++) {
      const int64_t j = begin + i * kIdsThreads;
      if (j >= vocab) break;
      const float u = element_of<T, kTransform>(f, logits, bias, j).x;
      if (j != id) part += exp2_fast((u - u_id) * c);
    }
    sum += part;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) shared[static_cast<int>(threadIdx.x) / kWarp] = sum;
  __syncthreads();
  float rest = 0.0f;
  for (int w = 0; w < kIdsThreads / kWarp; w++) rest += shared[w];
  return -log1pf(rest);
}

template <class T, bool kTransform>
__global__ void __launch_bounds__(kIdsThreads, 8)
    log_probs_at_kernel(const __grid_constant__ LogitsArgs a,
                        const __grid_constant__ TokenStatsOut stats,
                        const __grid_constant__ IdsArgs ids) {
  using Sums = Array<float, kIdsThreads / kWarp>;
  TOKFUSE_SHARED(sums, Array<Sums, 2>);
  const Transform f = transform_of(a);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t token = token_of(a, row), y = a.target[token];
    const bool keep = counts(a, token);
    const RowIds range = ids_of(ids, token);
    const Scale scale = scale_at(a, temperature_of(a, token), kTransform);
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const T* bias = bias_row<T>(a, row);
    const float m = stats.row_max[token], inv_sum = stats.inv_sum[token];
    const float log_s = -logf(inv_sum), logp_y = stats.logp[token];
    int met = 0;
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kIdsThreads) {
      const int64_t id = ids.ids[i];
      float logp = 0.0f;
      if (keep && id != -1) {
        if (!is_column(id, a.vocab)) {
          logp = nan_float();
        } else if (id == y) {
          logp = logp_y;
        } else if (inv_sum == 0.0f) {  // no distribution
          logp = -inf_float();
        } else {
          logp = (element_of<T, kTransform>(f, logits, bias, id).x - m) * scale.nats - log_s;
          met |= logp > kConfident;
        }
      }
      ids.logp_at[i] = logp;
    }
    // Also the barrier between what is written above and read below.
    if (!__syncthreads_or(met)) continue;
    int64_t sure = 0;
    for (int64_t i = range.begin; i < range.end; i++) {
      if (ids.ids[i] != y && ids.ids[i] != -1 && ids.logp_at[i] > kConfident) sure = ids.ids[i];
    }
    const float logp =
        log_prob_alone<T, kTransform>(f, logits, bias, a.vocab, sure, scale.c, sums[turn]);
    turn ^= 1;
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kIdsThreads) {
      if (ids.ids[i] == sure) ids.logp_at[i] = logp;
    }
  }
}

// What arrives at column `id` from the ids of its row, and what arrives at all others; an id that
// is no column makes the latter NaN, unless nothing arrives there.
__device__ __forceinline__ Pair arriving(const IdsArgs& ids, const RowIds& range, int64_t id,
                                         int64_t vocab) {
  Pair sum = {0.0f, 0.0f};
  for (int64_t begin = range.begin; begin < range.end; begin += kPartial) {
    const int64_t end = begin + kPartial < range.end ? begin + kPartial : range.end;
    Pair part = {0.0f, 0.0f};
    for (int64_t i = begin; i < end; i++) {
      const int64_t other = ids.ids[i];
      float g = ids.grad_logp_at[i];
      if (other == -1) continue;
      if (!is_column(other, vocab) && g != 0.0f) g = nan_float();
      part.x += other == id ? g : 0.0f;
      part.y += other == id ? 0.0f : g;
    }
    sum = add2(sum, part);
  }
  return sum;
}

// The gradient of one column at which `g.x` arrives, and `g.y` at all others.
__device__ __forceinline__ float gradient_of_column(Pair g, float logp, float entropy, float gh,
                                                    float nats) {
  const float p = exp2_fast(logp * kLog2E), rest = -expm1f(logp);
  const float log_term = logp == -inf_float() ? 0.0f : p * (logp + entropy);
  return nats * (g.x * rest - p * g.y - gh * log_term);
}

// Position i of the row's work: its ids, and behind them the target.
template <class T, bool kTransform>
__global__ void __launch_bounds__(kIdsThreads, 8)
    gradient_at_kernel(const __grid_constant__ LogitsArgs a,
                       const __grid_constant__ TokenStatsGrad g,
                       const __grid_constant__ IdsArgs ids) {
  const Transform f = transform_of(a);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t token = token_of(a, row), y = a.target[token];
    const bool keep = counts(a, token) && g.inv_sum[token] != 0.0f;
    const float ga = keep && g.grad_logp != nullptr ? g.grad_logp[token] : 0.0f;
    const float gh = keep && g.grad_entropy != nullptr ? g.grad_entropy[token] : 0.0f;
    const float gl = keep && g.grad_lse != nullptr ? g.grad_lse[token] : 0.0f;
    const RowIds range = ids_of(ids, token);
    int any = ga != 0.0f || gh != 0.0f || gl != 0.0f;
    for (int64_t i = range.begin + threadIdx.x; keep && i < range.end; i += kIdsThreads) {
      any |= ids.ids[i] != -1 && ids.grad_logp_at[i] != 0.0f;
    }
    const bool active = __syncthreads_or(any) != 0;
    const Scale scale = scale_at(a, temperature_of(a, token), kTransform);
    const float entropy = g.entropy[token];
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const T* bias = bias_row<T>(a, row);
    for (int64_t i = range.begin + threadIdx.x; i <= range.end; i += kIdsThreads) {
      const bool at_target = i == range.end;
      const int64_t id = at_target ? y : ids.ids[i];
      const bool column = is_column(id, a.vocab);
      float value = 0.0f, total = 0.0f;
      if (active && (at_target || column)) {
        Pair arrives = arriving(ids, range, id, a.vocab);
        if (id == y) {
          arrives.x += ga;
        } else {
          arrives.y += ga;
        }
        arrives.y -= gl;
        total = arrives.x + arrives.y;
        if (!column && ga != 0.0f) total = nan_float();
        if (column) {
          const float logp = at_target ? g.logp[token] : ids.logp_at[i];
          const float slope = kTransform ? element_of<T, kTransform>(f, logits, bias, id).y : 1.0f;
          value = slope * gradient_of_column(arrives, logp, entropy, gh, scale.nats);
        }
      }
      if (at_target) {
        ids.grad_total[token] = total;
        ids.grad_at_target[token] = value;
      } else {
        ids.grad_at[i] = value;
      }
    }
  }
}

template <class G>
__global__ void __launch_bounds__(kIdsThreads, 8)
    store_at_kernel(const __grid_constant__ LogitsArgs a, const __grid_constant__ TokenStatsGrad g,
                    const __grid_constant__ IdsArgs ids) {
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t token = token_of(a, row), y = a.target[token];
    if (!counts(a, token)) continue;
    const RowIds range = ids_of(ids, token);
    G* grad = static_cast<G*>(g.grad_logits) + row * g.grad_stride;
    // An id that is the target is left to the target: one thread writes each column, or several
    // that hold the same value.
    for (int64_t i = range.begin + threadIdx.x; i <= range.end; i += kIdsThreads) {
      const bool at_target = i == range.end;
      const int64_t id = at_target ? y : ids.ids[i];
      if (!is_column(id, a.vocab) || (id == y && !at_target)) continue;
      store_element(grad + id, at_target ? ids.grad_at_target[token] : ids.grad_at[i]);
    }
  }
}

}  // namespace cuda
}  // namespace tokfuse
