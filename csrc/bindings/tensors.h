// Tensors by the DLPack C exchange API of torch: the address, sizes and strides of a Python tensor,
// and new tensors, without a torch header. Reading one takes 0.2 us; each attribute in Python takes
// 0.3 to 1 us.
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

constexpr int32_t kDlCpu = 1, kDlCuda = 2;  // DlDevice::type

inline DlType dl_type(DType dtype) {
  return dtype == DType::kFloat32    ? kDlFloat32
         : dtype == DType::kBFloat16 ? kDlBfloat16
                                     : kDlFloat16;
}

inline bool operator==(DlType a, DlType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// Reads a plain tensor: torch.Tensor or Parameter itself, because a subclass may override what a
// call does. Returns false for anything else, without a Python error.
bool read_tensor(PyObject* object, DlTensor* out);

// True if autograd tracks the tensor, or if the attribute cannot be read.
bool requires_grad(PyObject* tensor);

// A new contiguous CPU tensor, not initialised; throws on failure. A large one takes its memory
// from buffers.h.
pybind11::object empty_tensor(std::initializer_list<int64_t> shape, DlType type, void** data);
pybind11::object empty_tensor(const int64_t* shape, int32_t ndim, DlType type, void** data);

// New contiguous tensors on the device of `like`, not initialised, from torch's allocator: for a
// GPU, where streams and graphs depend on it. `type` is float32 or float64; without it, that of
// `like`. Both throw on failure.
pybind11::object new_empty(PyObject* like, std::initializer_list<int64_t> shape);
pybind11::object new_empty(PyObject* like, std::initializer_list<int64_t> shape, DlType type);
pybind11::object empty_like(PyObject* like);

// torch's current stream on a CUDA device.
uintptr_t current_stream(int32_t device);

// Adds `use_tensors`, which must run before anything else here.
void bind_use_tensors(pybind11::module_& m);

}  // namespace tokfuse
