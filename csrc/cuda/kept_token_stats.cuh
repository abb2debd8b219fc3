// kept_token_stats: log-probability, entropy and log-sum-exp over the kept ids (the support) of
// each row.
//
// The formulas are those of rows.cuh, with sums over j in ids[offsets[t] .. offsets[t + 1]). Both
// passes gather the kept logits only: 8 bytes of id and one 32-byte sector each. The backward
// writes the dense gradient: one memset to zero, then the kept entries. With k kept ids it moves 2V
// + 40k bytes per token at bf16.
//
// Legend: T tokens, V vocabulary, K kept ids of all rows. Invalid values raise no error here. An id
// outside [0, V) gives NaN in its row; a target outside [0, V) gives NaN in logp. An id that occurs
// twice in a row counts twice, but the target counts once. Offsets are clamped to [0, K], so no
// other memory is read.
#pragma once

#include "cuda/gradient.cuh"
#include "cuda/rows.cuh"

namespace tokfuse {
namespace cuda {

constexpr int kKeptThreads = 128;

// Positions of a token's kept ids. A masked row has none, so it is not read.
struct Support {
  int64_t begin, end;
};

__device__ __forceinline__ Support support_of(const KeptArgs& a, int64_t token) {
  if (!counts(a.logits, token)) return {0, 0};
  const int64_t begin = a.offsets[token], end = a.offsets[token + 1];
  return {begin > 0 ? begin : 0, end < a.num_ids ? end : a.num_ids};
}

// Returns (u, slope) of a kept id; u is NaN if the id is outside [0, V).
template <class T, bool kTransform>
__device__ __forceinline__ Pair kept_element(const LogitsArgs& a, const Transform& f, const T* row,
                                             int64_t id) {
  if (id < 0 || id >= a.vocab) return {nan_float(), 0.0f};
  return element_of<T, kTransform>(f, row, nullptr, id);
}

template <class T, bool kTransform>
__global__ void __launch_bounds__(kKeptThreads, 8)
    kept_token_stats_fwd_kernel(const __grid_constant__ KeptArgs a,
                                const __grid_constant__ TokenStatsOut out) {
  using Records = Array<Record, kMaxWarps>;
  using Targets = Array<float, kMaxWarps>;
  TOKFUSE_SHARED(records, Array<Records, 2>);
  TOKFUSE_SHARED(targets, Array<Targets, 2>);
  const Transform f = transform_of(a.logits);
  int turn = 0;
  for (int64_t t = blockIdx.x; t < a.logits.rows; t += gridDim.x, turn ^= 1) {
    const Support ids = support_of(a, t);
    const int64_t y = a.logits.target[t];
    const Scale scale = scale_at(a.logits, temperature_of(a.logits, t), kTransform);
    const T* row = static_cast<const T*>(a.logits.logits) + t * a.logits.stride;
    Lane<false> lane;
    float u_y = -inf_float();  // of the target, in the thread that finds it
    for (int64_t i = ids.begin + threadIdx.x; i < ids.end; i += kKeptThreads) {
      const int64_t id = a.ids[i];
      Pair u = {kept_element<T, kTransform>(a.logits, f, row, id).x, -inf_float()};
      if (id == y) {
        u_y = u.x;
        u.x = -inf_float();
      }
      fold<1>(lane, &u, u.x, scale.c, 0.0f);
    }
    u_y = warp_max_nan(u_y);
    if (threadIdx.x % kWarp == 0) targets[turn][static_cast<int>(threadIdx.x) / kWarp] = u_y;
    const Record r = merge_block(lane, records[turn], scale.c, 0.0f);
    if (threadIdx.x > 0) continue;
    for (int w = 1; w < kKeptThreads / kWarp; w++) u_y = max_nan(u_y, targets[turn][w]);
    // A target outside the support has u_y = -inf. Then logp is -inf, or NaN if the row has a NaN.
    const RowSums sums = with_target<false>(r, u_y, scale.c, 0.0f);
    const RowStats stats = finish(sums, y >= 0 && y < a.logits.vocab, scale.nats);
    write_stats(out, t, counts(a.logits, t) ? stats : RowStats());
  }
}

template <class T, bool kTransform>
__global__ void __launch_bounds__(kKeptThreads, 8)
    kept_token_stats_bwd_kernel(const __grid_constant__ KeptArgs a,
                                const __grid_constant__ TokenStatsGrad g) {
  const Transform f = transform_of(a.logits);
  for (int64_t t = blockIdx.x; t < a.logits.rows; t += gridDim.x) {
    float ga = g.grad_logp != nullptr ? g.grad_logp[t] : 0.0f;
    const float gh = g.grad_entropy != nullptr ? g.grad_entropy[t] : 0.0f;
    const float gl = g.grad_lse != nullptr ? g.grad_lse[t] : 0.0f;
    const float inv_sum = g.inv_sum[t];
    const Support ids = support_of(a, t);
    // Rows without gradient or without a distribution keep the zeros of the memset. They are not
    // read.
    const bool given = ga != 0.0f || gh != 0.0f || gl != 0.0f;
    if (!given || inv_sum == 0.0f || ids.end <= ids.begin) continue;
    const int64_t y = a.logits.target[t];
    // A target outside the support has logp = -inf, which has no gradient. So find it first.
    int met = 0;
    for (int64_t i = ids.begin + threadIdx.x; i < ids.end; i += kKeptThreads) met |= a.ids[i] == y;
    if (!__syncthreads_or(met) && y >= 0 && y < a.logits.vocab) ga = 0.0f;
    const Scale scale = scale_at(a.logits, temperature_of(a.logits, t), kTransform);
    const Slopes plain =
        slopes_of(scale, g.row_max[t], inv_sum, g.logp[t], g.entropy[t], ga, gh, y, a.logits.vocab);
    const LseSlopes s = with_lse(plain, inv_sum, gl);
    const T* row = static_cast<const T*>(a.logits.logits) + t * a.logits.stride;
    T* grad = static_cast<T*>(g.grad_logits) + t * g.grad_stride;
    for (int64_t i = ids.begin + threadIdx.x; i < ids.end; i += kKeptThreads) {
      const int64_t id = a.ids[i];
      if (id < 0 || id >= a.logits.vocab) continue;
      const Pair u = kept_element<T, kTransform>(a.logits, f, row, id);
      const float at = id == y ? target_gradient(s) : gradient_at(s, u.x);
      store_element(grad + id, at * u.y);
    }
  }
}

}  // namespace cuda
}  // namespace tokfuse
