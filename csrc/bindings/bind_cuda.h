// Shared by the bindings of the CUDA kernels: the place of a launch, and the exception that its
// error becomes.
//
// Pointers are the device's, so what they point at cannot be read here: the callers in runtime/
// check sizes, dtypes, devices and values.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/objective_params.h"
#include "bindings/records.h"
#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tokfuse {
namespace cuda {

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("tokfuse._native.cuda: ") + what);
}

// `fault` is what is wrong, or null.
inline void require_none(const char* fault) { require(fault == nullptr, fault); }

// Where a kernel is launched.
struct Place {
  int device;
  cudaStream_t stream;
};

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

// Adds every CUDA launcher to `m`; the argument structs (bind_records) are another module's or
// there already.
void bind_cuda(pybind11::module_& m);

}  // namespace tokfuse
