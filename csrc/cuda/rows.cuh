// Statistics of one row of logits in one read with one exp per element, and its gradient.
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
// so two constants per row are all that an element needs; the target itself has 1 - p =
// -expm1(logp). Why d = u - m and not fma(u, c, -c m): the rounding of c m is an error of 2^(1e-7
// m) in e. Sums of d e do not cancel as those of u e do.
//
// Why the sums leave the target out: in float32, S = 1 + 1e-7 says nothing about the rest. Without
// the target they hold the rest to all its digits, and where the target is the maximum, as a
// confident one is, logp = -log(1 + rest): the gradient of a confident token is as exact as that of
// any other.
//
// A thread keeps the statistics of the elements that it loads itself (`Lane`), in vectors of 16
// bytes: vector v of a row belongs to thread v % threads. Threads meet once per row, in an order
// that the vocabulary alone decides. Where a row begins at no multiple of 16 bytes, the same
// threads put the same vectors together from words of 4: a row's bits depend on neither its place
// nor its batch.
#pragma once

#include "cuda/vectors.cuh"

namespace tokfuse {
namespace cuda {

// Stands for d of an excluded logit: e is 0 there and d e must be, too, where -inf * 0 is NaN. Its
// square is finite, for the second moment.
constexpr float kFarthest = -1.0e18f;
// Vectors that a thread loads before it computes on them; a transformed one takes more registers.
template <bool kTransform>
constexpr int kTileOf = kTransform ? 2 : 4;

// -------------------------------------------------------------------------------------- statistics

// Sums of the elements that one thread has seen, two by two. kExtras: for a second temperature and
// for the moments of p^2.
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

// 2^x for x <= 0 on the multipliers instead of the exp unit; relative error 2e-7, 0 below -126.
__device__ __forceinline__ Pair exp2_polynomial(Pair x) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // leaves round(x) + 127 in the low bits
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

// One pair in this many goes through the polynomial: sm_100 reads elements as fast as its exp unit
// takes them, and has issue slots left. 0: none.
constexpr int kNoPolynomial = 0;
#if TOKFUSE_ARCH >= 100
constexpr int kPolynomialShare = 8;
#else
constexpr int kPolynomialShare = kNoPolynomial;
#endif

// 2^x of pair i of a vector; which unit computes it depends on i alone.
template <int kShare>
__device__ __forceinline__ Pair exp2_pair(Pair x, int i) {
  if constexpr (kShare != kNoPolynomial) {
    if (i % kShare == 0) return exp2_polynomial(x);
  }
  return {exp2_fast(x.x), exp2_fast(x.y)};
}

// d = u - m of a pair; the maximum keeps NaN, the poison of a row with it.
__device__ __forceinline__ Pair below(Pair u, float m) {
  const Pair d = add2(u, {-m, -m});
  return {max_nan(d.x, kFarthest), max_nan(d.y, kFarthest)};
}

__device__ __forceinline__ Pair times(Pair a, float b) { return mul2(a, {b, b}); }

// The sums of a lane, or of many, relative to a larger maximum `step` above the old one.
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

// Folds kPairs pairs, of which `tile_max` is the maximum, into the lane.
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

// kCount vectors of logits, loaded already.
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

// Where the target lies. Its tile is folded apart, so that no element pays for a comparison.
struct TargetPlace {
  int tile;    // first vector of its tile, the same in all threads; kNowhere where there is none
  int vector;  // its vector, in the thread that folds it; kNowhere in all others
  int item;
};
constexpr int kNowhere = -(1 << 30);

// Vectors are counted from `first` on: there are `count` of them, in tiles of kTile per thread.
template <class T, int kTile>
__device__ __forceinline__ TargetPlace target_place(int64_t y, int64_t vocab, int first,
                                                    int count) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int v = static_cast<int>(y) / kItems<T> - first;
  if (y < 0 || y >= vocab || v < 0 || v >= count) return {kNowhere, kNowhere, 0};
  return {v / (kTile * threads) * (kTile * threads), v % threads == thread ? v : kNowhere,
          static_cast<int>(y) % kItems<T>};
}

// -inf in place of the target where it lies among the vectors v, v + threads, ...
template <class T, int kCount>
__device__ __forceinline__ void exclude(const TargetPlace& target, int v, Vec16* z) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  const int ahead = target.vector - v, threads = static_cast<int>(blockDim.x);
  const uint32_t keep = kPerWord == 1 ? 0u : (target.item % 2 == 0 ? 0xffff0000u : 0xffffu);
  const uint32_t none = minus_infinity(static_cast<const T*>(nullptr)) & ~keep;
#pragma unroll
  for (int j = 0; j < kCount; j++) {
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const bool here = ahead == j * threads && w == target.item / kPerWord;
      z[j].word[w] = here ? (z[j].word[w] & keep) | none : z[j].word[w];
    }
  }
}

// All of a row in global memory that is this thread's, but the target.
template <class T, bool kAligned, bool kTransform, bool kExtras>
__device__ __forceinline__ void fold_row(const Transform& f, const GlobalRow<T, kAligned>& row,
                                         int64_t y, Lane<kExtras>& a, float c, float c2) {
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
  }
  // The tile of the target, then what lies behind the last whole tile: one copy of the code,
  // because a second one costs registers that the loop above needs (120 bytes of stack were seen).
  int left = target.tile >= 0 && target.tile + thread + reach < whole ? kTile : 0;
  int w = left > 0 ? target.tile + thread : v;
#pragma unroll 1
  while (w * kItems<T> < row.vocab) {
    Vec16 one[1] = {w < whole ? row.whole(w) : row.last()}, bias_of_one[1] = {};
    if (has_bias) bias_of_one[0] = w < whole ? row.whole_bias(w) : row.last_bias();
    exclude<T, 1>(target, w, one);
    fold_vectors<T, 1, kTransform>(f, a, one, bias_of_one, has_bias, c, c2);
    w = --left == 0 ? v : w + threads;
  }
}

// ----------------------------------------------------------------------------------------- merging

// Statistics of many lanes.
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

// Every lane adds the same numbers in the same order.
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

// The record of a warp's lanes, in each of them.
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

// The record of the block, valid in its first warp. Its threads may still read `shared` until the
// barrier of the next call: callers take turns with two of them, from call to call.
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

// Statistics of a row, and S - 1 at its temperature and at the second one: they keep the digits of
// the others where the target is the maximum, and are -1 where there is nothing at all.
struct RowSums {
  Record r;
  float rest, rest2;
  float d_y;  // u_y - m
};

// From the record of all others; `u_y` is -inf where there is no target.
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
  if (x.rest == -1.0f) {  // only -inf: no distribution
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
