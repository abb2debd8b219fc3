// gae and vtrace: one reverse scan per sequence, in float64. Per token, gae reads and writes 8
// bytes, vtrace 12; a mask adds 1 byte read. A thread computes whole sequences, so the result does
// not depend on the thread count.
#include "cpu/packed_kernels.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialTokens = 16384;  // below this, starting threads costs more than the work
constexpr int64_t kBlock = 512;           // tokens staged on the stack
constexpr float kLogRatioClamp = 20.0f;

int threads_for(const ScanArgs& a) { return a.tokens < kSerialTokens ? 1 : a.threads; }

bool valid(const ScanArgs& a, int64_t t) { return a.mask == nullptr || a.mask[t] != 0; }

double lambda_of(const GaeArgs& a, int64_t seq) {
  if (a.lam_per_seq != nullptr) return a.lam_per_seq[seq];
  if (a.length_adaptive_alpha == 0) return a.lam;
  int64_t n = 0;
  for (int64_t t = a.cu_seqlens[seq]; t < a.cu_seqlens[seq + 1]; t++) n += valid(a, t);
  const double span = a.length_adaptive_alpha * static_cast<double>(n);
  return 1 - 1 / (span > 1 ? span : 1);
}

// The serial part of a block of n tokens: out[i] = inject[i] + decay(i) out[i + 1], from the last
// token to the first. `carried` is out[n]. Everything else of a dense block is done in vector
// loops.
//
// Four tokens at a time are first solved with out[i + 4] = 0. Then out[i + 4] is added, multiplied
// by the product of their decays. So the dependency chain of four tokens has one multiply-add of 4
// cycles instead of four.
template <class Decay>
double recursion(const double* inject, Decay decay, int64_t n, double carried,
                 double* __restrict out) {
  int64_t i = n;
  for (; i >= 4; i -= 4) {
    const double d3 = decay(i - 1), d2 = decay(i - 2), d1 = decay(i - 3), d0 = decay(i - 4);
    const double x3 = inject[i - 1], x2 = inject[i - 2] + d2 * x3;
    const double x1 = inject[i - 3] + d1 * x2, x0 = inject[i - 4] + d0 * x1;
    const double p2 = d2 * d3, p1 = d1 * p2, p0 = d0 * p1;
    out[i - 1] = x3 + d3 * carried;
    out[i - 2] = x2 + p2 * carried;
    out[i - 3] = x1 + p1 * carried;
    out[i - 4] = carried = x0 + p0 * carried;
  }
  for (i--; i >= 0; i--) out[i] = carried = inject[i] + decay(i) * carried;
  return carried;
}

void gae_masked(const GaeArgs& a, int64_t seq) {
  const double gamma = a.gamma, decay = a.gamma * lambda_of(a, seq);
  const bool ends = a.finished == nullptr || a.finished[seq] != 0;
  bool last = true;
  double next_value = 0, carried = 0;
  for (int64_t t = a.cu_seqlens[seq + 1] - 1; t >= a.cu_seqlens[seq]; t--) {
    if (a.mask[t] == 0) {
      a.advantage[t] = a.returns[t] = 0.0f;
      continue;
    }
    const double v = a.value[t];
    if (last) next_value = ends ? 0 : v;
    const double delta = a.reward[t] + gamma * next_value - v;
    carried = last ? delta : delta + decay * carried;
    last = false;
    a.advantage[t] = static_cast<float>(carried);
    a.returns[t] = static_cast<float>(carried + v);
    next_value = v;
  }
}

void gae_dense(const GaeArgs& a, int64_t seq) {
  alignas(64) double delta[kBlock], scan[kBlock];
  const double gamma = a.gamma, decay = a.gamma * lambda_of(a, seq);
  const int64_t first = a.cu_seqlens[seq], stop = a.cu_seqlens[seq + 1];
  if (first == stop) return;
  const bool ends = a.finished == nullptr || a.finished[seq] != 0;
  double next_value = ends ? 0 : a.value[stop - 1], carried = 0;
  for (int64_t end = stop; end > first; end -= kBlock) {
    const int64_t begin = end - kBlock > first ? end - kBlock : first, n = end - begin;
    const float *reward = a.reward + begin, *value = a.value + begin;
    float* __restrict advantage = a.advantage + begin;
    float* __restrict returns = a.returns + begin;
#pragma omp simd
    for (int64_t i = 0; i < n - 1; i++) delta[i] = reward[i] + gamma * value[i + 1] - value[i];
    delta[n - 1] = reward[n - 1] + gamma * next_value - value[n - 1];
    carried = recursion(delta, [decay](int64_t) { return decay; }, n, carried, scan);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      advantage[i] = static_cast<float>(scan[i]);
      returns[i] = static_cast<float>(scan[i] + value[i]);
    }
    next_value = value[0];
  }
}

// ratio[i] = exp(clamp(log_ratio)). The ratio of a masked token is not used.
void ratios(const VtraceArgs& a, int64_t begin, int64_t n, float* __restrict ratio) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    float d = a.log_ratio[begin + i];
    d = d < -kLogRatioClamp ? -kLogRatioClamp : d;
    d = d > kLogRatioClamp ? kLogRatioClamp : d;
    ratio[i] = exp2_simd(d * kLog2E);
  }
}

struct VtraceState {
  bool last;
  double next_value, carried;  // of the next valid token: V, and value_target - V
};

// One block with a mask. The loop finds the next valid token as it proceeds. Everything that it
// reads is a local variable, because stores through float* would force reloads of members.
VtraceState masked_block(const VtraceArgs& a, bool ends, int64_t begin, int64_t n, VtraceState s) {
  float ratio[kBlock];
  ratios(a, begin, n, ratio);
  const float *reward = a.reward + begin, *value = a.value + begin;
  const uint8_t* mask = a.mask + begin;
  float* __restrict target = a.value_target + begin;
  float* __restrict advantage = a.advantage + begin;
  float* __restrict rho_out = a.rho + begin;
  const double gamma = a.gamma, decay = a.gamma * a.lam;
  const float rho_bar = a.rho_bar, c_bar = a.c_bar;
  for (int64_t i = n - 1; i >= 0; i--) {
    if (mask[i] == 0) {
      target[i] = advantage[i] = rho_out[i] = 0.0f;
      continue;
    }
    const double v = value[i], r = reward[i];
    const float rho = ratio[i] > rho_bar ? rho_bar : ratio[i];
    const float c = ratio[i] > c_bar ? c_bar : ratio[i];
    if (s.last) s.next_value = ends ? 0 : v;
    const double ahead = r + gamma * s.next_value - v;
    const double trace = s.last ? rho * ahead : rho * ahead + (decay * c) * s.carried;
    advantage[i] = static_cast<float>(ahead + gamma * s.carried);
    target[i] = static_cast<float>(v + trace);
    rho_out[i] = rho;
    s = {false, v, trace};
  }
  return s;
}

// One block without a mask. Only the recursion is a serial loop.
VtraceState dense_block(const VtraceArgs& a, bool ends, int64_t begin, int64_t n, VtraceState s) {
  alignas(64) float ratio[kBlock];
  alignas(64) double ahead[kBlock], inject[kBlock], decay[kBlock], trace[kBlock + 1];
  ratios(a, begin, n, ratio);
  const float *reward = a.reward + begin, *value = a.value + begin;
  float* __restrict target = a.value_target + begin;
  float* __restrict advantage = a.advantage + begin;
  float* __restrict rho = a.rho + begin;
  const double gamma = a.gamma, factor = a.gamma * a.lam;
  const float rho_bar = a.rho_bar, c_bar = a.c_bar;
#pragma omp simd
  for (int64_t i = 0; i < n - 1; i++) ahead[i] = reward[i] + gamma * value[i + 1] - value[i];
  const double v = value[n - 1];
  if (s.last) s.next_value = ends ? 0 : v;
  ahead[n - 1] = reward[n - 1] + gamma * s.next_value - v;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    rho[i] = ratio[i] > rho_bar ? rho_bar : ratio[i];
    inject[i] = rho[i] * ahead[i];
    decay[i] = factor * (ratio[i] > c_bar ? c_bar : ratio[i]);
  }
  trace[n] = s.carried;
  recursion(inject, [&decay](int64_t i) { return decay[i]; }, n, s.carried, trace);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    advantage[i] = static_cast<float>(ahead[i] + gamma * trace[i + 1]);
    target[i] = static_cast<float>(value[i] + trace[i]);
  }
  return {false, value[0], trace[0]};
}

void vtrace_sequence(const VtraceArgs& a, int64_t seq) {
  const bool ends = a.finished == nullptr || a.finished[seq] != 0;
  VtraceState state = {true, 0, 0};
  const int64_t first = a.cu_seqlens[seq];
  for (int64_t end = a.cu_seqlens[seq + 1]; end > first; end -= kBlock) {
    const int64_t begin = end - kBlock > first ? end - kBlock : first;
    state = a.mask != nullptr ? masked_block(a, ends, begin, end - begin, state)
                              : dense_block(a, ends, begin, end - begin, state);
  }
}

}  // namespace

void gae(const GaeArgs& a) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads_for(a))
  for (int64_t seq = 0; seq < a.seqs; seq++) {
    if (a.mask != nullptr) {
      gae_masked(a, seq);
    } else {
      gae_dense(a, seq);
    }
  }
}

void vtrace(const VtraceArgs& a) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads_for(a))
  for (int64_t seq = 0; seq < a.seqs; seq++) vtrace_sequence(a, seq);
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
