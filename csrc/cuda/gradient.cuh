// The gradient of one row of logits from its statistics: one read, one write, one exp per element.
// The formula is in rows.cuh.
#pragma once

#include "cuda/rows.cuh"

namespace tokfuse {
namespace cuda {

// Constants of one row's gradient.
struct Slopes {
  float c, m, a0, a1;
  float at_target;  // what the target's logit gets besides
  int target;       // its column; -1: none
};

__device__ __forceinline__ Slopes slopes_of(const Scale& scale, float m, float inv_sum,
                                            float entropy, float ga, float gh, int64_t y,
                                            int64_t vocab) {
  const bool has_target = y >= 0 && y < vocab;
  if (!has_target && ga != 0.0f) ga = nan_float();
  const float p_scale = scale.nats * inv_sum, log_s = -log2f(inv_sum) * kLn2;
  return {scale.c,
          m,
          -p_scale * (ga + gh * (entropy - log_s)),
          -p_scale * gh * scale.nats,
          scale.nats * ga,
          has_target ? static_cast<int>(y) : -1};
}

// Whole vectors [begin, end) of a row, and whether the elements behind the last whole one belong to
// it.
struct Part {
  int begin, end;
  bool has_last;
};

__device__ __forceinline__ Part part_of_row(int64_t vocab, int part, int parts, int items) {
  const int whole = static_cast<int>(vocab) / items, piece = (whole + parts - 1) / parts;
  const int begin = min(part * piece, whole), end = min(begin + piece, whole);
  return {begin, end, part == parts - 1 && vocab % items != 0};
}

// What every element gets, in place of u; the target's own term is not in it.
template <int kPairs, bool kTransform>
__device__ __forceinline__ void gradient_of(const Slopes& s, Pair* u, const Pair* slope) {
#pragma unroll
  for (int i = 0; i < kPairs; i++) {
    const Pair d = below(u[i], s.m);
    u[i] = mul2(exp2_pair(times(d, s.c), i), fma2({s.a1, s.a1}, d, {s.a0, s.a0}));
  }
  if constexpr (kTransform) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) u[i] = mul2(u[i], slope[i]);
  }
}

// The same of one element, before its slope.
__device__ __forceinline__ float gradient_at(const Slopes& s, float u) {
  const float d = max_nan(u - s.m, kFarthest);
  return exp2_fast(d * s.c) * fmaf(s.a1, d, s.a0);
}

// Elements [0, count) of a vector.
template <class T, class G>
__device__ __forceinline__ void store_elements(G* out, const Pair* v, int count) {
#pragma unroll
  for (int i = 0; i < kItems<T>; i++) {
    if (i < count) store_element(out + i, i % 2 == 0 ? v[i / 2].x : v[i / 2].y);
  }
}

// The block's threads write vectors [begin, end) of a row; `source` gives those of the logits.
template <class T, class G, bool kTransform, bool kAligned, class Source>
__device__ __forceinline__ void write_whole(const Transform& f, const Source& source, bool has_bias,
                                            G* grad, const Part& part, const Slopes& s,
                                            uint64_t policy) {
  constexpr int kPairs = kItems<T> / 2;
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll 2
  for (int v = part.begin + static_cast<int>(threadIdx.x); v < part.end; v += threads) {
    Pair u[kPairs], slope[kPairs];
    const Vec16 bias = kTransform && has_bias ? source.whole_bias(v) : Vec16();
    transformed<T, kTransform>(f, source.whole(v), bias, has_bias, u, slope);
    gradient_of<kPairs, kTransform>(s, u, slope);
    G* to = grad + static_cast<int64_t>(v) * kItems<T>;
    if (kAligned) {
      store_vector<kPairs>(to, u, policy);
    } else {
      store_elements<T>(to, u, kItems<T>);
    }
  }
}

// The vector behind the whole ones, by one thread.
template <class T, class G, bool kTransform>
__device__ __forceinline__ void write_last(const Transform& f, const GlobalRow<T, false>& row,
                                           G* grad, const Slopes& s) {
  constexpr int kPairs = kItems<T> / 2;
  Pair u[kPairs], slope[kPairs];
  const bool has_bias = kTransform && row.bias != nullptr;
  const Vec16 bias = has_bias ? row.last_bias() : Vec16();
  transformed<T, kTransform>(f, row.last(), bias, has_bias, u, slope);
  gradient_of<kPairs, kTransform>(s, u, slope);
  store_elements<T>(grad + row.vocab / kItems<T> * kItems<T>, u, row.vocab % kItems<T>);
}

template <class T, class G>
__device__ __forceinline__ void write_zeros(G* grad, int vocab, const Part& part, bool aligned,
                                            uint64_t policy) {
  const Pair none[kItems<T> / 2] = {};
  for (int v = part.begin + static_cast<int>(threadIdx.x); v < part.end;
       v += static_cast<int>(blockDim.x)) {
    G* to = grad + static_cast<int64_t>(v) * kItems<T>;
    if (aligned) {
      store_vector<kItems<T> / 2>(to, none, policy);
    } else {
      store_elements<T>(to, none, kItems<T>);
    }
  }
  if (part.has_last && threadIdx.x == blockDim.x - 1) {
    store_elements<T>(grad + vocab / kItems<T> * kItems<T>, none, vocab % kItems<T>);
  }
}

// The target's own term. The thread that writes the target's vector reads its logit before that and
// overwrites its gradient after, so that no element pays for a comparison and no thread waits.
template <class T, class G, bool kTransform>
struct TargetTerm {
  bool mine;
  Pair y;  // u and slope

  __device__ __forceinline__ TargetTerm(const Transform& f, const T* row, const T* bias, int vocab,
                                        const Part& part, const Slopes& s) {
    const int v = s.target / kItems<T>, threads = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x);
    const bool whole = v >= part.begin && v < part.end && (v - part.begin) % threads == thread;
    const bool last = part.has_last && v == vocab / kItems<T> && thread == threads - 1;
    mine = s.target >= 0 && (whole || last);
    y = mine ? element_of<T, kTransform>(f, row, bias, s.target) : Pair();
  }

  __device__ __forceinline__ void write(G* grad, const Slopes& s) const {
    if (!mine) return;
    store_element(grad + s.target, (gradient_at(s, y.x) + s.at_target) * y.y);
  }
};

// The block writes one part of a row from global memory. grad may be the row itself: each thread
// reads only what it writes.
template <class T, class G, bool kTransform>
__device__ __forceinline__ void write_gradient(const Transform& f, const T* logits, const T* bias,
                                               int vocab, G* grad, const Part& part,
                                               const Slopes& s, bool aligned, uint64_t policy) {
  const TargetTerm<T, G, kTransform> target(f, logits, bias, vocab, part, s);
  const bool has_bias = bias != nullptr;
  const GlobalRow<T, false> any = {logits, bias, vocab, policy};
  if (aligned) {
    const GlobalRow<T, true> row = {logits, bias, vocab, policy};
    write_whole<T, G, kTransform, true>(f, row, has_bias, grad, part, s, policy);
  } else {
    write_whole<T, G, kTransform, false>(f, any, has_bias, grad, part, s, policy);
  }
  if (part.has_last && threadIdx.x == blockDim.x - 1) {
    write_last<T, G, kTransform>(f, any, grad, s);
  }
  target.write(grad, s);
}

}  // namespace cuda
}  // namespace tokfuse
