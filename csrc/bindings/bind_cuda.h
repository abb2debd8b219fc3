// Shared by the bindings of the CUDA kernels: the device and stream of a launch, and the exception
// that reports a failed launch.
//
// Pointers are addresses of the device, so their values cannot be read here. The callers in
// runtime/ check shapes, dtypes, devices and values.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/checks.h"
#include "bindings/records.h"
#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tokfuse {
namespace cuda {

// Where a kernel is launched.
class Place {
 public:
  Place(int device, cudaStream_t stream) : device_(device), stream_(stream) {}
  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  int device_;
  cudaStream_t stream_;
};

// Makes `device` current, and restores the previous device at the end of its scope.
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

// A launch that failed.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs `launch(stream)` on the device of `place`. An error becomes a LaunchError that names the op
// and the kernel. Launches are asynchronous, so an earlier kernel may have caused the error.
template <class Launch>
void run(const char* op, const char* kernel, const Place& place, Launch launch) {
  pybind11::gil_scoped_release release;
  const DeviceGuard guard(place.device());
  const cudaError_t error = guard.error() != cudaSuccess ? guard.error() : launch(place.stream());
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, or the next launch would report it again
  throw LaunchError(std::string(op) + ": launching " + kernel + " on CUDA device " +
                    std::to_string(place.device()) + " failed: " + cudaGetErrorString(error) +
                    " (" + cudaGetErrorName(error) + ", " +
                    std::to_string(static_cast<int>(error)) +
                    "). `python -m tokfuse doctor` shows what is usable here; "
                    "TOKFUSE_BACKEND chooses another backend.");
}

// Checked launches. The whole-call functions share them with the bindings.
void run_token_stats_fwd(const Place& place, const LogitsArgs& a, const TokenStatsOut& out);
void run_token_stats_bwd(const Place& place, const LogitsArgs& a, const TokenStatsGrad& grad);
void run_policy_step(const Place& place, const LogitsArgs& a, const TokenStatsOut& stats,
                     const TokenObjectiveArgs& o, const GradRows& grad);
void run_policy_loss(const Place& place, const ObjectiveArgs& o, const LossArgs& loss);
void run_policy_prepare(const Place& place, const PrepareArgs& a);
void run_policy_count(const Place& place, const CountArgs& a);
void run_policy_metrics(const Place& place, const MetricsArgs& a, const LossArgs& loss);

void bind_eager(pybind11::module_& m);
void bind_packed(pybind11::module_& m);
void bind_policy(pybind11::module_& m);
void bind_rows(pybind11::module_& m);

}  // namespace cuda

// Adds every CUDA launcher to `m`. The caller binds the argument structs (bind_records).
void bind_cuda(pybind11::module_& m);

}  // namespace tokfuse
