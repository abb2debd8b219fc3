// Probes of the machine's limits: a read, a copy, and an exp sweep over data in L1.
//
// bench/probes.py compiles this file at first use with -march=native. Plain C functions, no torch.
#include <omp.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 20;  // unit of work of one thread
constexpr int kL1Floats = 2048;                    // 8 KiB per thread, fits into L1

// 2^x for x <= 0, as in an inlined exp: 11 vector instructions, relative error 2e-7.
inline float exp2_bare(float x) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  x = x < -127.0f ? -127.0f : x;
  const float t = x + kMagic;
  const float r = x - (t - kMagic);
  float p = 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550340010342560e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &t, 4);
  bits <<= 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}

}  // namespace

extern "C" {

// Reads `bytes` (a multiple of 8) once and returns a checksum, so that the compiler cannot remove a read.
uint64_t tokfuse_probe_read(const uint64_t* data, int64_t bytes, int threads) {
  const int64_t words = bytes / 8;
  const int64_t block = kBlockBytes / 8;
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
  for (int64_t first = 0; first < words; first += block) {
    const int64_t last = first + block < words ? first + block : words;
    uint64_t part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = first; i < last; ++i) part += data[i];
    sum += part;
  }
  return sum;
}

// Copies `bytes` once. memcpy uses non-temporal stores for blocks that do not fit the cache.
void tokfuse_probe_copy(char* to, const char* from, int64_t bytes, int threads) {
  const int64_t share = (bytes + threads - 1) / threads;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    const int64_t first = part * share;
    const int64_t last = first + share < bytes ? first + share : bytes;
    if (first < last) memcpy(to + first, from + first, static_cast<size_t>(last - first));
  }
}

// Sums `elements` exponentials of values in L1. This measures the arithmetic only.
float tokfuse_probe_exp(int64_t elements, int threads) {
  float sum = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    alignas(64) float x[kL1Floats];
    for (int i = 0; i < kL1Floats; ++i) x[i] = -0.01f * static_cast<float>(i);
    const int64_t mine = elements / threads;
    for (int64_t done = 0; done < mine; done += kL1Floats) {
      asm volatile("" : : "r"(x) : "memory");  // the compiler must not reuse the result of the last sweep
      float part = 0.0f;
      const int count = mine - done < kL1Floats ? static_cast<int>(mine - done) : kL1Floats;
#pragma omp simd reduction(+ : part)
      for (int i = 0; i < count; ++i) part += exp2_bare(x[i]);
      sum += part;
    }
  }
  return sum;
}

}  // extern "C"
