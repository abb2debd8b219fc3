// Host functions of the launchers of row kernels.
#pragma once

#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace tokfuse {
namespace cuda {

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Calls `run` with a null pointer of the element type.
template <class F>
cudaError_t by_dtype(DType dtype, const F& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return run(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return run(static_cast<Float16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// Calls `run` with null pointers of the element types of logits and gradient. The gradient has the
// type of the logits, or a 16-bit type for float32 logits.
template <class F>
cudaError_t by_dtypes(DType logits, DType grad, const F& run) {
  if (logits == grad) {
    return by_dtype(logits, [&](auto* type) { return run(type, type); });
  }
  if (logits != DType::kFloat32) return cudaErrorInvalidValue;
  float* type = nullptr;
  if (grad == DType::kBFloat16) return run(type, static_cast<BFloat16*>(nullptr));
  return run(type, static_cast<Float16*>(nullptr));
}

template <class F>
cudaError_t by_flag(bool value, const F& run) {
  return value ? run(Flag<true>()) : run(Flag<false>());
}

template <class Pointer>
using Pointee = typename std::remove_pointer<Pointer>::type;

// True if every row begins at a multiple of `bytes`, or the tensor is null.
template <class T>
bool rows_aligned(const void* base, int64_t stride, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(base) % static_cast<uintptr_t>(bytes) == 0 &&
         (base == nullptr || stride * static_cast<int64_t>(sizeof(T)) % bytes == 0);
}

// True if for every i, row i of both tensors begins at the same element of a vector. Then an
// aligned vector of T has an aligned group of as many elements of G.
template <class T, class G>
bool rows_together(const void* base, int64_t stride, const void* other, int64_t other_stride) {
  constexpr int64_t kItems = 16 / static_cast<int64_t>(sizeof(T));
  const auto first = [](const void* p, size_t bytes) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / bytes % kItems);
  };
  return other == nullptr || (first(base, sizeof(T)) == first(other, sizeof(G)) &&
                              (stride - other_stride) % kItems == 0);
}

// Returns the number of parts of each row. Few rows are split, so that they also fill a GPU.
inline int parts_of_rows(int64_t rows, int64_t vocab) {
  constexpr int64_t kEnoughBlocks = 4096, kSmallestPart = 4096;
  const int64_t wanted = (kEnoughBlocks + rows - 1) / rows;
  const int64_t most = vocab > kSmallestPart ? (vocab + kSmallestPart - 1) / kSmallestPart : 1;
  return static_cast<int>(wanted < most ? wanted : most);
}

inline bool is_transformed(const LogitsArgs& a) {
  return a.softcap != 0.0f || a.bias_logits != nullptr;
}

// Launches a kernel for `items` pieces of work, on a grid of at most as many blocks as are resident
// at once.
template <class Kernel, class... Arguments>
cudaError_t launch_resident(Kernel* kernel, int64_t items, unsigned threads, cudaStream_t stream,
                            const Arguments&... arguments) {
  LaunchShape shape = {1, threads};
  const cudaError_t error = resident_blocks(kernel, shape, &shape.blocks);
  if (error != cudaSuccess) return error;
  if (items < shape.blocks) shape.blocks = items;
  return launch(kernel, shape, stream, arguments...);
}

}  // namespace cuda
}  // namespace tokfuse
