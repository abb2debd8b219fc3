// ope: off-policy value estimates and their standard errors. Two reads of at most 17 bytes per row:
// the first for the estimates, the second for the squared deviations of each row's influence from
// its mean.
//
// Sums are float64 over fixed blocks and are combined in order. So the result does not depend on
// the thread count. The mean of the influence needs no third read: it is the estimate itself for
// ips, dm and dr. For the self-normalised terms it is exactly 0, because sum w (r - snips) = 0.
#include "cpu/packed_kernels.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialRows = 16384;
constexpr int kSums = 5;

struct Estimates {
  double ips, snips, dm, dr, correction, mean_w;
};

// First pass: the sums of count, w, w r, q_pi and w (r - q_a) over a block.
void add_sums(const OpeArgs& a, int64_t begin, int64_t end, double* out) {
  double n = 0, sw = 0, swr = 0, sq = 0, sres = 0;
#pragma omp simd reduction(+ : n, sw, swr, sq, sres)
  for (int64_t t = begin; t < end; t++) {
    const bool on = a.mask == nullptr || a.mask[t] != 0;
    const double w = on ? a.weight[t] : 0.0, r = on ? a.reward[t] : 0.0;
    const double q = on && a.q_pi != nullptr ? a.q_pi[t] : 0.0;
    const double qa = on && a.q_a != nullptr ? a.q_a[t] : 0.0;
    n += on ? 1.0 : 0.0;
    sw += w;
    swr += w * r;
    sq += q;
    sres += w * (r - qa);
  }
  const double sums[kSums] = {n, sw, swr, sq, sres};
  memcpy(out, sums, sizeof(sums));
}

// Second pass: the sums of squared deviations over a block, for ips, snips, dm, dr and sndr.
void add_squares(const OpeArgs& a, int64_t begin, int64_t end, const Estimates& e, double* out) {
  double ips = 0, snips = 0, dm = 0, dr = 0, sndr = 0;
  const double inv_w = 1 / e.mean_w;
#pragma omp simd reduction(+ : ips, snips, dm, dr, sndr)
  for (int64_t t = begin; t < end; t++) {
    const bool on = a.mask == nullptr || a.mask[t] != 0;
    const double w = on ? a.weight[t] : 0.0, r = on ? a.reward[t] : 0.0;
    const double q = on && a.q_pi != nullptr ? a.q_pi[t] : 0.0;
    const double qa = on && a.q_a != nullptr ? a.q_a[t] : 0.0;
    const double res = w * (r - qa);
    const double d_ips = w * r - e.ips, d_snips = w * (r - e.snips) * inv_w, d_dm = q - e.dm;
    const double d_dr = q + res - e.dr, d_sndr = d_dm + (res - e.correction * w) * inv_w;
    ips += on ? d_ips * d_ips : 0.0;
    snips += on ? d_snips * d_snips : 0.0;
    dm += on ? d_dm * d_dm : 0.0;
    dr += on ? d_dr * d_dr : 0.0;
    sndr += on ? d_sndr * d_sndr : 0.0;
  }
  const double squares[kSums] = {ips, snips, dm, dr, sndr};
  memcpy(out, squares, sizeof(squares));
}

void combine(const double* parts, int64_t blocks, double* total) {
  for (int k = 0; k < kSums; k++) total[k] = 0;
  for (int64_t b = 0; b < blocks; b++) {
    for (int k = 0; k < kSums; k++) total[k] += parts[kSums * b + k];
  }
}

int64_t end_of(const OpeArgs& a, int64_t begin) {
  return begin + kOpeBlock < a.rows ? begin + kOpeBlock : a.rows;
}

}  // namespace

void ope(const OpeArgs& a) {
  const int64_t blocks = (a.rows + kOpeBlock - 1) / kOpeBlock;
  const int threads = a.rows < kSerialRows ? 1 : a.threads;
  double s[kSums], squares[kSums];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    add_sums(a, b * kOpeBlock, end_of(a, b * kOpeBlock), a.scratch + kSums * b);
  }
  combine(a.scratch, blocks, s);
  const double n = s[0], direct = s[3] / n, correction = s[4] / s[1];
  const Estimates e = {s[2] / n, s[2] / s[1], direct, (s[3] + s[4]) / n, correction, s[1] / n};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    add_squares(a, b * kOpeBlock, end_of(a, b * kOpeBlock), e, a.scratch + kSums * b);
  }
  combine(a.scratch, blocks, squares);
  const double values[kSums] = {e.ips, e.snips, e.dm, e.dr, direct + correction};
  for (int k = 0; k < kSums; k++) {
    a.out[2 * k] = values[k];
    // One row has no standard error. NaN is set here, because rounding could make 0 / 0 infinite.
    a.out[2 * k + 1] = n < 2 ? __builtin_nan("") : ::sqrt(squares[k] / (n - 1) / n);
  }
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
