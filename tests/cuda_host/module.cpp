// The bindings of the CUDA kernels that run on the CPU: tokfuse._native.cuda as a separate module.
// The runtime loads the file that TOKFUSE_CUDA_HOST names.
#include "bindings/bind_cuda.h"

PYBIND11_MODULE(_cuda_host, m) {
  tokfuse::bind_records(m);
  tokfuse::bind_cuda(m);
}
