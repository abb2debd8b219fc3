// The bindings of the CUDA kernels over the execution on the CPU: tokfuse._native.cuda in a module
// of its own, which the runtime loads where TOKFUSE_CUDA_HOST names it.
#include "bindings/bind_cuda.h"

PYBIND11_MODULE(_cuda_host, m) {
  tokfuse::bind_records(m);
  tokfuse::bind_cuda(m);
}
