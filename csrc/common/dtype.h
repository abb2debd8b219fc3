// Element types of the large tensors.
#pragma once

#include <cstdint>
#include <cstring>

namespace tokfuse {

// runtime/core/native.py lists the same codes.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

}  // namespace tokfuse
