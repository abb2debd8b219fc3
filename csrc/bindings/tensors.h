// Tensors as the DLPack C exchange API of torch shows them: addresses, sizes and strides of a
// Python tensor without a torch header, 0.2 us each, where the attributes cost 0.3 to 1 us apiece.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/dtype.h"

namespace tokfuse {

// The structures of DLPack 1.x (github.com/dmlc/dlpack), whose layout is a public ABI.
struct DlDevice {
  int32_t type, id;
};
struct DlType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlType type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

constexpr DlType kDlInt32 = {0, 32, 1}, kDlInt64 = {0, 64, 1}, kDlBool = {6, 8, 1},
                 kDlFloat32 = {2, 32, 1}, kDlFloat64 = {2, 64, 1}, kDlFloat16 = {2, 16, 1},
                 kDlBfloat16 = {4, 16, 1};

inline DlType dl_type(DType dtype) {
  return dtype == DType::kFloat32    ? kDlFloat32
         : dtype == DType::kBFloat16 ? kDlBfloat16
                                     : kDlFloat16;
}

inline bool operator==(DlType a, DlType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// A plain CPU tensor: exactly torch.Tensor or Parameter, so that no subclass is bypassed.
// `read` is false for anything else, and leaves no Python error behind.
bool read_tensor(PyObject* object, DlTensor* out);

// True when autograd tracks the tensor, or when that cannot be told.
bool requires_grad(PyObject* tensor);

// A new, unwritten CPU tensor, or null with a Python error set. Large ones lie in memory that is
// kept (buffers.h).
pybind11::object empty_tensor(std::initializer_list<int64_t> shape, DlType type, void** data);
pybind11::object empty_tensor(const int64_t* shape, int32_t ndim, DlType type, void** data);

}  // namespace tokfuse
