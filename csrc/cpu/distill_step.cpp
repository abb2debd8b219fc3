// distill_rows computes statistics, divergence and gradient of each row of a student and a teacher.
// Each side has its own options. Memory traffic: one read of each side and one write. Exponentials
// per element: 1 for the statistics of a side, 2 for the divergence, 2 for the gradient.
#include "cpu/distribution_kernels.h"
#include "cpu/divergence.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

// One side's element type and options, looked up once per call and not once per block.
struct Side {
  const LogitsArgs& a;
  Transform f;
  const float* (*block)(const Side& s, int64_t i, int64_t begin, int64_t n, float* buffer);
  RowStats (*stats)(const Side& s, int64_t i, float c);
  // du, the gradient of block `begin` by the transformed logits, to row i of `out`; may change du.
  void (*store)(const Side& s, int64_t i, int64_t begin, int64_t n, float* du, const GradRows& out);
  void (*zero)(const Side& s, int64_t i, const GradRows& out);
  // Where block `begin` of the gradient lies if nothing is left to do for `store`, else null.
  float* (*direct)(const Side& s, int64_t i, int64_t begin, const GradRows& out);
};

template <class T>
T* grad_block(const Row<T>& row, int64_t i, int64_t begin, const GradRows& out) {
  return static_cast<T*>(out.grad_logits) + i * out.grad_stride + (row.block(begin) - row.z) +
         begin;
}

template <class T, bool kTransform>
Side side_of_type(const LogitsArgs& a) {
  constexpr bool kDirect = IsSame<T, float>::value && !kTransform;
  return {a,
          transform_of(a),
          [](const Side& s, int64_t i, int64_t begin, int64_t n, float* buffer) -> const float* {
            const Row<T> row = row_of<T>(s.a, i);
            if constexpr (kDirect) return row.block(begin) + begin;
            convert_block<T, kTransform>(row, s.f, begin, n, buffer);
            return buffer;
          },
          [](const Side& s, int64_t i, float c) {
            return row_forward<T, kTransform, false>(row_of<T>(s.a, i), s.f, c);
          },
          [](const Side& s, int64_t i, int64_t begin, int64_t n, float* du, const GradRows& out) {
            const Row<T> row = row_of<T>(s.a, i);
            if (kTransform && s.f.cap != 0.0f) scale_by_slope(row, s.f, begin, n, du);
            store_block(du, n, grad_block(row, i, begin, out));
          },
          [](const Side& s, int64_t i, const GradRows& out) {
            const Row<T> row = row_of<T>(s.a, i);
            for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
              const int64_t left = row.vocab - begin, n = left < kBlock ? left : kBlock;
              memset(static_cast<void*>(grad_block(row, i, begin, out)), 0,
                     static_cast<size_t>(n) * sizeof(T));
            }
          },
          [](const Side& s, int64_t i, int64_t begin, const GradRows& out) -> float* {
            if constexpr (kDirect) return grad_block(row_of<T>(s.a, i), i, begin, out);
            return nullptr;
          }};
}

Side side_of(const LogitsArgs& a) {
  const bool transform = has_transform(a);
  switch (a.dtype) {
    case DType::kBFloat16:
      return transform ? side_of_type<BFloat16, true>(a) : side_of_type<BFloat16, false>(a);
    case DType::kFloat16:
      return transform ? side_of_type<Float16, true>(a) : side_of_type<Float16, false>(a);
    case DType::kFloat32:
      break;
  }
  return transform ? side_of_type<float, true>(a) : side_of_type<float, false>(a);
}

// (u - max) ratio: the teacher's exponents in the student's unit, where the two differ.
TOKFUSE_BLOCK_LOOP static void rescale(const float* u, int64_t n, float max, float ratio,
                                       float* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) out[j] = (u[j] - max) * ratio;
}

// Whether one column attains both maxima.
TOKFUSE_BLOCK_LOOP static bool maxima_meet(const float* up, const float* uq, int64_t n, float p_max,
                                           float q_max) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t j = 0; j < n; j++) found |= (up[j] == p_max) & (uq[j] == q_max);
  return found != 0;
}

// du += p (b0 + b1 log2 p): logp and the entropy of P, without the target's one-hot.
TOKFUSE_BLOCK_LOOP static void add_stats_gradient(const float* __restrict up, int64_t n,
                                                  const Pair& pair, float b0, float b1,
                                                  float* __restrict du) {
  const Pair w = pair;
  const float floor = opaque(kExponentFloor);
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const float x = clamp_exponent((up[j] - w.p_max) * w.c - w.p_log2s, floor);
    du[j] += exp2_simd(x) * (b0 + b1 * x);
  }
}

// log2 of the sum of 2^((u - row_max) c).
double log2_sum(const RowStats& r, float c) {
  return r.lse / kLn2 - static_cast<double>(r.row_max) * c;
}

// Blocks of a row of the two sides as `element` takes them.
struct PairedBlocks {
  const Side &p, &q;
  int64_t i, iq;  // rows
  float q_max, ratio;
  alignas(64) float p_buffer[kBlock], q_buffer[kBlock];

  const float* of_p(int64_t begin, int64_t n) { return p.block(p, i, begin, n, p_buffer); }
  const float* of_q(int64_t begin, int64_t n) {
    const float* u = q.block(q, iq, begin, n, q_buffer);
    if (ratio == 1.0f) return u;
    rescale(u, n, q_max, ratio, q_buffer);
    return q_buffer;
  }
};

// p and slope of every element of a row, from the pass that sums the divergence.
struct Kept {
  float* p;
  float* slope;
};

template <Divergence kKind>
TOKFUSE_BLOCK_LOOP static void sum_and_keep(const float* __restrict up, const float* __restrict uq,
                                            int64_t n, const Pair& pair, float* __restrict p,
                                            float* __restrict slope, Sums* out) {
  const Pair w = pair;
  const float floor = opaque(kExponentFloor);
  float total = 0, mean = 0;
#pragma omp simd reduction(+ : total, mean)
  for (int64_t j = 0; j < n; j++) {
    const Element e = element<kKind>(up[j], uq[j], w, floor);
    p[j] = e.p;
    slope[j] = e.slope;
    total += e.term;
    if (kKind != Divergence::kForwardKl) mean += e.p * e.slope;
  }
  *out = {total, mean};
}

// As gradient_terms, from what was kept.
template <Divergence kKind>
TOKFUSE_BLOCK_LOOP static void kept_gradient(const float* __restrict p,
                                             const float* __restrict slope, int64_t n, float mean,
                                             float scale, float* __restrict out) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    out[j] = scale * (kKind == Divergence::kForwardKl ? slope[j] : p[j] * (slope[j] - mean));
  }
}

struct KlSums {
  float sum, cross;
};

// A KL of rows that are not close, by one exponential for each distribution that it needs: of P for
// the reverse one, whose gradient is p (log(p / q) - KL), of both for the forward one. `cross` is
// the sum of r log2(r / other) with r the distribution of the average, up to log2 S, and `sum` that
// of r. A close KL cancels here, and an excluded entry may give NaN: `sum_and_keep` computes those.
template <Divergence kKind>
TOKFUSE_BLOCK_LOOP static void sum_kl(const float* __restrict up, const float* __restrict uq,
                                      int64_t n, const Pair& pair, float* __restrict p,
                                      float* __restrict slope, KlSums* out) {
  const Pair w = pair;
  const float floor = opaque(kExponentFloor);
  float sum = 0, cross = 0;
#pragma omp simd reduction(+ : sum, cross)
  for (int64_t j = 0; j < n; j++) {
    const float xp = (up[j] - w.p_max) * w.c, xq = (uq[j] - w.q_max) * w.c;
    const float of_p = exp2_simd(clamp_exponent(xp - w.p_log2s, floor));
    if (kKind == Divergence::kReverseKl) {
      sum += of_p;
      cross += of_p * (xp - xq);
      p[j] = of_p;
      slope[j] = ((xp - xq) - (w.p_log2s - w.q_log2s)) * kLn2f;
    } else {
      const float of_q = exp2_simd(clamp_exponent(xq - w.q_log2s, floor));
      sum += of_q;
      cross += of_q * (xq - xp);
      slope[j] = of_p - of_q;
    }
  }
  *out = {sum, cross};
}

// A JSD below this is summed again by `sum_and_keep`. `sum_jsd` is within 2e-5 of it here, as
// `sum_and_keep` is, and within 3e-4 at 1e-4.
constexpr double kCloseJsd = 1e-3;

// A JSD of rows that are not close: the logarithms of p and q are known, and the exponent of the
// mixture is subtracted from them before the logarithm of its fraction. So the absolute error is
// that of a fraction, about 3e-7. The kernel takes 14.6 ms with it and 18.0 ms with `sum_and_keep`
// (256 x 49152, two threads, AVX-512).
TOKFUSE_BLOCK_LOOP static void sum_jsd(const float* __restrict up, const float* __restrict uq,
                                       int64_t n, const Pair& pair, float* __restrict p,
                                       float* __restrict slope, Sums* out) {
  const Pair w = pair;
  const float floor = opaque(kExponentFloor);
  float total = 0, mean = 0;
#pragma omp simd reduction(+ : total, mean)
  for (int64_t j = 0; j < n; j++) {
    const float lp = clamp_exponent((up[j] - w.p_max) * w.c - w.p_log2s, floor);
    const float lq = clamp_exponent((uq[j] - w.q_max) * w.c - w.q_log2s, floor);
    const float of_p = exp2_simd(lp), of_q = exp2_simd(lq);
    const float p_part = w.p_weight * of_p, q_part = w.q_weight * of_q;
    const Binary mix = binary_of(p_part + q_part);
    const float of_fraction = log_of_fraction(mix.fraction);
    const float log_p = (lp - mix.exponent) * kLn2f - of_fraction;  // log(p / mix)
    const float log_q = (lq - mix.exponent) * kLn2f - of_fraction;
    p[j] = of_p;
    slope[j] = w.p_weight * log_p;
    total += p_part * log_p + q_part * log_q;
    mean += p_part * log_p;
  }
  *out = {total, mean};
}

struct Coefficients {
  float divergence, logp, entropy, lse, lse_square, logit_sum;

  bool of_stats() const {
    return logp != 0.0f || entropy != 0.0f || lse != 0.0f || lse_square != 0.0f ||
           logit_sum != 0.0f;
  }
};

float value_of(const float* vector, int64_t t) { return vector != nullptr ? vector[t] : 0.0f; }

// sum_j weight_j u_j of the student's row.
double logit_sum(PairedBlocks& blocks, const float* weight) {
  double sum = 0;
  for (int64_t begin = 0; begin < blocks.p.a.vocab; begin += kBlock) {
    const int64_t left = blocks.p.a.vocab - begin, n = left < kBlock ? left : kBlock;
    sum += weighted_sum(blocks.of_p(begin, n), weight == nullptr ? nullptr : weight + begin, n);
  }
  return sum;
}

template <Divergence kKind>
void gradient_row(PairedBlocks& blocks, const Pair& w, const Kept& kept, const RowStats& stats,
                  int64_t y, float scale, const Coefficients& c, const float* class_weight,
                  const GradRows& out) {
  const Side& p = blocks.p;
  const bool with_stats = c.of_stats();
  const float entropy = static_cast<float>(stats.entropy), logp = static_cast<float>(stats.logp);
  const float by_lse = c.lse + 2.0f * c.lse_square * static_cast<float>(stats.lse);
  const float b0 = -scale * (c.logp - by_lse + c.entropy * entropy);
  const float b1 = -scale * c.entropy * kLn2f;
  alignas(64) float du[kBlock];
  for (int64_t begin = 0; begin < p.a.vocab; begin += kBlock) {
    const int64_t n = p.a.vocab - begin < kBlock ? p.a.vocab - begin : kBlock;
    float* direct = with_stats ? nullptr : p.direct(p, blocks.i, begin, out);
    float* to = direct != nullptr ? direct : du;
    if (c.divergence != 0.0f) {
      const float factor = scale * c.divergence;
      if (kept.p != nullptr) {
        kept_gradient<kKind>(kept.p + begin, kept.slope + begin, n, w.mean, factor, to);
      } else {
        gradient_terms<kKind>(blocks.of_p(begin, n), blocks.of_q(begin, n), n, w, factor, to);
      }
    } else {
      memset(static_cast<void*>(to), 0, static_cast<size_t>(n) * sizeof(float));
    }
    if (with_stats) {
      const int64_t at = y - begin;
      const bool has_target = at >= 0 && at < n;
      const float of_target = has_target ? du[at] : 0.0f;
      add_stats_gradient(blocks.of_p(begin, n), n, w, b0, b1, du);
      if (has_target) {
        du[at] = of_target + target_gradient(scale, logp, entropy, c.logp, c.entropy, by_lse);
      }
      if (c.logit_sum != 0.0f) {
        const float* weight = class_weight == nullptr ? nullptr : class_weight + begin;
        add_weights(du, weight, n, scale * c.logit_sum);
      }
    }
    if (direct == nullptr) p.store(p, blocks.i, begin, n, to, out);
  }
}

// The KL of a row from one pass, with what the gradient needs; not exact below kClose, or NaN.
template <Divergence kKind>
double kl_row(PairedBlocks& blocks, const Pair& w, const RowStats& sp, const RowStats& sq, float cq,
              const Kept& kept, bool* meet) {
  double sum = 0, cross = 0;
  for (int64_t begin = 0; begin < blocks.p.a.vocab; begin += kBlock) {
    const int64_t left = blocks.p.a.vocab - begin, n = left < kBlock ? left : kBlock;
    const float *up = blocks.of_p(begin, n), *uq = blocks.of_q(begin, n);
    KlSums sums;
    sum_kl<kKind>(up, uq, n, w, kept.p + begin, kept.slope + begin, &sums);
    sum += sums.sum;
    cross += sums.cross;
    *meet = *meet || maxima_meet(up, uq, n, w.p_max, w.q_max);
  }
  const double apart = log2_sum(sp, w.c) - log2_sum(sq, cq);
  return kLn2 * (cross / sum - (kKind == Divergence::kReverseKl ? apart : -apart));
}

template <Divergence kKind>
void distill_row(const DistillArgs& a, const Side& p, const Side& q, int64_t i, const Kept& kept,
                 const DistillOut& out, const DistillGrad& grad) {
  const int64_t t = token_of(a.student, i);
  const bool has_gradient = grad.grad_logits != nullptr;
  const GradRows grad_rows = {grad.grad_logits, grad.grad_stride, a.student.dtype, nullptr};
  Coefficients c = {};
  if (has_gradient) {
    c = {grad.grad_divergence[t],           value_of(grad.grad_logp, t),
         value_of(grad.grad_entropy, t),    value_of(grad.grad_lse, t),
         value_of(grad.grad_lse_square, t), value_of(grad.grad_logit_sum, t)};
  }
  if (masked(a.student, t) || (has_gradient && c.divergence == 0.0f && !c.of_stats())) {
    out.divergence[t] = out.entropy[t] = out.logp[t] = 0.0f;
    out.teacher_logp[t] = out.top1_agreement[t] = 0.0f;
    if (out.lse != nullptr) out.lse[t] = 0.0f;
    if (out.logit_sum != nullptr) out.logit_sum[t] = 0.0f;
    if (has_gradient) p.zero(p, i, grad_rows);
    return;
  }
  const int64_t iq = a.teacher.index != nullptr ? i : t;
  const float temperature = temperature_of(a.student, t);
  const float cp = base2_scale(a.student, temperature);
  const float cq = base2_scale(a.teacher, temperature_of(a.teacher, t));
  const bool compared = !has_gradient || c.divergence != 0.0f;
  const RowStats sp = p.stats(p, i, cp), sq = compared ? q.stats(q, iq, cq) : RowStats{};
  out.entropy[t] = static_cast<float>(sp.entropy);
  out.logp[t] = static_cast<float>(sp.logp);
  out.teacher_logp[t] = static_cast<float>(sq.logp);
  out.top1_agreement[t] = 0.0f;

  PairedBlocks blocks = {p, q, i, iq, sq.row_max, cq / cp, {}, {}};
  if (out.lse != nullptr) out.lse[t] = static_cast<float>(sp.lse);
  if (out.logit_sum != nullptr) {
    out.logit_sum[t] = static_cast<float>(kLn2 * cp * logit_sum(blocks, a.class_weight));
  }
  const bool rescaled = blocks.ratio != 1.0f;
  const float q_max = rescaled ? 0.0f : sq.row_max;
  Pair w =
      pair_of(a.kind, a.mix_weight, cp, sp.row_max, q_max, static_cast<float>(log2_sum(sp, cp)),
              static_cast<float>(log2_sum(sq, cq)), 0.0f);
  // A row of only -inf in either stream: nothing to compare.
  const bool empty = !compared || sp.lse == -__builtin_inf() || sq.lse == -__builtin_inf();
  bool meet = false;
  double total = 0, mean = 0;
  const auto sum_row = [&](const auto& sum_block) {
    total = mean = 0;
    for (int64_t begin = 0; begin < a.student.vocab; begin += kBlock) {
      const int64_t left = a.student.vocab - begin, n = left < kBlock ? left : kBlock;
      const float *up = blocks.of_p(begin, n), *uq = blocks.of_q(begin, n);
      Sums sums;
      sum_block(up, uq, begin, n, &sums);
      total += sums.total;
      mean += sums.mean;
      meet = meet || maxima_meet(up, uq, n, w.p_max, w.q_max);
    }
  };
  const bool keep = kept.p != nullptr && c.divergence != 0.0f;
  if (keep && !empty) {
    if constexpr (is_kl(kKind)) {
      total = mean = kl_row<kKind>(blocks, w, sp, sq, cq, kept, &meet);
    } else if constexpr (kKind == Divergence::kJsd) {
      sum_row([&](const float* up, const float* uq, int64_t begin, int64_t n, Sums* sums) {
        sum_jsd(up, uq, n, w, kept.p + begin, kept.slope + begin, sums);
      });
    }
  }
  const double close = is_kl(kKind) ? kClose : kCloseJsd;
  if (!(total >= close) && !empty) {
    sum_row([&](const float* up, const float* uq, int64_t begin, int64_t n, Sums* sums) {
      if (keep) {
        sum_and_keep<kKind>(up, uq, n, w, kept.p + begin, kept.slope + begin, sums);
      } else {
        sum_terms<kKind>(up, uq, n, w, sums);
      }
    });
  }
  if (total < 0) total = 0;
  if (total > a.bound) total = a.bound;
  w.mean = static_cast<float>(mean);
  out.divergence[t] = static_cast<float>(total);
  out.top1_agreement[t] = meet ? 1.0f : 0.0f;
  if (!has_gradient) return;
  if (empty || out.divergence[t] == kInf) c.divergence = 0.0f;
  if (sp.lse == -__builtin_inf() || (c.divergence == 0.0f && !c.of_stats())) {
    return p.zero(p, i, grad_rows);
  }
  const float scale = a.student.logit_scale / temperature;
  gradient_row<kKind>(blocks, w, kept, sp, a.student.target[t], scale, c, a.class_weight,
                      grad_rows);
}

template <Divergence kKind>
void distill(const DistillArgs& a, const DistillOut& out, const DistillGrad& grad) {
  const Side p = side_of(a.student), q = side_of(a.teacher);
  const int64_t columns = (a.student.vocab + kBlock - 1) / kBlock * kBlock;
#pragma omp parallel num_threads(threads_for(a.student))
  {
    // Without it (null) the gradient computes its exponentials again.
    float* work = nullptr;
    if (grad.grad_logits != nullptr) {
      work =
          static_cast<float*>(aligned_alloc(64, static_cast<size_t>(columns) * 2 * sizeof(float)));
    }
    const Kept kept = {work, work == nullptr ? nullptr : work + columns};
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.student.rows; i++) {
      distill_row<kKind>(a, p, q, i, kept, out, grad);
    }
    free(work);
  }
}

}  // namespace

void distill_rows(const DistillArgs& a, const DistillOut& out, const DistillGrad& grad) {
  by_kind(a.kind, [&](auto kind) { distill<decltype(kind)::value>(a, out, grad); });
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
