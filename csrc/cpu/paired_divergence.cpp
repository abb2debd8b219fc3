// paired_divergence: the divergence of two rows of logits, and its gradient with respect to the
// logits of P.
//
// The first pass over both rows computes their log-sum-exps. A KL comes out of the same pass, from
//     KL(P || Q) = sum e_p (d_p - d_q) / (T S_p) - log(S_p / S_q),   d = u - max u,
// if it is at least kClose. Closer rows cancel there. They and every other kind take a second pass
// over both rows, which are in the L2 cache by then. Exponentials per element: 2 in the first pass,
// 2 in the second one and 2 in the backward, and a logarithm if there is a mixture.
//
// If the log-sum-exps are given, the row is some columns of a longer one, and the second pass alone
// sums its share. The KL of columns comes from their own log-sum-exps instead; see
// runtime/distributed/pair_shard.py.
#include "cpu/distribution_kernels.h"
#include "cpu/divergence.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

LogitsArgs rows_of(const DivergenceArgs& a, const void* logits, int64_t stride) {
  LogitsArgs r = {};
  r.logits = logits;
  r.stride = stride;
  r.dtype = a.dtype;
  r.rows = r.tokens = a.tokens;
  r.vocab = a.vocab;
  r.mask = a.mask;
  r.temperatures = a.temperatures;
  r.temperature = a.temperature;
  r.softcap = a.softcap;
  r.logit_scale = a.logit_scale;
  r.threads = a.threads;
  return r;
}

template <class T>
Row<T> pair_row(const void* logits, int64_t stride, int64_t vocab, int64_t t) {
  return {static_cast<const T*>(logits) + t * stride, nullptr, vocab, -1};
}

// Return block `begin` of a row in float32: the row itself if it is plain float32, else a copy in
// `buffer`.
template <class T, bool kTransform>
const float* block_of(const Row<T>& row, const Transform& f, int64_t begin, int64_t n,
                      float* buffer) {
  if (sizeof(T) == 4 && !kTransform) return reinterpret_cast<const float*>(row.z) + begin;
  convert_block<T, kTransform>(row, f, begin, n, buffer);
  return buffer;
}

// Call run(begin, n, up, uq) for each block of both rows.
template <class T, bool kTransform, class F>
void for_blocks(const Row<T>& p, const Row<T>& q, const Transform& f, const F& run) {
  alignas(64) float p_buffer[kBlock], q_buffer[kBlock];
  for (int64_t begin = 0; begin < p.vocab; begin += kBlock) {
    const int64_t left = p.vocab - begin, n = left < kBlock ? left : kBlock;
    const float* up = block_of<T, kTransform>(p, f, begin, n, p_buffer);
    const float* uq = block_of<T, kTransform>(q, f, begin, n, q_buffer);
    run(begin, n, up, uq);
  }
}

// The running sums of the first pass, relative to the maxima so far.
struct PairSums {
  float p_max = -kInf, q_max = -kInf;  // largest transformed logits; -inf: no distribution
  double p_sum = 0, q_sum = 0;         // of 2^((u - max) c)
  double cross = 0;                    // of e_p (d_p - d_q), or of e_q (d_q - d_p) for kForwardKl
};

struct BlockSums {
  float p_sum, q_sum, cross;
};

// A maximum that is still -inf is passed as 0.
template <Divergence kKind>
TOKFUSE_BLOCK_LOOP static void sum_exps(const float* __restrict up, const float* __restrict uq,
                                        int64_t n, float p_max, float q_max, float c,
                                        BlockSums* out) {
  const float floor = opaque(kExponentFloor);
  float p_sum = 0, q_sum = 0, cross = 0;
#pragma omp simd reduction(+ : p_sum, q_sum, cross)
  for (int64_t j = 0; j < n; j++) {
    const float dp = up[j] - p_max, dq = uq[j] - q_max;
    const float ep = exp2_simd(clamp_exponent(dp * c, floor));
    const float eq = exp2_simd(clamp_exponent(dq * c, floor));
    p_sum += ep;
    q_sum += eq;
    if (kKind == Divergence::kReverseKl) cross += ep * (dp - dq);
    if (kKind == Divergence::kForwardKl) cross += eq * (dq - dp);
  }
  *out = {p_sum, q_sum, cross};
}

// Raise one maximum and rescale its sum. Return the step; 0 for the first maximum.
inline double raise(float* max, float block, float c, double* sum) {
  if (!(block > *max)) return 0.0;
  const double step = *max > -kInf ? static_cast<double>(block) - *max : 0.0;
  *sum *= ::exp2(-step * c);
  *max = block;
  return step;
}

template <class T, bool kTransform, Divergence kKind>
PairSums sum_pair(const Row<T>& p, const Row<T>& q, const Transform& f, float c) {
  PairSums s;
  for_blocks<T, kTransform>(p, q, f, [&](int64_t, int64_t n, const float* up, const float* uq) {
    const double p_before = s.p_sum, q_before = s.q_sum;
    const double p_step = raise(&s.p_max, block_max(up, n), c, &s.p_sum);
    const double q_step = raise(&s.q_max, block_max(uq, n), c, &s.q_sum);
    if (kKind == Divergence::kReverseKl && p_before > 0) {
      s.cross = (s.cross - (p_step - q_step) * p_before) * (s.p_sum / p_before);
    } else if (kKind == Divergence::kForwardKl && q_before > 0) {
      s.cross = (s.cross - (q_step - p_step) * q_before) * (s.q_sum / q_before);
    }
    BlockSums block;
    sum_exps<kKind>(up, uq, n, s.p_max > -kInf ? s.p_max : 0.0f, s.q_max > -kInf ? s.q_max : 0.0f,
                    c, &block);
    s.p_sum += block.p_sum;
    s.q_sum += block.q_sum;
    s.cross += block.cross;
  });
  // A row with NaN is computed like any other, so that NaN reaches the result.
  if (s.p_sum != s.p_sum) s.p_max = 0.0f;
  if (s.q_sum != s.q_sum) s.q_max = 0.0f;
  return s;
}

// Return the KL from the first pass. An excluded entry makes it NaN or infinite.
template <Divergence kKind>
double kl_of(const PairSums& s, float c) {
  const double nats = static_cast<double>(c) * kLn2;
  if (kKind == Divergence::kReverseKl) return s.cross / s.p_sum * nats - ::log(s.p_sum / s.q_sum);
  return s.cross / s.q_sum * nats - ::log(s.q_sum / s.p_sum);
}

template <class T, bool kTransform, Divergence kKind>
void forward_row(const DivergenceArgs& a, const LogitsArgs& rows, const Transform& f, int64_t t,
                 float* divergence, float* state) {
  memset(static_cast<void*>(state), 0, kDivergenceState * sizeof(float));
  *divergence = 0.0f;
  if (masked(rows, t)) return;
  const Row<T> p = pair_row<T>(a.logits_p, a.stride_p, a.vocab, t);
  const Row<T> q = pair_row<T>(a.logits_q, a.stride_q, a.vocab, t);
  const float c = base2_scale(rows, temperature_of(rows, t));
  double total = 0;
  if (a.given != nullptr) {
    memcpy(state, a.given + t * kDivergenceState, kDivergenceState * sizeof(float));
    if (state[0] == 0.0f) return;
  } else {
    const PairSums s = sum_pair<T, kTransform, kKind>(p, q, f, c);
    const float sums[] = {0.0f, s.p_max, s.q_max, static_cast<float>(::log2(s.p_sum)),
                          static_cast<float>(::log2(s.q_sum))};
    memcpy(state, sums, sizeof(sums));
    if (s.p_max == -kInf || s.q_max == -kInf) return;  // only -inf: no distribution
    if (is_kl(kKind)) total = kl_of<kKind>(s, c);
  }
  const Pair w = pair_of(a.kind, a.mix_weight, c, state[1], state[2], state[3], state[4], 0.0f);
  double mean = total;
  if (!(total >= kClose)) {
    total = mean = 0;
    for_blocks<T, kTransform>(p, q, f, [&](int64_t, int64_t n, const float* up, const float* uq) {
      Sums sums;
      sum_terms<kKind>(up, uq, n, w, &sums);
      total += sums.total;
      mean += sums.mean;
    });
  }
  if (a.given == nullptr) {
    if (total < 0) total = 0;
    if (total > a.bound) total = a.bound;
  }
  *divergence = static_cast<float>(total);
  state[0] = *divergence == kInf ? 0.0f : 1.0f;
  state[5] = static_cast<float>(mean);
}

template <class T, bool kTransform, Divergence kKind>
void forward(const DivergenceArgs& a, const DivergenceOut& out) {
  const LogitsArgs rows = rows_of(a, a.logits_p, a.stride_p);
  const Transform f = transform_of(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(rows))
  for (int64_t t = 0; t < a.tokens; t++) {
    forward_row<T, kTransform, kKind>(a, rows, f, t, out.divergence + t,
                                      out.state + t * kDivergenceState);
  }
}

template <class T, bool kTransform, Divergence kKind>
void backward(const DivergenceArgs& a, const DivergenceGrad& g) {
  const LogitsArgs rows = rows_of(a, a.logits_p, a.stride_p);
  const Transform f = transform_of(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(rows))
  for (int64_t t = 0; t < a.tokens; t++) {
    const float* s = g.state + t * kDivergenceState;
    T* row_out = static_cast<T*>(g.grad_logits) + t * g.grad_stride;
    if (s[0] == 0.0f || g.grad_divergence[t] == 0.0f) {
      memset(static_cast<void*>(row_out), 0, static_cast<size_t>(a.vocab) * sizeof(T));
      continue;
    }
    const float temperature = temperature_of(rows, t);
    const Pair w =
        pair_of(a.kind, a.mix_weight, base2_scale(rows, temperature), s[1], s[2], s[3], s[4], s[5]);
    const float scale = g.grad_divergence[t] * a.logit_scale / temperature;
    const Row<T> p = pair_row<T>(a.logits_p, a.stride_p, a.vocab, t);
    const Row<T> q = pair_row<T>(a.logits_q, a.stride_q, a.vocab, t);
    alignas(64) float du[kBlock];
    for_blocks<T, kTransform>(
        p, q, f, [&](int64_t begin, int64_t n, const float* up, const float* uq) {
          if (sizeof(T) == 4 && !kTransform) {
            return gradient_terms<kKind>(up, uq, n, w, scale,
                                         reinterpret_cast<float*>(row_out) + begin);
          }
          gradient_terms<kKind>(up, uq, n, w, scale, du);
          if (kTransform) scale_by_slope(p, f, begin, n, du);
          store_block(du, n, row_out + begin);
        });
  }
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Call run(null pointer of the element type, Flag of a softcap, Kind).
template <class F>
void dispatch(const DivergenceArgs& a, const F& run) {
  by_dtype(rows_of(a, a.logits_p, a.stride_p), [&](auto* type) {
    by_kind(a.kind, [&](auto kind) {
      a.softcap != 0.0f ? run(type, Flag<true>(), kind) : run(type, Flag<false>(), kind);
    });
  });
}

}  // namespace

void paired_divergence_fwd(const DivergenceArgs& a, const DivergenceOut& out) {
  dispatch(a, [&](auto* type, auto transform, auto kind) {
    using T = typename RemovePointer<decltype(type)>::type;
    forward<T, decltype(transform)::value, decltype(kind)::value>(a, out);
  });
}

void paired_divergence_bwd(const DivergenceArgs& a, const DivergenceGrad& g) {
  dispatch(a, [&](auto* type, auto transform, auto kind) {
    using T = typename RemovePointer<decltype(type)>::type;
    backward<T, decltype(transform)::value, decltype(kind)::value>(a, g);
  });
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
