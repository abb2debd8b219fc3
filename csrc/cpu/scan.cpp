// gae and vtrace: one reverse scan per sequence. Reads 8 (gae) or 12 (vtrace) bytes per token and
// writes 8 or 12. Sequences are independent, so the result does not depend on the thread count. The
// scan is float64.
#include "cpu/packed_kernels.h"
#include "cpu/vec.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialTokens = 16384;  // below this, starting threads costs more than the work
constexpr int64_t kRatioBlock = 512;      // exponentials staged on the stack
constexpr float kLogRatioClamp = 20.0f;

int threads_for(const ScanArgs& a) { return a.tokens < kSerialTokens ? 1 : a.threads; }

bool valid(const ScanArgs& a, int64_t t) { return a.mask == nullptr || a.mask[t] != 0; }

double lambda_of(const ScanArgs& a, int64_t seq) {
  if (a.lam_per_seq != nullptr) return a.lam_per_seq[seq];
  if (a.alpha == 0) return a.lam;
  int64_t n = 0;
  for (int64_t t = a.cu_seqlens[seq]; t < a.cu_seqlens[seq + 1]; t++) n += valid(a, t);
  const double span = a.alpha * static_cast<double>(n);
  return 1 - 1 / (span > 1 ? span : 1);
}

template <bool kMasked>
void gae_sequence(const ScanArgs& a, int64_t seq) {
  const double gamma = a.gamma, decay = a.gamma * lambda_of(a, seq);
  const bool ends = a.finished == nullptr || a.finished[seq] != 0;
  bool last = true;
  double next_value = 0, advantage = 0;
  for (int64_t t = a.cu_seqlens[seq + 1] - 1; t >= a.cu_seqlens[seq]; t--) {
    if (kMasked && a.mask[t] == 0) {
      a.advantage[t] = a.returns[t] = 0.0f;
      continue;
    }
    const double v = a.value[t];
    if (last) {
      next_value = ends ? 0 : v;
      last = false;
      advantage = a.reward[t] + gamma * next_value - v;
    } else {
      advantage = (a.reward[t] + gamma * next_value - v) + decay * advantage;
    }
    a.advantage[t] = static_cast<float>(advantage);
    a.returns[t] = static_cast<float>(advantage + v);
    next_value = v;
  }
}

// ratio[i] = exp(clamp(log_ratio)); the ratio of a masked token is not used.
void ratios(const ScanArgs& a, int64_t begin, int64_t n, float* __restrict ratio) {
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
  double next_value, carried;  // carried = target - V of the next valid token
};

// Everything the loop reads is a local: stores through float* would otherwise force reloads.
template <bool kMasked>
VtraceState vtrace_block(const ScanArgs& a, bool ends, int64_t begin, int64_t n, VtraceState s) {
  float ratio[kRatioBlock];
  ratios(a, begin, n, ratio);
  const float *reward = a.reward + begin, *value = a.value + begin;
  const uint8_t* mask = kMasked ? a.mask + begin : nullptr;
  float* __restrict target = a.target + begin;
  float* __restrict advantage = a.advantage + begin;
  float* __restrict rho_out = a.rho + begin;
  const double gamma = a.gamma, decay = a.gamma * a.lam;
  const float rho_bar = a.rho_bar, c_bar = a.c_bar;
  for (int64_t i = n - 1; i >= 0; i--) {
    if (kMasked && mask[i] == 0) {
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

template <bool kMasked>
void vtrace_sequence(const ScanArgs& a, int64_t seq) {
  const bool ends = a.finished == nullptr || a.finished[seq] != 0;
  VtraceState state = {true, 0, 0};
  const int64_t first = a.cu_seqlens[seq];
  for (int64_t end = a.cu_seqlens[seq + 1]; end > first; end -= kRatioBlock) {
    const int64_t begin = end - kRatioBlock > first ? end - kRatioBlock : first;
    state = vtrace_block<kMasked>(a, ends, begin, end - begin, state);
  }
}

}  // namespace

void gae(const ScanArgs& a) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads_for(a))
  for (int64_t seq = 0; seq < a.seqs; seq++) {
    if (a.mask != nullptr) {
      gae_sequence<true>(a, seq);
    } else {
      gae_sequence<false>(a, seq);
    }
  }
}

void vtrace(const ScanArgs& a) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads_for(a))
  for (int64_t seq = 0; seq < a.seqs; seq++) {
    if (a.mask != nullptr) {
      vtrace_sequence<true>(a, seq);
    } else {
      vtrace_sequence<false>(a, seq);
    }
  }
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
