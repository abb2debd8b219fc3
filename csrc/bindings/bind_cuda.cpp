// tokfuse._native.cuda: launchers of the CUDA kernels over device addresses. Nothing here touches a
// driver before the first launch.
#include "bindings/bind_cuda.h"

namespace tokfuse {

void bind_cuda(pybind11::module_& m) {
  m.doc() = "CUDA kernels of tokfuse over device addresses";
  cuda::bind_packed(m);
  cuda::bind_policy(m);
  cuda::bind_rows(m);
}

}  // namespace tokfuse
