// Helpers of the programs that run shipped kernels: device memory, and a hash of the outputs.
#pragma once

#include <random>
#include <vector>

#include "cuda/device.cuh"

namespace tokfuse {
namespace cuda {

// Device memory that is freed by the destructor.
class Memory {
 public:
  ~Memory() {
    for (void* p : all_) cudaFree(p);
  }

  template <class T>
  T* of(size_t count) {
    void* p = nullptr;
    cudaMalloc(&p, count * sizeof(T));
    all_.push_back(p);
    return static_cast<T*>(p);
  }

  float* uniform(size_t count, float low, float high) {
    float* p = of<float>(count);
    std::uniform_real_distribution<float> draw(low, high);
    for (size_t i = 0; i < count; i++) p[i] = draw(random_);
    return p;
  }

  // Returns (rows, stride) logits. The memory ends after column `vocab` of the last row.
  void* logits(DType dtype, int64_t rows, int64_t stride, int64_t vocab) {
    const size_t count = static_cast<size_t>((rows - 1) * stride + vocab);
    std::normal_distribution<float> draw(0.0f, 3.0f);
    if (dtype == DType::kFloat32) {
      float* p = of<float>(count);
      for (size_t i = 0; i < count; i++) p[i] = draw(random_);
      return p;
    }
    uint16_t* p = of<uint16_t>(count);
    for (size_t i = 0; i < count; i++) {
      const Pair v = {draw(random_), 0.0f};
      const uint32_t word = dtype == DType::kBFloat16 ? pack(BFloat16(), v) : pack(Float16(), v);
      p[i] = static_cast<uint16_t>(word);
    }
    return p;
  }

 private:
  std::mt19937 random_{7};
  std::vector<void*> all_;
};

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

class Hash {
 public:
  void add(const void* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
      value_ = (value_ ^ static_cast<const unsigned char*>(from)[i]) * 0x100000001b3ull;
    }
  }
  void rows(const void* from, DType dtype, int64_t rows, int64_t stride, int64_t vocab) {
    for (int64_t i = 0; i < rows; i++) {
      add(static_cast<const char*>(from) + static_cast<size_t>(i * stride) * size_of(dtype),
          static_cast<size_t>(vocab) * size_of(dtype));
    }
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325ull;
};

}  // namespace cuda
}  // namespace tokfuse
