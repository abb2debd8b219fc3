// Statistics of one row of logits in one read, with one exponential per element. gradient.cuh
// computes the gradient.
//
// With u = f(z) the transformed logit, c = log2(e) / T, m = max u and d = u - m:
//
//     e = 2^(c d),   S = sum e,   SD = sum d e,   S2 = sum e^2
//     lse = m / T + log S,   logp = d_y / T - log S
//     entropy = log S - SD / (S T),   sum_sq = S2 / S^2
//
// The gradient of ga logp + gh entropy is, with log p = d / T - log S,
//
//     dz = f'(z) / T ( ga [j = y] - p (ga + gh (log p + entropy)) )
//        = f'(z) ( ga / T [j = y] + e (a0 + a1 d) )
//
// so an element needs only two constants per row, a0 and a1. The target's entry uses 1 - p =
// -expm1(logp), which keeps its digits as p approaches 1.
//
// The kernels compute d = u - m instead of fma(u, c, -c m): the rounding error of c m would change
// e by a factor of up to 2^(1e-7 m). And the terms of sum d e have one sign, so they do not cancel
// as those of sum u e do.
//
// The sums exclude the target. Let `rest` be the sum over all other elements. If the target is the
// maximum (a confident token), logp = -log(1 + rest). A float32 sum S = 1 + rest would lose the
// digits of a small rest; the sum without the target keeps them. So the gradient of a confident
// token is as accurate as that of any other.
//
// A row is split into vectors of 16 bytes. Thread v % threads loads vector v and keeps the
// statistics of its own elements (`Lane`). The threads merge their statistics once per row, in an
// order that depends on the vocabulary only. If a row does not begin at a multiple of 16 bytes, the
// same threads assemble the same vectors from 4-byte words. So the result that a kernel computes
// for a row depends, bit for bit, neither on its address nor on its batch.
//
// policy_step has two kernels, and the alignment of the rows decides which one runs. They add in
// different orders, and on sm_100 one of them computes some exponentials of the gradient with the
// polynomial. So the last bits of policy_step depend on whether the rows begin at multiples of 16
// bytes.
#pragma once

#include "cuda/vectors.cuh"

namespace tokfuse {
namespace cuda {

// Lower bound of d, used for an excluded logit. There e is 0, and d e must be 0 too, but -inf * 0
// would be NaN. Its square is finite, as the second moment needs.
constexpr float kFarthest = -1.0e18f;
// Vectors that a thread loads before it computes on them. Transformed ones take more registers.
template <bool kTransform>
constexpr int kTileOf = kTransform ? 2 : 4;

// -------------------------------------------------------------------------------------- statistics

// Statistics of the elements of one thread. Each sum is kept for even and odd elements separately.
// kExtras: the sums of the second temperature and of the moments of p^2 are used too.
template <bool kExtras>
struct Lane {
  float m = kLowestMax;
  Pair s = {0.0f, 0.0f};     // sum e
  Pair sd = {0.0f, 0.0f};    // sum d e
  Pair ss = {0.0f, 0.0f};    // sum e^2
  Pair s2 = {0.0f, 0.0f};    // sum 2^(c2 d)
  Pair ssd = {0.0f, 0.0f};   // sum d e^2
  Pair ssdd = {0.0f, 0.0f};  // sum d^2 e^2
};

// 2^x for x <= 0 with multiplications instead of the exp unit. Relative error 2e-7; 0 below -126.
__device__ __forceinline__ Pair exp2_polynomial(Pair x) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // x + kMagic has round(x) + 127 in its low bits
  x = {max_nan(x.x, -127.0f), max_nan(x.y, -127.0f)};
  const Pair t = add2(x, {kMagic, kMagic});
  const Pair whole = add2(t, {-kMagic, -kMagic});
  const Pair r = fma2(whole, {-1.0f, -1.0f}, x);
  Pair p = fma2({0x1.5bba14p-10f, 0x1.5bba14p-10f}, r, {0x1.3cea88p-7f, 0x1.3cea88p-7f});
  p = fma2(p, r, {0x1.c6b752p-5f, 0x1.c6b752p-5f});
  p = fma2(p, r, {0x1.ebf9bcp-3f, 0x1.ebf9bcp-3f});
  p = fma2(p, r, {0x1.62e42ap-1f, 0x1.62e42ap-1f});
  p = fma2(p, r, {1.0f, 1.0f});
  return mul2(p, {float_of(bits_of(t.x) << 23), float_of(bits_of(t.y) << 23)});
}

// Of the pairs that a thread computes at once, each one whose number is a multiple of
// kPolynomialShare uses the polynomial; 0: none does. In the statistics this is one pair of 8. In
// the gradient, where a thread computes one vector at a time, it is the first pair of the vector.
// On sm_100 memory delivers elements as fast as the exp unit can take them, and issue slots are
// free.
constexpr int kNoPolynomial = 0;
#if TOKFUSE_ARCH >= 100
constexpr int kPolynomialShare = 8;
#else
constexpr int kPolynomialShare = kNoPolynomial;
#endif

// Returns 2^x of pair i of a vector. Only i decides whether the polynomial is used.
template <int kShare>
__device__ __forceinline__ Pair exp2_pair(Pair x, int i) {
  if constexpr (kShare != kNoPolynomial) {
    if (i % kShare == 0) return exp2_polynomial(x);
  }
  return {exp2_fast(x.x), exp2_fast(x.y)};
}

// Returns d = u - m of a pair, at least kFarthest. max_nan keeps NaN, so a NaN reaches the result.
__device__ __forceinline__ Pair below(Pair u, float m) {
  const Pair d = add2(u, {-m, -m});
  return {max_nan(d.x, kFarthest), max_nan(d.y, kFarthest)};
}

__device__ __forceinline__ Pair times(Pair a, float b) { return mul2(a, {b, b}); }

// Rescales the sums of a lane to a new maximum. `step` is the old maximum minus the new one (<= 0).
template <bool kExtras>
__device__ __forceinline__ void lower(Lane<kExtras>& a, float step, float c, float c2) {
  step = fmaxf(step, kFarthest);
  const float decay = exp2_fast(step * c), two = decay * decay;
  const Pair by = {step, step};
  if (kExtras) {
    a.s2 = times(a.s2, exp2_fast(step * c2));
    const Pair inner = fma2(by, a.ss, times(a.ssd, 2.0f));
    a.ssdd = times(fma2(by, inner, a.ssdd), two);
    a.ssd = times(fma2(by, a.ss, a.ssd), two);
  }
  a.sd = times(fma2(by, a.s, a.sd), decay);
  a.s = times(a.s, decay);
  a.ss = times(a.ss, two);
}

// Adds kPairs pairs with the maximum `tile_max` to the statistics of the lane.
template <int kPairs, bool kExtras>
__device__ __forceinline__ void fold(Lane<kExtras>& a, const Pair* u, float tile_max, float c,
                                     float c2) {
  const float m = fmaxf(a.m, tile_max);
  lower(a, a.m - m, c, c2);
  a.m = m;
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const Pair d = below(u[i], m);
    const Pair e = exp2_pair<kPolynomialShare>(times(d, c), i);
    a.s = add2(a.s, e);
    a.sd = fma2(d, e, a.sd);
    a.ss = fma2(e, e, a.ss);
    if (kExtras) {
      const Pair de = mul2(d, e);
      a.s2 = add2(a.s2, exp2_pair<kPolynomialShare>(times(d, c2), i + 1));
      a.ssd = fma2(de, e, a.ssd);
      a.ssdd = fma2(de, de, a.ssdd);
    }
  }
}

// Adds kCount vectors of logits, already loaded, to the statistics of the lane.
template <class T, int kCount, bool kTransform, bool kExtras>
__device__ __forceinline__ void fold_vectors(const Transform& f, Lane<kExtras>& a, const Vec16* z,
                                             const Vec16* bias, bool has_bias, float c, float c2) {
  constexpr int kPairs = kItems<T> / 2;
  Pair u[kCount * kPairs], slope[kPairs];
  float m = kLowestMax;
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    transformed<T, kTransform>(f, z[j], bias[j], has_bias, u + j * kPairs, slope);
  }
  if constexpr (kTransform) {
#pragma unroll
    for (int i = 0; i < kCount * kPairs; i++) m = fmaxf(m, fmaxf(u[i].x, u[i].y));
  } else {
    m = max_of<kCount>(static_cast<const T*>(nullptr), z);
  }
  fold<kCount * kPairs>(a, u, m, c, c2);
}

// The position of the target. Its tile is added separately, so that no other element needs a
// comparison.
struct TargetPlace {
  int tile;    // first vector of its tile, the same in all threads; kNowhere without a target
  int vector;  // its vector, in the thread that adds it; kNowhere in all other threads
  int item;    // its element in the vector
};
constexpr int kNowhere = -(1 << 30);

// Vector numbers are relative to `first`. There are `count` vectors, in tiles of kTile per thread.
template <class T, int kTile>
__device__ __forceinline__ TargetPlace target_place(int64_t y, int64_t vocab, int first,
                                                    int count) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int v = static_cast<int>(y) / kItems<T> - first;
  if (y < 0 || y >= vocab || v < 0 || v >= count) return {kNowhere, kNowhere, 0};
  return {v / (kTile * threads) * (kTile * threads), v % threads == thread ? v : kNowhere,
          static_cast<int>(y) % kItems<T>};
}

// Replaces the target by -inf if it is in one of the kCount vectors v, v + threads, ...
template <class T, int kCount>
__device__ __forceinline__ void exclude(const TargetPlace& target, int v, Vec16* z) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  const int ahead = target.vector - v, threads = static_cast<int>(blockDim.x);
  const uint32_t keep = kPerWord == 1 ? 0u : (target.item % 2 == 0 ? 0xffff0000u : 0xffffu);
  const uint32_t none = minus_infinity(static_cast<const T*>(nullptr)) & ~keep;
#pragma unroll
  for (int j = 0; j < kCount; j++) {
    // Masks, because nvcc makes an array on the stack of a choice between changed and unchanged
    // words.
    const int word = ahead == j * threads ? target.item / kPerWord : -1;
#pragma unroll
    for (int w = 0; w < 4; w++) {
      z[j].word[w] = (z[j].word[w] & (w == word ? keep : ~0u)) | (w == word ? none : 0u);
    }
  }
}

// sum_j weight_j u_j over the elements of one thread, with the target.
struct LogitSum {
  static constexpr bool kOn = true;
  const float* weight;  // null: 1
  Pair sum;

  // Adds the elements [0, count) of a vector; the first one is in column `at`.
  template <class T, bool kTransform>
  __device__ __forceinline__ void add(const Transform& f, const Vec16& z, const Vec16& bias,
                                      bool has_bias, int at, int count) {
    constexpr int kPairs = kItems<T> / 2;
    Pair u[kPairs], slope[kPairs];
    transformed<T, kTransform>(f, z, bias, has_bias, u, slope);
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      if (2 * i < count) sum.x += weight == nullptr ? u[i].x : weight[at + 2 * i] * u[i].x;
      if (2 * i + 1 < count) sum.y += weight == nullptr ? u[i].y : weight[at + 2 * i + 1] * u[i].y;
    }
  }
};

// No such sum.
struct NoSum {
  static constexpr bool kOn = false;
};

// Adds this thread's elements of a row in global memory, except the target, to its statistics, and
// all of them to `sum`.
template <class T, bool kAligned, bool kTransform, bool kExtras, class Sum>
__device__ __forceinline__ void fold_row(const Transform& f, const GlobalRow<T, kAligned>& row,
                                         int64_t y, Lane<kExtras>& a, Sum& sum, float c, float c2) {
  const int whole = row.vocab / kItems<T>, threads = static_cast<int>(blockDim.x);
  constexpr int kTile = kTileOf<kTransform>;
  const bool has_bias = kTransform && row.bias != nullptr;
  const int thread = static_cast<int>(threadIdx.x), reach = (kTile - 1) * threads;
  const TargetPlace target = target_place<T, kTile>(y, row.vocab, 0, whole + 1);
  Vec16 z[kTile], bias[kTile] = {};
  int v = thread;
  for (; v + reach < whole; v += kTile * threads) {
    if (v == target.tile + thread) continue;
#pragma unroll
    for (int j = 0; j < kTile; j++) z[j] = row.whole(v + j * threads);
    if (has_bias) {
#pragma unroll
      for (int j = 0; j < kTile; j++) bias[j] = row.whole_bias(v + j * threads);
    }
    fold_vectors<T, kTile, kTransform>(f, a, z, bias, has_bias, c, c2);
    if constexpr (Sum::kOn) {
#pragma unroll
      for (int j = 0; j < kTile; j++) {
        const int at = (v + j * threads) * kItems<T>;
        sum.template add<T, kTransform>(f, z[j], bias[j], has_bias, at, kItems<T>);
      }
    }
  }
  // The tile of the target, then the vectors after the last whole tile. Both use one copy of the
  // code: a second copy takes registers that the loop above needs (120 bytes were spilled to the
  // stack).
  int left = target.tile >= 0 && target.tile + thread + reach < whole ? kTile : 0;
  int w = left > 0 ? target.tile + thread : v;
#pragma unroll 1
  while (w * kItems<T> < row.vocab) {
    Vec16 one[1] = {w < whole ? row.whole(w) : row.last()}, bias_of_one[1] = {};
    if (has_bias) bias_of_one[0] = w < whole ? row.whole_bias(w) : row.last_bias();
    if constexpr (Sum::kOn) {
      const int at = w * kItems<T>;
      sum.template add<T, kTransform>(f, one[0], bias_of_one[0], has_bias, at, row.vocab - at);
    }
    exclude<T, 1>(target, w, one);
    fold_vectors<T, 1, kTransform>(f, a, one, bias_of_one, has_bias, c, c2);
    w = --left == 0 ? v : w + threads;
  }
}

// ----------------------------------------------------------------------------------------- merging

// Statistics of several lanes.
struct Record {
  float m, s, sd, ss, s2, ssd, ssdd;
};

template <bool kExtras>
__device__ __forceinline__ Record record_of(const Lane<kExtras>& a) {
  return {a.m,
          a.s.x + a.s.y,
          a.sd.x + a.sd.y,
          a.ss.x + a.ss.y,
          a.s2.x + a.s2.y,
          a.ssd.x + a.ssd.y,
          a.ssdd.x + a.ssdd.y};
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bit));
  return x;
}

__device__ __forceinline__ float warp_max_nan(float x) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) x = max_nan(x, __shfl_xor_sync(kAllLanes, x, bit));
  return x;
}

// Every lane of the warp adds the same numbers in the same order, so all get the same sum.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

template <bool kExtras>
__device__ __forceinline__ Lane<kExtras> lane_of(const Record& r) {
  Lane<kExtras> a;
  a.s.x = r.s, a.sd.x = r.sd, a.ss.x = r.ss;
  a.s2.x = r.s2, a.ssd.x = r.ssd, a.ssdd.x = r.ssdd;
  return a;
}

// Returns the merged record of a warp, in each of its lanes.
template <bool kExtras>
__device__ __forceinline__ Record merge_warp(const Record& mine, float c, float c2) {
  const float m = warp_max(mine.m);
  Lane<kExtras> a = lane_of<kExtras>(mine);
  lower(a, mine.m - m, c, c2);
  Record out = {m, warp_sum(a.s.x), warp_sum(a.sd.x), warp_sum(a.ss.x), 0.0f, 0.0f, 0.0f};
  if (kExtras) {
    out.s2 = warp_sum(a.s2.x);
    out.ssd = warp_sum(a.ssd.x);
    out.ssdd = warp_sum(a.ssdd.x);
  }
  return out;
}

constexpr int kMaxWarps = 32;

__device__ __forceinline__ Record no_record() {
  return {kLowestMax, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
}

// Returns the merged record of the block; it is valid in the first warp. Threads may read `shared`
// until the barrier of the next call. So callers alternate between two buffers.
template <bool kExtras>
__device__ __forceinline__ Record merge_block(const Lane<kExtras>& lane,
                                              Array<Record, kMaxWarps>& shared, float c, float c2) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            at = static_cast<int>(threadIdx.x) % kWarp;
  const Record mine = merge_warp<kExtras>(record_of(lane), c, c2);
  if (at == 0) shared[warp] = mine;
  __syncthreads();
  if (warp > 0) return mine;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  return merge_warp<kExtras>(at < warps ? shared[at] : no_record(), c, c2);
}

// ---------------------------------------------------------------------------------- of a whole row

struct RowStats {
  float logp, entropy, lse, sum_sq, top1, row_max, inv_sum;
};

// Sums of a whole row. `rest` and `rest2` are S - 1 at its temperature and at the second one. If
// the target is the maximum, S - 1 keeps the digits of the other elements. It is -1 if all logits
// are -inf.
struct RowSums {
  Record r;
  float rest, rest2;
  float d_y;  // u_y - m of the target
};

// Adds the target to the record of all other elements. `u_y` is the target's logit, or -inf without
// a target.
template <bool kExtras>
__device__ __forceinline__ RowSums with_target(const Record& others, float u_y, float c, float c2) {
  const float m = fmaxf(others.m, u_y), d_y = u_y - m, d = max_nan(d_y, kFarthest);
  Lane<kExtras> a = lane_of<kExtras>(others);
  lower(a, others.m - m, c, c2);
  const float e = exp2_fast(d * c), e2 = kExtras ? exp2_fast(d * c2) : 0.0f, de = d * e;
  RowSums out = {record_of(a), a.s.x + (e - 1.0f), a.s2.x + (e2 - 1.0f), d_y};
  out.r.m = m;
  out.r.sd += de;
  out.r.ss += e * e;
  out.r.ssd += de * e;
  out.r.ssdd += de * de;
  return out;
}

__device__ __forceinline__ RowStats finish(const RowSums& x, bool has_target, float nats) {
  const Record& r = x.r;
  if (x.rest == -1.0f) {  // all logits are -inf: there is no distribution
    const float none = -inf_float();
    return {has_target ? none : nan_float(), 0.0f, none, 0.0f, 0.0f, 0.0f, 0.0f};
  }
  const float log_s = log1pf(x.rest), d_y = has_target ? x.d_y : nan_float();
  const float inv_sum = 1.0f / (1.0f + x.rest);
  return {d_y * nats - log_s,
          log_s - r.sd * inv_sum * nats,
          r.m * nats + log_s,
          r.ss * inv_sum * inv_sum,
          d_y >= 0.0f ? 1.0f : 0.0f,
          r.m,
          inv_sum};
}

__device__ __forceinline__ void write_stats(const TokenStatsOut& o, int64_t t, const RowStats& r) {
  o.logp[t] = r.logp;
  o.entropy[t] = r.entropy;
  o.lse[t] = r.lse;
  if (o.sum_sq != nullptr) o.sum_sq[t] = r.sum_sq;
  if (o.top1 != nullptr) o.top1[t] = r.top1;
  if (o.row_max != nullptr) o.row_max[t] = r.row_max;
  if (o.inv_sum != nullptr) o.inv_sum[t] = r.inv_sum;
}

}  // namespace cuda
}  // namespace tokfuse
