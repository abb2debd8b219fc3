// Element types of the large tensors, and exact conversions to and from float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace tokfuse {

// Codes shared with runtime/core/native.py.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace tokfuse
