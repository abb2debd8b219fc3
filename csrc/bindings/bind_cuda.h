// Shared by the bindings of CUDA kernels: where a launch goes, and what becomes of its error.
//
// Pointers are the device's, so their values cannot be looked at here: the callers in
// runtime/ check sizes, dtypes and devices, and give 0 for an absent tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tokfuse {
namespace cuda {

using Address = uintptr_t;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("tokfuse._native.cuda: ") + what);
}

template <class E>
E code_of(int code, E last, const char* what) {
  require(code >= 0 && code <= static_cast<int>(last), what);
  return static_cast<E>(code);
}

// (device index, stream handle)
struct Place {
  int device;
  cudaStream_t stream;
};

inline Place place_of(const pybind11::tuple& t) {
  require(t.size() == 2, "a place is (device, stream)");
  return {t[0].cast<int>(), as<CUstream_st>(t[1].cast<Address>())};
}

// Makes `device` current, and after the launch the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || device == before_) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Runs `launch(stream)` on the device of the place; an error becomes an exception that names the op
// and the launch. An error that an earlier kernel left comes out here too: launches are
// asynchronous.
template <class Launch>
void run(const char* op, const char* kernel, const Place& place, Launch launch) {
  pybind11::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  const cudaError_t error = guard.error() != cudaSuccess ? guard.error() : launch(place.stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it would come out of the next launch again
  throw std::runtime_error(std::string(op) + ": launching " + kernel + " on CUDA device " +
                           std::to_string(place.device) + " failed: " + cudaGetErrorString(error) +
                           " (" + cudaGetErrorName(error) + ", " +
                           std::to_string(static_cast<int>(error)) +
                           "). `python -m tokfuse doctor` shows what is usable here; "
                           "TOKFUSE_BACKEND chooses another backend.");
}

void bind_packed(pybind11::module_& m);
void bind_policy(pybind11::module_& m);
void bind_rows(pybind11::module_& m);

}  // namespace cuda

// Adds every CUDA launcher to `m`.
void bind_cuda(pybind11::module_& m);

}  // namespace tokfuse
