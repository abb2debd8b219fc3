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
// so two constants per row are all that an element needs. Why d = u - m and not fma(u, c, -c m): the
// rounding of c m is an error of 2^(1e-7 m) in e. Sums of d e do not cancel as those of u e do.
//
// A thread keeps the statistics of the elements that it loads itself (`Lane`), in vectors of 16
// bytes: vector v of a row belongs to thread v % threads. Threads meet once per row, in an order
// that the vocabulary alone decides. Where a row begins at no multiple of 16 bytes, the same threads
// put the same vectors together from words of 4: a row's bits depend on neither its place nor its
// batch.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace tokfuse {
namespace cuda {

// Every running maximum starts here, the lowest float32: -inf would make (-inf) - (-inf).
constexpr float kLowestMax = -3.4028234663852886e38f;
// Stands for d of an excluded logit: e is 0 there and d e must be, too, where -inf * 0 is NaN. Its
// square is finite, for the second moment.
constexpr float kFarthest = -1.0e18f;
// Vectors that a thread loads before it computes on them; a transformed one takes more registers.
template <bool kTransform>
constexpr int kTileOf = kTransform ? 2 : 4;

template <class T>
constexpr int kItems = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float nan_float() { return float_of(0x7fc00000u); }
__device__ __forceinline__ float inf_float() { return float_of(0x7f800000u); }

// ------------------------------------------------------------------------------- vectors of logits

__device__ __forceinline__ uint32_t bits_at(const float* p) { return bits_of(*p); }
__device__ __forceinline__ uint32_t bits_at(const BFloat16* p) { return p->bits; }
__device__ __forceinline__ uint32_t bits_at(const Float16* p) { return p->bits; }

__device__ __forceinline__ constexpr uint32_t minus_infinity(const float*) { return 0xff800000u; }
__device__ __forceinline__ constexpr uint32_t minus_infinity(const BFloat16*) {
  return 0xff80ff80u;
}
__device__ __forceinline__ constexpr uint32_t minus_infinity(const Float16*) { return 0xfc00fc00u; }

// Elements [0, count) from anywhere, -inf behind them.
template <class T>
__device__ __forceinline__ Vec16 load_elements(const T* from, int count) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  Vec16 v;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    uint32_t word = minus_infinity(from);
#pragma unroll
    for (int k = 0; k < kPerWord; k++) {
      const int i = w * kPerWord + k;
      if (i >= count) continue;
      const uint32_t bits = bits_at(from + i);
      word = kPerWord == 1 ? bits
                           : (k == 0 ? (word & 0xffff0000u) | bits : (word & 0xffffu) | bits << 16);
    }
    v.word[w] = word;
  }
  return v;
}

// 16 bytes from any element on, of the words around them.
template <class T>
__device__ __forceinline__ Vec16 load_words(const T* from) {
  const unsigned odd = static_cast<unsigned>(reinterpret_cast<uintptr_t>(from) % 4);  // 0 or 2
  const unsigned char* at = reinterpret_cast<const unsigned char*>(from) - odd;
  uint32_t word[5];
#pragma unroll
  for (int i = 0; i < 4; i++) word[i] = load4(at + 4 * i);
  Vec16 v = {{word[0], word[1], word[2], word[3]}};
  if constexpr (sizeof(T) == 2) {
    word[4] = odd != 0 ? load4(at + 16) : 0u;
#pragma unroll
    for (int i = 0; i < 4; i++) v.word[i] = __funnelshift_r(word[i], word[i + 1], odd * 8);
  }
  return v;
}

// A vector as float32, two at a time.
__device__ __forceinline__ void to_pairs(const float*, const Vec16& v, Pair* out) {
  out[0] = {float_of(v.word[0]), float_of(v.word[1])};
  out[1] = {float_of(v.word[2]), float_of(v.word[3])};
}

template <class T>
__device__ __forceinline__ void to_pairs(const T*, const Vec16& v, Pair* out) {
#pragma unroll
  for (int w = 0; w < 4; w++) out[w] = unpack(T(), v.word[w]);
}

// Maximum of kCount vectors; NaN is dropped. 16-bit floats are compared two at a time.
template <int kCount>
__device__ __forceinline__ float max_of(const float*, const Vec16* v) {
  float m = kLowestMax;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
#pragma unroll
    for (int w = 0; w < 4; w++) m = fmaxf(m, float_of(v[i].word[w]));
  }
  return m;
}

template <int kCount, class T>
__device__ __forceinline__ float max_of(const T*, const Vec16* v) {
  uint32_t m = v[0].word[0];
#pragma unroll
  for (int i = 0; i < kCount; i++) {
#pragma unroll
    for (int w = 0; w < 4; w++) m = max2(T(), m, v[i].word[w]);
  }
  const Pair halves = unpack(T(), m);
  return fmaxf(fmaxf(halves.x, halves.y), kLowestMax);
}

// kItems<T> values in the type of `out`, rounded once: 16 bytes, or 8 where float32 becomes 16 bit.
struct alignas(8) Vec8 {
  uint32_t word[2];
};

template <int kPairs, class G>
__device__ __forceinline__ void store_vector(G* out, const Pair* v, uint64_t policy) {
  if constexpr (sizeof(G) == 4) {
    static_assert(kPairs == 2, "float32 gradients are of float32 logits");
    store16(out, {{bits_of(v[0].x), bits_of(v[0].y), bits_of(v[1].x), bits_of(v[1].y)}}, policy);
  } else if constexpr (kPairs == 4) {
    store16(out, {{pack(G(), v[0]), pack(G(), v[1]), pack(G(), v[2]), pack(G(), v[3])}}, policy);
  } else {
    *reinterpret_cast<Vec8*>(out) = {{pack(G(), v[0]), pack(G(), v[1])}};
  }
}

__device__ __forceinline__ void store_element(float* out, float v) { *out = v; }

template <class G>
__device__ __forceinline__ void store_element(G* out, float v) {
  out->bits = static_cast<uint16_t>(pack(G(), {v, v}));
}

template <class T>
__device__ __forceinline__ float element_at(const T* p) {
  return unpack(T(), p->bits).x;
}
__device__ __forceinline__ float element_at(const float* p) { return *p; }

// ----------------------------------------------------------------------------- logits of the model

// tanh within 2 ulp; near 0 by a polynomial, because 1 - 2 / (e^2x + 1) cancels there.
__device__ __forceinline__ float tanh_exact(float x) {
  const float a = fabsf(x), q = a * a;
  const float far = 1.0f - __fdividef(2.0f, exp2_fast(a * (2.0f * kLog2E)) + 1.0f);
  float p = -5.70498872745e-3f * q + 2.06390887954e-2f;  // Cephes tanhf, for |x| < 0.625
  p = ((p * q - 5.37397155531e-2f) * q + 1.33314422036e-1f) * q - 3.33332819422e-1f;
  return copysignf(a < 0.625f ? p * q * a + a : far, x);
}

// How logits become u: u = cap tanh(pre z), or scale z without a cap, minus bias_scale * bias.
struct Transform {
  float cap, pre, scale, bias_scale;
};

__device__ __forceinline__ Transform transform_of(const LogitsArgs& a) {
  return {a.softcap, a.softcap != 0.0f ? a.logit_scale / a.softcap : a.logit_scale, a.logit_scale,
          a.bias_scale};
}

// u in place of the logits, and d u / d z; an excluded logit stays -inf, without slope under a cap.
template <int kPairs>
__device__ __forceinline__ void transform(const Transform& f, const Pair* bias, bool has_bias,
                                          Pair* u, Pair* slope) {
  const float none = -inf_float();
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const Pair z = u[i];
    if (f.cap != 0.0f) {
      const Pair t = {tanh_exact(z.x * f.pre), tanh_exact(z.y * f.pre)};
      u[i] = {f.cap * t.x, f.cap * t.y};
      slope[i] = {z.x == none ? 0.0f : f.scale * (1.0f - t.x * t.x),
                  z.y == none ? 0.0f : f.scale * (1.0f - t.y * t.y)};
    } else {
      u[i] = {f.pre * z.x, f.pre * z.y};
      slope[i] = {f.scale, f.scale};
    }
    if (has_bias) u[i] = {u[i].x - f.bias_scale * bias[i].x, u[i].y - f.bias_scale * bias[i].y};
    u[i] = {z.x == none ? none : u[i].x, z.y == none ? none : u[i].y};
  }
}

// What u is multiplied by, base 2 and natural; NaN where T <= 0. Plain logits are scaled here.
struct Scale {
  float c, nats;
};

__device__ __forceinline__ Scale scale_at(const LogitsArgs& a, float temperature, bool transformed) {
  float nats = temperature > 0.0f ? 1.0f / temperature : nan_float();
  if (!transformed) nats *= a.logit_scale;
  return {nats * kLog2E, nats};
}

__device__ __forceinline__ float temperature_of(const LogitsArgs& a, int64_t token) {
  return a.temperatures != nullptr ? a.temperatures[token] : a.temperature;
}

__device__ __forceinline__ int64_t token_of(const LogitsArgs& a, int64_t row) {
  return a.index != nullptr ? a.index[row] : row;
}

__device__ __forceinline__ bool counts(const LogitsArgs& a, int64_t token) {
  return a.mask == nullptr || a.mask[token] != 0;
}

// One row in global memory. kAligned: it begins at a multiple of 16 bytes, and so does its bias.
template <class T, bool kAligned>
struct GlobalRow {
  const T* logits;
  const T* bias;  // or null
  int vocab;
  uint64_t policy;

  __device__ __forceinline__ Vec16 vector(const T* from, int v) const {
    from += static_cast<int64_t>(v) * kItems<T>;
    if (kAligned) return load16(from, policy);
    // The words around reach out of the row at its ends.
    const bool inner = sizeof(T) == 4 || (v > 0 && (v + 1) * kItems<T> < vocab);
    return inner ? load_words(from) : load_elements(from, kItems<T>);
  }
  __device__ __forceinline__ Vec16 whole(int v) const { return vector(logits, v); }
  __device__ __forceinline__ Vec16 whole_bias(int v) const { return vector(bias, v); }
  // The vector behind the whole ones.
  __device__ __forceinline__ Vec16 last() const {
    const int v = vocab / kItems<T>;
    return load_elements(logits + v * kItems<T>, vocab % kItems<T>);
  }
  __device__ __forceinline__ Vec16 last_bias() const {
    const int v = vocab / kItems<T>;
    return load_elements(bias + v * kItems<T>, vocab % kItems<T>);
  }
};

// u and slope of a vector. Plain logits have no slope: `slope` is not written.
template <class T, bool kTransform>
__device__ __forceinline__ void transformed(const Transform& f, const Vec16& z, const Vec16& bias,
                                            bool has_bias, Pair* u, Pair* slope) {
  to_pairs(static_cast<const T*>(nullptr), z, u);
  if constexpr (kTransform) {
    Pair b[kItems<T> / 2];
    to_pairs(static_cast<const T*>(nullptr), bias, b);
    transform<kItems<T> / 2>(f, b, has_bias, u, slope);
  }
}

// (u, slope) of column y of a row.
template <class T, bool kTransform>
__device__ __forceinline__ Pair element_of(const Transform& f, const T* row, const T* bias,
                                           int64_t y) {
  Pair u = {element_at(row + y), 0.0f}, slope = {1.0f, 1.0f};
  if constexpr (kTransform) {
    const Pair b = {bias != nullptr ? element_at(bias + y) : 0.0f, 0.0f};
    transform<1>(f, &b, bias != nullptr, &u, &slope);
  }
  return {u.x, slope.x};
}

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

// All of a row in global memory that is this thread's.
template <class T, bool kAligned, bool kTransform, bool kExtras>
__device__ __forceinline__ void fold_row(const Transform& f, const GlobalRow<T, kAligned>& row,
                                         Lane<kExtras>& a, float c, float c2) {
  const int whole = row.vocab / kItems<T>, threads = static_cast<int>(blockDim.x);
  constexpr int kTile = kTileOf<kTransform>;
  const bool has_bias = kTransform && row.bias != nullptr;
  int v = static_cast<int>(threadIdx.x);
  Vec16 z[kTile], bias[kTile] = {};
  for (; v + (kTile - 1) * threads < whole; v += kTile * threads) {
#pragma unroll
    for (int j = 0; j < kTile; j++) z[j] = row.whole(v + j * threads);
    if (has_bias) {
#pragma unroll
      for (int j = 0; j < kTile; j++) bias[j] = row.whole_bias(v + j * threads);
    }
    fold_vectors<T, kTile, kTransform>(f, a, z, bias, has_bias, c, c2);
  }
  for (; v * kItems<T> < row.vocab; v += threads) {
    z[0] = v < whole ? row.whole(v) : row.last();
    if (has_bias) bias[0] = v < whole ? row.whole_bias(v) : row.last_bias();
    fold_vectors<T, 1, kTransform>(f, a, z, bias, has_bias, c, c2);
  }
}

// ------------------------------------------------------------------------------------------ merging

// Statistics of many lanes.
struct Record {
  float m, s, sd, ss, s2, ssd, ssdd;
};

template <bool kExtras>
__device__ __forceinline__ Record record_of(const Lane<kExtras>& a) {
  return {a.m,           a.s.x + a.s.y,     a.sd.x + a.sd.y,     a.ss.x + a.ss.y,
          a.s2.x + a.s2.y, a.ssd.x + a.ssd.y, a.ssdd.x + a.ssdd.y};
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bit));
  return x;
}

// Every lane adds the same numbers in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

// The record of a warp's lanes, in each of them.
template <bool kExtras>
__device__ __forceinline__ Record merge_warp(const Record& mine, float c, float c2) {
  const float m = warp_max(mine.m);
  Lane<kExtras> a;
  a.s.x = mine.s, a.sd.x = mine.sd, a.ss.x = mine.ss;
  a.s2.x = mine.s2, a.ssd.x = mine.ssd, a.ssdd.x = mine.ssdd;
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
  const int warp = static_cast<int>(threadIdx.x) / kWarp, at = static_cast<int>(threadIdx.x) % kWarp;
  const Record mine = merge_warp<kExtras>(record_of(lane), c, c2);
  if (at == 0) shared[warp] = mine;
  __syncthreads();
  if (warp > 0) return mine;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  return merge_warp<kExtras>(at < warps ? shared[at] : no_record(), c, c2);
}

// ------------------------------------------------------------------------------------ of a whole row

struct RowStats {
  float logp, entropy, lse, sum_sq, top1, m, inv_sum;
};

// `u_y`: the target's logit, used where has_target.
__device__ __forceinline__ RowStats finish(const Record& r, float u_y, bool has_target,
                                           float nats) {
  const bool dead = r.s == 0.0f;  // only -inf: no distribution
  const float log_s = log2f(r.s) * kLn2, d_y = has_target ? u_y - r.m : nan_float();
  if (dead) {
    const float none = -inf_float();
    return {has_target ? none : nan_float(), 0.0f, none, 0.0f, 0.0f, 0.0f, 0.0f};
  }
  const float inv_sum = 1.0f / r.s;
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
  if (o.row_max != nullptr) o.row_max[t] = r.m;
  if (o.inv_sum != nullptr) o.inv_sum[t] = r.inv_sum;
}

}  // namespace cuda
}  // namespace tokfuse
