// Statistics of one row of logits in one read, with one exponential per element. row_gradient.h
// computes the gradient.
//
// Exponents are in base 2. With u = f(z) the transformed logit and c = log2(e) / T,
//     x_j = u_j c - shift,   e_j = 2^x_j,   shift = c max_j u_j   (so x <= 0),
//     S = sum e,  SX = sum e x,  S2 = sum e^2,
//     lse = ln2 (shift + log2 S),   logp = ln2 (u_y c - shift - log2 S),
//     entropy = ln2 (log2 S - SX / S),   sum_sq = S2 / S^2.
// The float32 sums of a block exclude the target; its term is added in float64. Reason: let `rest`
// be the sum over all other elements. If the target is the maximum and rest is about 1e-7, a
// float32 sum 1 + rest has lost the digits of rest, and with them those of logp = -log(1 + rest).
//
// The gradient of  ga * logp + gh * entropy  is
//     du_j = 1/T ( ga ([j = y] - p_j) - gh p_j (log p_j + entropy) ),   p_j = e_j / S,
// For each element this is e_j (a0 + a1 x_j) with two constants per row. The backward reads (shift,
// 1 / S) instead of lse: a float32 lse near 100 has a rounding error of 4e-6, which would be the
// relative error of every p_j. The target's entry uses 1 - p_y = -expm1(logp), which keeps its
// digits as p_y approaches 1.
#pragma once

#include "cpu/kernels.h"
#include "cpu/sweep.h"

namespace tokfuse {
namespace TOKFUSE_ISA {

struct RowStats {
  double logp, entropy, lse, sum_sq;
  double sum_p2_logp, sum_p2_logp2;  // only with kMoments
  float top1;
  float shift, inv_sum;  // read by the gradient; TokenStatsOut::row_max is `shift`
  double log2_sum;       // log2 of the sum of the exponentials, relative to the row's maximum
  float row_max;         // of the transformed logits
};

// Constants of u = f(z). Plain logits (no softcap, no bias) have logit_scale in c instead.
struct Transform {
  float pre;         // multiplies z: logit_scale / softcap, or logit_scale
  float cap;         // 0: no softcap
  float bias_scale;  // multiplies the bias logits
};

// One row. Its columns may be stored in tiles of `tile` columns, `tile_stride` elements apart. The
// row is contiguous if tile >= vocab. A tile holds whole blocks.
template <class T>
struct Row {
  const T* z;
  const T* bias;  // may be null
  int64_t vocab;
  int64_t target;
  int64_t tile = INT64_MAX, tile_stride = 0;

  // Returns a pointer p with p[j] = z_j for the columns j of the block that begins at `begin`.
  const T* block(int64_t begin) const { return z + begin / tile * (tile_stride - tile); }
};

template <class T, bool kTransform>
static inline float transformed(const T* zs, const T* bias, const Transform& f, int64_t j) {
  const float z = load(zs, j);
  if (!kTransform) return z;
  float u = z * f.pre;
  if (f.cap != 0.0f) u = u == -kInf ? u : f.cap * tanh_simd(u);  // an excluded logit stays -inf
  if (bias != nullptr) u = u == -kInf ? u : u - f.bias_scale * load(bias, j);
  return u;
}

template <class A, class B>
struct IsSame {  // not std::is_same: vec.h says why
  static constexpr bool value = false;
};
template <class A>
struct IsSame<A, A> {
  static constexpr bool value = true;
};

// Exponentials of a row that the forward sweep keeps for the gradient: (vocab) values, small enough
// for the L2 cache. Those of a block are relative to the running maximum `shift[block]`, which is
// kNotKept if the block was not kept.
struct KeptExps {
  float* e;
  float* shift;
};
constexpr float kNotKept = kInf;

// Running sums of one softmax over the blocks of a row.
template <bool kMoments>
struct Accumulator {
  float shift = -kInf;  // running maximum of u c
  double s = 0, sx = 0, s2 = 0, s2x = 0, s2xx = 0;

  void raise_shift(float block_max2) {
    if (!(block_max2 > shift)) return;
    if (shift > -kInf) {
      const double d = static_cast<double>(shift) - block_max2;  // x' = x + d
      const double f = ::exp2(d), f2 = f * f;
      if (kMoments) {
        s2xx = f2 * (s2xx + 2 * d * s2x + d * d * s2);
        s2x = f2 * (s2x + d * s2);
      }
      sx = f * (sx + d * s);
      s *= f;
      s2 *= f2;
    }
    shift = block_max2;
  }

  void add(const BlockSums& b) {
    s += b.s;
    sx += b.sx;
    s2 += b.s2;
    if (kMoments) {
      s2x += b.s2x;
      s2xx += b.s2xx;
    }
  }
};

// Columns that are summed in float32. With four lanes these are 64 additions with an error of half
// an ulp each: a relative error of 4e-6 at most.
constexpr int64_t kPiece = 256;

template <bool kMoments>
TOKFUSE_BLOCK_LOOP static void sum_piece(const float* __restrict u, int64_t n, float c, float shift,
                                         BlockSums* out) {
  const float floor = opaque(kExponentFloor);
  float s = 0, sx = 0, s2 = 0, s2x = 0, s2xx = 0;
#pragma omp simd reduction(+ : s, sx, s2, s2x, s2xx)
  for (int64_t j = 0; j < n; j++) {
    const float x = clamp_exponent(u[j] * c - shift, floor);
    const float e = exp2_simd(x);
    s += e;
    sx += e * x;
    s2 += e * e;
    if (kMoments) {
      s2x += e * e * x;
      s2xx += e * e * x * x;
    }
  }
  *out = {s, sx, s2, s2x, s2xx, 0.0f, 0.0f};
}

template <bool kMoments>
static inline void sum_block(const float* u, int64_t n, float c, float shift,
                             Accumulator<kMoments>& acc) {
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    BlockSums sums;
    const int64_t left = n - begin;
    sum_piece<kMoments>(u + begin, left < kPiece ? left : kPiece, c, shift, &sums);
    acc.add(sums);
  }
}

TOKFUSE_BLOCK_LOOP static float block_max(const float* u, int64_t n) {
  float m = -kInf;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; j++) m = u[j] > m ? u[j] : m;
  return m;
}

// True if a block has a NaN. A block with the maximum -inf adds nothing to the sums, unless it has
// a NaN: then the statistics of the row must be NaN.
static inline bool has_nan(const float* u, int64_t n) {
  int found = 0;
  for (int64_t j = 0; j < n; j++) found |= u[j] != u[j];
  return found != 0;
}

template <bool kMoments>
static inline void add_block(const float* u, int64_t n, float c, float block_max,
                             Accumulator<kMoments>& acc) {
  if (!(block_max > -kInf)) {
    if (has_nan(u, n)) acc.s = __builtin_nan("");
    return;
  }
  acc.raise_shift(block_max * c);
  sum_block<kMoments>(u, n, c, acc.shift, acc);
}

// Converts one block to float32 in `buffer`.
template <class T, bool kTransform>
TOKFUSE_BLOCK_LOOP static void convert_block(const Row<T>& row, const Transform& f, int64_t begin,
                                             int64_t n, float* __restrict buffer) {
  const T* z = row.block(begin) + begin;
  const T* bias = row.bias == nullptr ? nullptr : row.bias + begin;
#pragma omp simd
  for (int64_t j = 0; j < n; j++) buffer[j] = transformed<T, kTransform>(z, bias, f, j);
}

// Converts one block to float32 in `buffer` and returns its maximum. These are two loops because
// g++ 12 does not vectorise the fused one: it turns the maximum into an integer select.
template <class T, bool kTransform>
static inline float stage_block(const Row<T>& row, const Transform& f, int64_t begin, int64_t n,
                                float* buffer) {
  convert_block<T, kTransform>(row, f, begin, n, buffer);
  return block_max(buffer, n);
}

// Adds the target's term, which the sums exclude. An excluded target (-inf) adds nothing.
template <bool kMoments>
static inline void add_element(Accumulator<kMoments>& acc, double x) {
  if (x == -__builtin_inf()) return;
  const double e = ::exp2(x);
  acc.s += e;
  acc.sx += e * x;
  acc.s2 += e * e;
  if (kMoments) {
    acc.s2x += e * e * x;
    acc.s2xx += e * e * x * x;
  }
}

// Returns the statistics of a row. `acc` has the sums over every element except the target.
// `target_u` is the target's logit, or -inf without a target.
template <bool kMoments>
static inline RowStats finish(Accumulator<kMoments> acc, float c, float target_u, float row_max) {
  RowStats out;
  out.sum_p2_logp = out.sum_p2_logp2 = 0;
  out.row_max = row_max;
  const double target_x =
      target_u == -kInf ? -__builtin_inf() : static_cast<double>(target_u) * c - acc.shift;
  add_element(acc, target_x);
  if (acc.s == 0) {  // every logit is -inf: there is no distribution, and no statistic is NaN
    out.logp = out.lse = -__builtin_inf();
    out.entropy = out.sum_sq = 0;
    out.top1 = out.shift = out.inv_sum = 0.0f;
    out.log2_sum = 0;
    return out;
  }
  const double log2_s = ::log2(acc.s), mean_x = acc.sx / acc.s;
  out.lse = kLn2 * (acc.shift + log2_s);
  out.logp = kLn2 * (target_x - log2_s);
  if (out.logp > 0) out.logp = 0;
  out.entropy = kLn2 * (log2_s - mean_x);
  if (out.entropy < 0) out.entropy = 0;
  const double inv = 1 / acc.s;
  out.sum_sq = acc.s2 * inv * inv;
  if (kMoments) {
    out.sum_p2_logp = kLn2 * inv * inv * (acc.s2x - log2_s * acc.s2);
    out.sum_p2_logp2 =
        kLn2 * kLn2 * inv * inv * (acc.s2xx - 2 * log2_s * acc.s2x + log2_s * log2_s * acc.s2);
  }
  out.top1 = target_u == row_max ? 1.0f : 0.0f;
  out.shift = acc.shift;
  out.inv_sum = static_cast<float>(inv);
  out.log2_sum = log2_s;
  return out;
}

// Limit of |shift| up to which u c - shift is accurate. With FMA, the error is the rounding of
// shift = c max u, which must stay below one unit of the exponent. Without FMA, every product u c
// is rounded too, so the limit is lower. Logits of a model do not exceed it, but fill values such
// as -1e9 or the lowest float32 do. For a row beyond the limit ("far"), the maximum is subtracted
// before the multiplication by c.
#if defined(__FMA__)
constexpr float kFar = 0x1p22f;
#else
constexpr float kFar = 0x1p10f;
#endif

static inline bool is_far(float shift) { return !(__builtin_fabsf(shift) <= kFar); }

TOKFUSE_BLOCK_LOOP static void subtract(float* u, int64_t n, float value) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) u[j] -= value;
}

template <class T, bool kTransform, bool kMoments>
TOKFUSE_BLOCK_LOOP static RowStats far_row_forward(const Row<T>& row, const Transform& f, float c,
                                                   float target_u, float row_max) {
  alignas(64) float buffer[kBlock];
  Accumulator<kMoments> acc;
  acc.shift = 0.0f;
  for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
    const int64_t n = row.vocab - begin < kBlock ? row.vocab - begin : kBlock;
    convert_block<T, kTransform>(row, f, begin, n, buffer);
    subtract(buffer, n, row_max);
    if (row.target >= begin && row.target < begin + n) buffer[row.target - begin] = -kInf;
    sum_block<kMoments>(buffer, n, c, 0.0f, acc);
  }
  RowStats out = finish<kMoments>(acc, c, target_u - row_max, 0.0f);
  out.lse += kLn2 * static_cast<double>(row_max) * c;
  out.shift = row_max * c;  // is_far(shift) tells the gradient to do the same
  out.row_max = row_max;
  return out;
}

template <class T, bool kTransform>
static inline float transformed_max(const Row<T>& row, const Transform& f) {
  alignas(64) float buffer[kBlock];
  float m = -kInf;
  for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
    const int64_t n = row.vocab - begin < kBlock ? row.vocab - begin : kBlock;
    const float block = stage_block<T, kTransform>(row, f, begin, n, buffer);
    if (block > m) m = block;
  }
  return m;
}

// Returns the statistics of one row. If `second` is not null, it receives the statistics at a
// second scale c2, from the same read. The block borders depend on the vocabulary only. So the
// result of a row depends neither on its batch nor on the number of threads.
template <class T, bool kTransform, bool kMoments, bool kKeep = false>
static inline RowStats row_forward(const Row<T>& row, const Transform& f, float c,
                                   RowStats* second = nullptr, float c2 = 0, KeptExps kept = {}) {
  // float32 is read without staging. The types of Lanes16 are read so by the fused loop, and staged
  // as float32 by the other loops.
  constexpr bool kDirect = IsSame<T, float>::value && !kTransform;
  constexpr bool kFusable = !kTransform && !kMoments;
  constexpr bool k16 = Lanes16<T>::kExists && kFusable;
  alignas(64) float buffer[2][kBlock];
  alignas(64) T others[kBlock];  // copy of the target's block with the target set to -inf
  Accumulator<kMoments> acc;
  Accumulator<false> acc2;
  float row_max = -kInf, target_u = -kInf;
  const int64_t vocab = row.vocab;
  auto width = [vocab](int64_t begin) {
    const int64_t left = vocab - begin;
    return left < kBlock ? left : kBlock;
  };
  auto raw = [&row](int64_t begin) { return row.block(begin) + begin; };
  auto stage = [&](int64_t begin, int slot, float* m) -> const float* {
    if constexpr (kDirect) {
      *m = block_max(raw(begin), width(begin));
      return raw(begin);
    }
    *m = stage_block<T, kTransform>(row, f, begin, width(begin), buffer[slot]);
    return buffer[slot];
  };

  float m = -kInf, min = -kInf;  // range of the block; a lower bound of its minimum is enough
  const float* u = nullptr;
  if constexpr (k16) {
    if (vocab >= kBlock) {
      const Range16<T> range = range_of(raw(0));
      m = range.max();
      min = range.min();
    }
  }
  if (vocab > 0 && (!k16 || vocab < kBlock)) u = stage(0, 0, &m);
  int slot = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock, slot ^= 1) {
    const int64_t n = width(begin), next = begin + kBlock;
    if (m > row_max || m != m) row_max = m;
    const bool has_target = row.target >= begin && row.target < begin + n;
    if (has_target) {
      target_u = u != nullptr ? u[row.target - begin] : load(raw(begin), row.target - begin);
    }
    // A fused loop that converts the next block needs a whole one.
    const bool ahead = next + kBlock <= vocab;
    const bool fused = kFusable && m > -kInf && (ahead || ((k16 || kDirect) && n == kBlock));
    if (u == nullptr && (!fused || second != nullptr)) u = stage(begin, slot, &m);
    const T* z = raw(begin);
    if (has_target) {
      if (kDirect || (k16 && fused)) {
        memcpy(static_cast<void*>(others), z, static_cast<size_t>(n) * sizeof(T));
        store(others, row.target - begin, -kInf);
        z = others;
      }
      if constexpr (kDirect) {
        u = others;
      } else if (u != nullptr) {
        buffer[slot][row.target - begin] = -kInf;
      }
    }
    if (second != nullptr) add_block<false>(u, n, c2, m, acc2);
    float next_m = -kInf, next_min = -kInf;
    const float* next_u = nullptr;
    if (kKeep) kept.shift[begin / kBlock] = kNotKept;
    if constexpr (kFusable) {
      if (fused) {
        BlockSums sums;
        acc.raise_shift(m * c);
        float* e = kKeep ? kept.e + begin : nullptr;
        // The last whole block has no next one and passes itself. Its prefetches mostly reach the
        // next row.
        const T* beside = ahead ? raw(next) : raw(begin);
        const T* after = raw(next + kBlock);
        if constexpr (k16) {
          // One less than LaneSums allows: the products are rounded differently.
          const bool bounded = !has_target && min * c - acc.shift >= -124.0f;
          if (LaneSums::kClampCosts && bounded) {
            sum_16<kKeep, false>(z, c, acc.shift, beside, after, e, &sums);
          } else {
            sum_16<kKeep, true>(z, c, acc.shift, beside, after, e, &sums);
          }
        } else {
          sum_and_stage<kKeep>(u, c, acc.shift, beside, after, buffer[slot ^ 1], e, &sums);
        }
        acc.add(sums);
        if (kKeep) kept.shift[begin / kBlock] = acc.shift;
        next_m = sums.max;
        next_min = sums.min;
        if constexpr (kDirect) {
          next_u = raw(next);
        } else if constexpr (!k16) {
          next_u = buffer[slot ^ 1];
        }
      }
    }
    if (!fused) add_block<kMoments>(u, n, c, m, acc);
    if (next < vocab && !(fused && ahead)) next_u = stage(next, slot ^ 1, &next_m);
    u = next_u;
    m = next_m;
    min = next_min;
  }
  const bool finite = __builtin_fabsf(row_max) < kInf;
  if (second != nullptr) {
    *second = finite && is_far(row_max * c2)
                  ? far_row_forward<T, kTransform, false>(row, f, c2, target_u, row_max)
                  : finish<false>(acc2, c2, target_u, row_max);
  }
  if (finite && is_far(row_max * c)) {
    return far_row_forward<T, kTransform, kMoments>(row, f, c, target_u, row_max);
  }
  return finish<kMoments>(acc, c, target_u, row_max);
}

// Elements below which one thread is faster: starting two threads takes about 5 us.
constexpr int64_t kSerialElements = 16384;

static inline int threads_for(const LogitsArgs& a) {
  return a.rows * a.vocab < kSerialElements ? 1 : a.threads;
}

static inline bool masked(const LogitsArgs& a, int64_t t) {
  return a.mask != nullptr && a.mask[t] == 0;
}

static inline float temperature_of(const LogitsArgs& a, int64_t t) {
  return a.temperatures != nullptr ? a.temperatures[t] : a.temperature;
}

static inline bool has_transform(const LogitsArgs& a) {
  return a.softcap != 0.0f || a.bias_logits != nullptr;
}

static inline Transform transform_of(const LogitsArgs& a) {
  return {a.softcap != 0.0f ? a.logit_scale / a.softcap : a.logit_scale, a.softcap, a.bias_scale};
}

// Returns c = log2(e) / temperature. For plain logits it includes logit_scale.
static inline float base2_scale(const LogitsArgs& a, float temperature) {
  const double scale = has_transform(a) ? 1.0 : a.logit_scale;
  return static_cast<float>(scale / temperature / kLn2);
}

// Returns the token of row i of the logits.
static inline int64_t token_of(const LogitsArgs& a, int64_t i) {
  return a.index != nullptr ? a.index[i] : i;
}

template <class T>
static inline Row<T> row_of(const LogitsArgs& a, int64_t i) {
  const T* bias =
      a.bias_logits == nullptr ? nullptr : static_cast<const T*>(a.bias_logits) + i * a.bias_stride;
  return {static_cast<const T*>(a.logits) + i * a.stride,
          bias,
          a.vocab,
          a.target[token_of(a, i)],
          a.tile > 0 ? a.tile : INT64_MAX,
          a.tile_stride};
}

static inline void write_row(const TokenStatsOut& o, int64_t t, const RowStats& r) {
  o.logp[t] = static_cast<float>(r.logp);
  o.entropy[t] = static_cast<float>(r.entropy);
  o.lse[t] = static_cast<float>(r.lse);
  o.sum_sq[t] = static_cast<float>(r.sum_sq);
  o.top1[t] = r.top1;
  o.row_max[t] = r.shift;
  o.inv_sum[t] = r.inv_sum;
  if (o.sum_p2_logp != nullptr) {
    o.sum_p2_logp[t] = static_cast<float>(r.sum_p2_logp);
    o.sum_p2_logp2[t] = static_cast<float>(r.sum_p2_logp2);
  }
}

template <class P>
struct RemovePointer;
template <class T>
struct RemovePointer<T*> {
  using type = T;
};

// Calls `run` with a null pointer of the element type.
template <class F>
static inline void by_dtype(const LogitsArgs& a, const F& run) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return run(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return run(static_cast<Float16*>(nullptr));
  }
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
