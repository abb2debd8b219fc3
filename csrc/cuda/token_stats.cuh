// token_stats: five statistics of each row of logits, and the gradient of logp, entropy, lse
// and logit_sum.
// rows.cuh has the formulas.
//
// The forward reads (R, V) once. The backward reads and writes it once; a row without gradient is
// filled with zeros and not read. Bytes per row at bf16: 2V forward, 4V backward. One exponential
// per element in each; a second temperature adds one, the moments add two multiplications.
//
// A block computes whole rows (forward) or parts of rows (backward), on a grid of at most as many
// blocks as are resident at once. A target outside [0, V) gives NaN in logp and in the gradient of
// the row: an error would need a synchronisation with the device.
#pragma once

#include "cuda/gradient.cuh"
#include "cuda/rows.cuh"

namespace tokfuse {
namespace cuda {

constexpr int kForwardThreads = 256;
constexpr int kBackwardThreads = 256;

// Writes second_logp and the moments of p^2.
__device__ __forceinline__ void write_extras(const TokenStatsOut& o, int64_t t, const RowSums& sums,
                                             const RowStats& x, bool has_target, float nats,
                                             float nats2) {
  const bool dead = x.inv_sum == 0.0f;
  if (o.second_logp != nullptr) {
    const float d_y = has_target ? sums.d_y : nan_float();
    o.second_logp[t] = dead ? x.logp : d_y * nats2 - log1pf(sums.rest2);
  }
  if (o.sum_p2_logp == nullptr) return;
  const float log_s = log1pf(sums.rest), inv = x.inv_sum;
  const float p_d = sums.r.ssd * nats * inv * inv;
  const float p_dd = sums.r.ssdd * (nats * inv) * (nats * inv);
  o.sum_p2_logp[t] = dead ? 0.0f : p_d - log_s * x.sum_sq;
  o.sum_p2_logp2[t] = dead ? 0.0f : p_dd - log_s * (2.0f * p_d - log_s * x.sum_sq);
}

using WarpSums = Array<Array<float, kForwardThreads / kWarp>, 2>;

__device__ __forceinline__ WarpSums& warp_sums() {
  TOKFUSE_SHARED(sums, WarpSums);
  return sums;
}

template <class T, bool kTransform, bool kExtras, class Sum>
__device__ __forceinline__ void statistics_of_rows(const LogitsArgs& a, const TokenStatsOut& out,
                                                   bool aligned) {
  using Records = Array<Record, kMaxWarps>;
  TOKFUSE_SHARED(records, Array<Records, 2>);
  const uint64_t policy = l2_policy<Keep::kFirst>();
  const Transform f = transform_of(a);
  const Scale second = scale_at(a, out.second_temperature, kTransform);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t token = token_of(a, row);
    if (!counts(a, token)) {
      if (threadIdx.x > 0) continue;
      write_stats(out, token, RowStats());
      if (out.second_logp != nullptr) out.second_logp[token] = 0.0f;
      if constexpr (Sum::kOn) out.logit_sum[token] = 0.0f;
      if (out.sum_p2_logp != nullptr) out.sum_p2_logp[token] = out.sum_p2_logp2[token] = 0.0f;
      continue;
    }
    const Scale scale = scale_at(a, temperature_of(a, token), kTransform);
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const T* bias = static_cast<const T*>(a.bias_logits);
    if (bias != nullptr) bias += row * a.bias_stride;
    const int vocab = static_cast<int>(a.vocab);
    const int64_t y = a.target[token];
    Lane<kExtras> lane;
    Sum sum{};
    if constexpr (Sum::kOn) sum.weight = out.class_weight;
    if (aligned) {
      const GlobalRow<T, true> whole = {logits, bias, vocab, policy};
      fold_row<T, true, kTransform>(f, whole, y, lane, sum, scale.c, second.c);
    } else {
      const GlobalRow<T, false> whole = {logits, bias, vocab, policy};
      fold_row<T, false, kTransform>(f, whole, y, lane, sum, scale.c, second.c);
    }
    if constexpr (Sum::kOn) {  // read below, after the barrier of merge_block
      const float mine = warp_sum(sum.sum.x + sum.sum.y);
      if (threadIdx.x % kWarp == 0) warp_sums()[turn][threadIdx.x / kWarp] = mine;
    }
    const Record r = merge_block(lane, records[turn], scale.c, second.c);
    turn ^= 1;
    if (threadIdx.x > 0) continue;
    if constexpr (Sum::kOn) {
      float total = 0.0f;
      for (int w = 0; w < kForwardThreads / kWarp; w++) total += warp_sums()[turn ^ 1][w];
      out.logit_sum[token] = total * scale.nats;
    }
    const bool has_target = y >= 0 && y < a.vocab;
    const float u_y = has_target ? element_of<T, kTransform>(f, logits, bias, y).x : -inf_float();
    const RowSums of_row = with_target<kExtras>(r, u_y, scale.c, second.c);
    const RowStats stats = finish(of_row, has_target, scale.nats);
    write_stats(out, token, stats);
    if (kExtras) write_extras(out, token, of_row, stats, has_target, scale.nats, second.nats);
  }
}

template <class T, bool kTransform, bool kExtras>
__global__ void __launch_bounds__(kForwardThreads, kTransform ? 2 : (kExtras ? 3 : 4))
    token_stats_fwd_kernel(const __grid_constant__ LogitsArgs a,
                           const __grid_constant__ TokenStatsOut out, bool aligned) {
  statistics_of_rows<T, kTransform, kExtras, NoSum>(a, out, aligned);
}

// With logit_sum.
template <class T, bool kTransform>
__global__ void __launch_bounds__(kForwardThreads, kTransform ? 2 : 3)
    token_stats_sum_fwd_kernel(const __grid_constant__ LogitsArgs a,
                               const __grid_constant__ TokenStatsOut out, bool aligned) {
  statistics_of_rows<T, kTransform, false, LogitSum>(a, out, aligned);
}

template <class T, class G, bool kTransform, bool kSum>
__device__ __forceinline__ void gradient_of_rows(const LogitsArgs& a, const TokenStatsGrad& g,
                                                 int parts, bool together) {
  const uint64_t policy = l2_policy<Keep::kFirst>();
  const Transform f = transform_of(a);
  for (int64_t item = blockIdx.x; item < a.rows * parts; item += gridDim.x) {
    const int64_t row = item / parts, token = token_of(a, row);
    const bool keep = counts(a, token);
    const float ga = keep && g.grad_logp != nullptr ? g.grad_logp[token] : 0.0f;
    const float gh = keep && g.grad_entropy != nullptr ? g.grad_entropy[token] : 0.0f;
    const float gl = keep && g.grad_lse != nullptr ? g.grad_lse[token] : 0.0f;
    const float gu = kSum && keep ? g.grad_logit_sum[token] : 0.0f;
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    const Part part = part_of_row(logits, a.vocab, static_cast<int>(item % parts), parts, together);
    const T* bias = static_cast<const T*>(a.bias_logits);
    if (bias != nullptr) bias += row * a.bias_stride;
    G* grad = static_cast<G*>(g.grad_logits) + row * g.grad_stride;
    const float inv_sum = keep ? g.inv_sum[token] : 0.0f;
    // The gradient is zero for clipped, zero-advantage and masked tokens, and for a row of only
    // -inf. Such rows are not read.
    if ((ga == 0.0f && gh == 0.0f && gl == 0.0f && gu == 0.0f) || inv_sum == 0.0f) {
      write_zeros<T>(grad, static_cast<int>(a.vocab), part, together, policy);
      continue;
    }
    const Scale scale = scale_at(a, temperature_of(a, token), kTransform);
    const Slopes plain = slopes_of(scale, g.row_max[token], inv_sum, g.logp[token],
                                   g.entropy[token], ga, gh, a.target[token], a.vocab);
    const LseSlopes s = with_lse(plain, inv_sum, gl);
    const int vocab = static_cast<int>(a.vocab);
    constexpr int kAhead = kTransform ? 1 : 2;
    if constexpr (kSum) {
      const SumSlopes with_sum = {s, scale.nats * gu, g.class_weight, vocab};
      write_gradient<T, G, kTransform, kAhead>(f, logits, bias, vocab, grad, part, with_sum,
                                               together, policy);
    } else {
      write_gradient<T, G, kTransform, kAhead>(f, logits, bias, vocab, grad, part, s, together,
                                               policy);
    }
  }
}

template <class T, class G, bool kTransform>
__global__ void __launch_bounds__(kBackwardThreads, kTransform ? 3 : 4)
    token_stats_bwd_kernel(const __grid_constant__ LogitsArgs a,
                           const __grid_constant__ TokenStatsGrad g, int parts, bool together) {
  gradient_of_rows<T, G, kTransform, false>(a, g, parts, together);
}

// With the gradient of logit_sum.
template <class T, class G, bool kTransform>
__global__ void __launch_bounds__(kBackwardThreads, 3)
    token_stats_sum_bwd_kernel(const __grid_constant__ LogitsArgs a,
                               const __grid_constant__ TokenStatsGrad g, int parts, bool together) {
  gradient_of_rows<T, G, kTransform, true>(a, g, parts, together);
}

}  // namespace cuda
}  // namespace tokfuse
