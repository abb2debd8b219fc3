// 16-byte vectors of a row of logits: loads at any alignment, conversion to float32, the transform
// of logits, and stores.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace tokfuse {
namespace cuda {

// Initial value of every running maximum: the lowest float32. With -inf, (-inf) - (-inf) would give
// NaN.
constexpr float kLowestMax = -3.4028234663852886e38f;

// Elements of a vector.
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

// Loads elements [0, count) at any alignment. The remaining elements are -inf.
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

// Loads 16 bytes that begin at any element, from the 4-byte words that contain them.
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

// Converts a vector to float32 pairs.
__device__ __forceinline__ void to_pairs(const float*, const Vec16& v, Pair* out) {
  out[0] = {float_of(v.word[0]), float_of(v.word[1])};
  out[1] = {float_of(v.word[2]), float_of(v.word[3])};
}

template <class T>
__device__ __forceinline__ void to_pairs(const T*, const Vec16& v, Pair* out) {
#pragma unroll
  for (int w = 0; w < 4; w++) out[w] = unpack(T(), v.word[w]);
}

// Returns the maximum of kCount vectors. NaN is ignored. 16-bit floats are compared two at a time.
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

// store_vector stores kItems<T> values in the type of `out`, rounded once. These are 16 bytes, or 8
// (Vec8) for a 16-bit gradient of float32 logits.
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

// tanh(z k / (2 log2 e)) with one exponential and one reciprocal; absolute error 1.5e-7. With E =
// e^2x it is 1 - 2 / (E + 1). The rounding errors of the reciprocal and of E + 1, which would
// matter near 0, are corrected by the residual of the reciprocal. tanh is exactly -1 for -inf.
__device__ __forceinline__ Pair tanh_pair(Pair z, float k) {
  constexpr float kLimit = 40.0f;  // tanh is 1 there, and E stays finite
  Pair half = fma2(z, {k, k}, {-1.0f, -1.0f});
  half = {exp2_fast(min_nan(half.x, kLimit)), exp2_fast(min_nan(half.y, kLimit))};  // E / 2
  const Pair sum = fma2(half, {-1.0f, -1.0f}, {-0.5f, -0.5f});
  const Pair r = {reciprocal_fast(sum.x), reciprocal_fast(sum.y)};  // -2 / (E + 1)
  const Pair residual = fma2(half, r, fma2(r, {0.5f, 0.5f}, {1.0f, 1.0f}));
  return fma2(r, residual, add2(r, {1.0f, 1.0f}));
}

// Constants of u = cap tanh(pre z) - bias_scale bias; without a cap, u = scale z - bias_scale bias.
struct Transform {
  float cap, pre, scale, bias_scale;
};

__device__ __forceinline__ Transform transform_of(const LogitsArgs& a) {
  return {a.softcap, a.softcap != 0.0f ? a.logit_scale / a.softcap : a.logit_scale, a.logit_scale,
          a.bias_scale};
}

__device__ __forceinline__ float tanh_factor(const Transform& f) { return f.pre * (2.0f * kLog2E); }

// The softcapped logits of z, whose tangents are t.
__device__ __forceinline__ Pair capped_pair(const Transform& f, Pair z, Pair t) {
  const Pair u = mul2(t, {f.cap, f.cap});
  return {z.x == -inf_float() ? z.x : u.x, z.y == -inf_float() ? z.y : u.y};
}

// d u / d z where the tangent is t; 0 for an excluded logit, whose tangent is -1.
__device__ __forceinline__ Pair tanh_slope(const Transform& f, Pair t) {
  return fma2(mul2(t, {-f.scale, -f.scale}), t, {f.scale, f.scale});
}

// Replaces the logits in `u` by u and sets `slope` to d u / d z. An excluded logit stays -inf; with
// a cap its slope is 0.
template <int kPairs>
__device__ __forceinline__ void transform(const Transform& f, const Pair* bias, bool has_bias,
                                          Pair* u, Pair* slope) {
  const float none = -inf_float();
  if (f.cap != 0.0f) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const Pair t = tanh_pair(u[i], tanh_factor(f));
      slope[i] = tanh_slope(f, t);
      u[i] = capped_pair(f, u[i], t);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      u[i] = mul2(u[i], {f.pre, f.pre});
      slope[i] = {f.scale, f.scale};
    }
  }
  if (has_bias) {
    const Pair by = {-f.bias_scale, -f.bias_scale};
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const Pair sum = fma2(by, bias[i], u[i]);
      u[i] = {u[i].x == none ? none : sum.x, u[i].y == none ? none : sum.y};
    }
  }
}

// Factors of u: exp2(c u) and exp(nats u) are equal. Both are NaN if the temperature is not
// positive. For plain logits they include logit_scale.
struct Scale {
  float c, nats;
};

__device__ __forceinline__ Scale scale_at(const LogitsArgs& a, float temperature,
                                          bool transformed) {
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

// One row in global memory. kAligned: the row and its bias begin at multiples of 16 bytes.
template <class T, bool kAligned>
struct GlobalRow {
  const T* logits;
  const T* bias;  // or null
  int vocab;
  uint64_t policy;

  __device__ __forceinline__ Vec16 vector(const T* from, int v) const {
    from += static_cast<int64_t>(v) * kItems<T>;
    if (kAligned) return load16(from, policy);
    // At the ends of the row, load_words could read outside of it.
    const bool inner = sizeof(T) == 4 || (v > 0 && (v + 1) * kItems<T> < vocab);
    return inner ? load_words(from) : load_elements(from, kItems<T>);
  }
  __device__ __forceinline__ Vec16 whole(int v) const { return vector(logits, v); }
  __device__ __forceinline__ Vec16 whole_bias(int v) const { return vector(bias, v); }
  // The incomplete vector after the whole ones.
  __device__ __forceinline__ Vec16 last() const {
    const int v = vocab / kItems<T>;
    return load_elements(logits + v * kItems<T>, vocab % kItems<T>);
  }
  __device__ __forceinline__ Vec16 last_bias() const {
    const int v = vocab / kItems<T>;
    return load_elements(bias + v * kItems<T>, vocab % kItems<T>);
  }
};

// Computes u and the slope of a vector. For plain logits `slope` is not written.
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

// Returns (u, slope) of column y of a row.
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

}  // namespace cuda
}  // namespace tokfuse
