// whiten: (x - mean) / sqrt(var + eps) over the rows with mask true. Two reads and one write.
//
// A block of fixed size is read for its mean, then from L1 for the deviations from that mean. The
// statistics of the blocks are merged in order by Chan's formula. So the result does not depend on
// the thread count, and a large mean costs no digits.
#include "cpu/packed_kernels.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialTokens = 16384;

struct Moments {
  double count, mean, square;  // square: sum of squared deviations
};

int64_t end_of(const WhitenArgs& a, int64_t begin) {
  return begin + kWhitenBlock < a.tokens ? begin + kWhitenBlock : a.tokens;
}

// Moments of one block. Values are taken relative to `origin`, so values equal to it give exactly
// 0.
Moments block_moments(const WhitenArgs& a, int64_t begin, int64_t end, float origin) {
  double n = 0, sum = 0, square = 0;
  const float* x = a.x;
  const double o = origin;
  if (a.mask == nullptr) {
    n = static_cast<double>(end - begin);
#pragma omp simd reduction(+ : sum)
    for (int64_t t = begin; t < end; t++) sum += x[t] - o;
    const double mean = sum / n;
#pragma omp simd reduction(+ : square)
    for (int64_t t = begin; t < end; t++) square += (x[t] - o - mean) * (x[t] - o - mean);
    return {n, mean, square};
  }
  const uint8_t* mask = a.mask;
#pragma omp simd reduction(+ : n, sum)
  for (int64_t t = begin; t < end; t++) {
    n += mask[t] != 0 ? 1.0 : 0.0;
    sum += mask[t] != 0 ? x[t] - o : 0.0;
  }
  const double mean = n > 0 ? sum / n : 0;
#pragma omp simd reduction(+ : square)
  for (int64_t t = begin; t < end; t++) {
    const double d = mask[t] != 0 ? x[t] - o - mean : 0.0;
    square += d * d;
  }
  return {n, mean, square};
}

Moments merge(const Moments& p, const Moments& q) {
  if (q.count == 0) return p;
  if (p.count == 0) return q;
  const double n = p.count + q.count, d = q.mean - p.mean;
  return {n, p.mean + d * (q.count / n), p.square + q.square + d * d * (p.count * q.count / n)};
}

void own_statistics(const WhitenArgs& a, double* mean, double* var) {
  int64_t first = 0;
  while (a.mask != nullptr && first < a.tokens && a.mask[first] == 0) first++;
  *mean = *var = 0;
  if (first == a.tokens) return;
  const float origin = a.x[first];
  const int64_t blocks = (a.tokens + kWhitenBlock - 1) / kWhitenBlock;
  Moments* part = reinterpret_cast<Moments*>(a.scratch);
#pragma omp parallel for schedule(static) num_threads(a.tokens < kSerialTokens ? 1 : a.threads)
  for (int64_t b = 0; b < blocks; b++) {
    part[b] = block_moments(a, b * kWhitenBlock, end_of(a, b * kWhitenBlock), origin);
  }
  Moments all = {0, 0, 0};
  for (int64_t b = 0; b < blocks; b++) all = merge(all, part[b]);
  *mean = origin + all.mean;
  *var = all.square / (all.count > 1 ? all.count - 1 : 1);
}

}  // namespace

void whiten(const WhitenArgs& a) {
  double mean = 0, var = 0;
  if (a.mean != nullptr) {
    mean = *a.mean;
    var = *a.var;
  } else {
    own_statistics(a, &mean, &var);
  }
  // Equal values with eps = 0 have deviations of 0, and 0 * inf would be NaN.
  const double scale = var + a.eps == 0 ? 0 : 1 / ::sqrt(var + a.eps);
  const double offset = a.shift_mean ? 0 : mean;
  const float* x = a.x;
  const uint8_t* mask = a.mask;
  float* out = a.out;
#pragma omp parallel for schedule(static) num_threads(a.tokens < kSerialTokens ? 1 : a.threads)
  for (int64_t begin = 0; begin < a.tokens; begin += kWhitenBlock) {
    const int64_t end = end_of(a, begin);
    if (mask == nullptr) {
#pragma omp simd
      for (int64_t t = begin; t < end; t++) {
        out[t] = static_cast<float>((x[t] - mean) * scale + offset);
      }
    } else {
#pragma omp simd
      for (int64_t t = begin; t < end; t++) {
        const float y = static_cast<float>((x[t] - mean) * scale + offset);
        out[t] = mask[t] != 0 ? y : 0.0f;
      }
    }
  }
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
