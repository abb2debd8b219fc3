// The gradient of one row of logits from its statistics: one read, one write and one exponential
// per element. rows.cuh has the formula.
#pragma once

#include "cuda/rows.cuh"

namespace tokfuse {
namespace cuda {

// Value of a target that belongs to another shard of the vocabulary. That shard adds the term of
// the target.
constexpr int64_t kElsewhere = -(int64_t{1} << 31);

// Constants of one row's gradient.
struct Slopes {
  static constexpr bool kSum = false;
  float c, m, a0, a1;
  float nats, logp, entropy, ga, gh;  // for the target's entry
  int target;                         // its column; -1: none
};

// The same with the gradient gl p_j of lse.
struct LseSlopes : Slopes {
  float gl;
};

__device__ __forceinline__ LseSlopes with_lse(Slopes s, float inv_sum, float gl) {
  s.a0 += s.nats * inv_sum * gl;
  return {s, gl};
}

// The same with the gradient k weight_j of a sum over the classes.
struct SumSlopes : LseSlopes {
  static constexpr bool kSum = true;
  float k;
  const float* weight;  // of the element at column 0; null: 1
  int columns;

  __device__ __forceinline__ float at(int column) const {
    return weight == nullptr || column >= columns ? k : k * weight[column];
  }
};

// The constants for columns that are counted from `head`.
__device__ __forceinline__ Slopes from_column(const Slopes& s, int) { return s; }
__device__ __forceinline__ SumSlopes from_column(SumSlopes s, int head) {
  if (s.weight != nullptr) s.weight += head;
  s.columns -= head;
  return s;
}

__device__ __forceinline__ Slopes slopes_of(const Scale& scale, float m, float inv_sum, float logp,
                                            float entropy, float ga, float gh, int64_t y,
                                            int64_t vocab) {
  const bool has_target = y >= 0 && y < vocab;
  if (!has_target && y != kElsewhere && ga != 0.0f) ga = nan_float();
  const float p_scale = scale.nats * inv_sum, log_s = -log2f(inv_sum) * kLn2;
  return {scale.c,
          m,
          -p_scale * (ga + gh * (entropy - log_s)),
          -p_scale * gh * scale.nats,
          scale.nats,
          logp,
          entropy,
          ga,
          gh,
          has_target ? static_cast<int>(y) : -1};
}

// A part of a row: the whole vectors [begin, end). Vector 0 begins at element `head`, which is at a
// multiple of 16 bytes in the output. The first part may also have the elements before `head`, and
// the last part those after the last whole vector.
struct Part {
  int begin, end, head;
  bool has_head, has_last;
};

// `together`: in each row, all tensors have the same offset from a multiple of 16 bytes, so that
// vectors can be aligned in all of them. The result does not depend on which thread writes an
// element, so vectors may begin at `head`.
template <class T>
__device__ __forceinline__ Part part_of_row(const T* row, int64_t vocab, int part, int parts,
                                            bool together) {
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int size = static_cast<int>(vocab);
  const int head = together && lead > 0 ? min(kItems<T> - lead, size) : 0;
  const int whole = (size - head) / kItems<T>, piece = (whole + parts - 1) / parts;
  const int begin = min(part * piece, whole), end = min(begin + piece, whole);
  return {begin, end, head, part == 0 && head > 0,
          part == parts - 1 && (size - head) % kItems<T> != 0};
}

// True in the thread that writes the elements before `head`, or after the last whole vector.
__device__ __forceinline__ bool writes_head() { return threadIdx.x == blockDim.x - 2; }
__device__ __forceinline__ bool writes_last() { return threadIdx.x == blockDim.x - 1; }

// Replaces u by the gradient of each element; the target's entry is written separately. kShare (see
// exp2_pair) may be used only if vectors begin at the same elements in every row. Otherwise the
// result of a row would depend on its address. `column` is that of the first element.
template <int kPairs, bool kTransform, int kShare, class S>
__device__ __forceinline__ void gradient_of(const S& s, int column, Pair* u, const Pair* slope) {
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const Pair d = below(u[i], s.m);
    u[i] = mul2(exp2_pair<kShare>(times(d, s.c), i), fma2({s.a1, s.a1}, d, {s.a0, s.a0}));
  }
  if constexpr (S::kSum) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      u[i] = add2(u[i], {s.at(column + 2 * i), s.at(column + 2 * i + 1)});
    }
  }
  if constexpr (kTransform) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) u[i] = mul2(u[i], slope[i]);
  }
}

// The same for one element, before the multiplication by its slope.
__device__ __forceinline__ float gradient_at(const Slopes& s, float u) {
  const float d = max_nan(u - s.m, kFarthest);
  return exp2_fast(d * s.c) * fmaf(s.a1, d, s.a0);
}

// Returns the target's entry, before the multiplication by its slope. It is not computed as the
// entry of any element plus nats * ga, because the two cancel near p = 1.
__device__ __forceinline__ float target_gradient(const Slopes& s) {
  const float rest = -expm1f(s.logp);  // 1 - p
  const float p = exp2_fast(s.logp * kLog2E);
  const float log_term = s.logp == -inf_float() ? 0.0f : p * (s.logp + s.entropy);
  return s.nats * (s.ga * rest - s.gh * log_term);
}

__device__ __forceinline__ float target_gradient(const LseSlopes& s) {
  const float p = exp2_fast(s.logp * kLog2E);
  return target_gradient(static_cast<const Slopes&>(s)) + s.nats * s.gl * p;
}

__device__ __forceinline__ float target_gradient(const SumSlopes& s) {
  return target_gradient(static_cast<const LseSlopes&>(s)) + s.at(s.target);
}

// Stores elements [0, count) of a vector.
template <class T, class G>
__device__ __forceinline__ void store_elements(G* out, const Pair* v, int count) {
#pragma unroll
  for (int i = 0; i < kItems<T>; i++) {
    if (i < count) store_element(out + i, i % 2 == 0 ? v[i / 2].x : v[i / 2].y);
  }
}

template <class T, class G, bool kTransform, bool kAligned, int kShare, class S>
__device__ __forceinline__ void write_vector(const Transform& f, const Vec16& z, const Vec16& bias,
                                             bool has_bias, G* to, const S& s, int column,
                                             uint64_t policy) {
  constexpr int kPairs = kItems<T> / 2;
  Pair u[kPairs], slope[kPairs];
  transformed<T, kTransform>(f, z, bias, has_bias, u, slope);
  gradient_of<kPairs, kTransform, kShare>(s, column, u, slope);
  if (kAligned) {
    store_vector<kPairs>(to, u, policy);
  } else {
    store_elements<T>(to, u, kItems<T>);
  }
}

// The threads of the block write the gradient of whole vectors [begin, end). `source` loads the
// vectors of the logits. kAhead: vectors that a thread loads before it computes on the first one.
template <class T, class G, bool kTransform, bool kAligned, int kShare, int kAhead, class Source,
          class S>
__device__ __forceinline__ void write_whole(const Transform& f, const Source& source, bool has_bias,
                                            G* grad, int begin, int end, const S& s,
                                            uint64_t policy) {
  const int threads = static_cast<int>(blockDim.x);
  const auto write = [&](int v, const Vec16& z, const Vec16& bias) {
    G* to = grad + static_cast<int64_t>(v) * kItems<T>;
    write_vector<T, G, kTransform, kAligned, kShare>(f, z, bias, has_bias, to, s, v * kItems<T>,
                                                     policy);
  };
  Vec16 z[kAhead], bias[kAhead] = {};
  int v = begin + static_cast<int>(threadIdx.x);
  for (; v + (kAhead - 1) * threads < end; v += kAhead * threads) {
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      z[j] = source.whole(v + j * threads);
      if (kTransform && has_bias) bias[j] = source.whole_bias(v + j * threads);
    }
#pragma unroll
    for (int j = 0; j < kAhead; j++) write(v + j * threads, z[j], bias[j]);
  }
  if constexpr (kAhead > 1) {
    for (; v < end; v += threads) {
      if (kTransform && has_bias) bias[0] = source.whole_bias(v);
      write(v, source.whole(v), bias[0]);
    }
  }
}

// One thread writes elements [begin, begin + count), fewer than a vector.
template <class T, class G, bool kTransform, class S>
__device__ __forceinline__ void write_few(const Transform& f, const T* logits, const T* bias,
                                          G* grad, int begin, int count, const S& s) {
  constexpr int kPairs = kItems<T> / 2;
  Pair u[kPairs], slope[kPairs];
  const bool has_bias = kTransform && bias != nullptr;
  const Vec16 b = has_bias ? load_elements(bias + begin, count) : Vec16();
  transformed<T, kTransform>(f, load_elements(logits + begin, count), b, has_bias, u, slope);
  gradient_of<kPairs, kTransform, kNoPolynomial>(s, begin, u, slope);
  store_elements<T>(grad + begin, u, count);
}

template <class T, class G, bool kTransform, class S>
__device__ __forceinline__ void write_ends(const Transform& f, const T* logits, const T* bias,
                                           int vocab, G* grad, const Part& part, const S& s) {
  if (part.has_head && writes_head()) {
    write_few<T, G, kTransform>(f, logits, bias, grad, 0, part.head, s);
  }
  if (part.has_last && writes_last()) {
    const int count = (vocab - part.head) % kItems<T>;
    write_few<T, G, kTransform>(f, logits, bias, grad, vocab - count, count, s);
  }
}

template <class T, class G>
__device__ __forceinline__ void write_zeros(G* grad, int vocab, const Part& part, bool together,
                                            uint64_t policy) {
  const Pair none[kItems<T> / 2] = {};
  for (int v = part.begin + static_cast<int>(threadIdx.x); v < part.end;
       v += static_cast<int>(blockDim.x)) {
    G* to = grad + part.head + static_cast<int64_t>(v) * kItems<T>;
    if (together) {
      store_vector<kItems<T> / 2>(to, none, policy);
    } else {
      store_elements<T>(to, none, kItems<T>);
    }
  }
  if (part.has_head && writes_head()) store_elements<T>(grad, none, part.head);
  if (part.has_last && writes_last()) {
    const int count = (vocab - part.head) % kItems<T>;
    store_elements<T>(grad + vocab - count, none, count);
  }
}

// The target's entry. The thread that writes the element of the target first computes this entry
// (the slope needs the logit, which may be overwritten), then overwrites the element. So no other
// element needs a comparison, and no barrier is needed.
template <class T, class G, bool kTransform>
struct TargetTerm {
  bool mine;
  float value;

  template <class S>
  __device__ __forceinline__ TargetTerm(const Transform& f, const T* row, const T* bias, int vocab,
                                        const Part& part, const S& s) {
    const int at = s.target - part.head, v = at / kItems<T>;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    if (at < 0) {
      mine = part.has_head && writes_head() && s.target >= 0;
    } else if (v < part.end) {
      mine = v >= part.begin && (v - part.begin) % threads == thread;
    } else {
      mine = part.has_last && writes_last() && v == (vocab - part.head) / kItems<T>;
    }
    value = 0.0f;
    if (!mine) return;
    value = target_gradient(s);
    if constexpr (kTransform) value *= element_of<T, kTransform>(f, row, bias, s.target).y;
  }

  __device__ __forceinline__ void write(G* grad, const Slopes& s) const {
    if (mine) store_element(grad + s.target, value);
  }
};

// The block writes one part of a row from global memory. `grad` may be the row itself: each thread
// reads only the elements that it writes.
template <class T, class G, bool kTransform, int kAhead, class S>
__device__ __forceinline__ void write_gradient(const Transform& f, const T* logits, const T* bias,
                                               int vocab, G* grad, const Part& part, const S& s,
                                               bool together, uint64_t policy) {
  const TargetTerm<T, G, kTransform> target(f, logits, bias, vocab, part, s);
  const bool has_bias = bias != nullptr;
  if (together) {
    const T* shifted = has_bias ? bias + part.head : nullptr;
    const GlobalRow<T, true> row = {logits + part.head, shifted, vocab - part.head, policy};
    write_whole<T, G, kTransform, true, kNoPolynomial, kAhead>(f, row, has_bias, grad + part.head,
                                                               part.begin, part.end,
                                                               from_column(s, part.head), policy);
  } else {
    const GlobalRow<T, false> row = {logits, bias, vocab, policy};
    write_whole<T, G, kTransform, false, kNoPolynomial, kAhead>(f, row, has_bias, grad, part.begin,
                                                                part.end, s, policy);
  }
  write_ends<T, G, kTransform>(f, logits, bias, vocab, grad, part, s);
  target.write(grad, s);
}

}  // namespace cuda
}  // namespace tokfuse
