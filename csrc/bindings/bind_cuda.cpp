// tokfuse._native.cuda: launchers of the CUDA kernels over device addresses. No function touches a
// driver before the first launch.
#include "bindings/bind_cuda.h"

#include "bindings/tensors.h"

namespace py = pybind11;

namespace tokfuse {

void bind_cuda(py::module_& m) {
  m.doc() = "CUDA kernels of tokfuse over device addresses";
  py::class_<cuda::Place>(m, "Place", py::module_local())
      .def(py::init([](int device, uintptr_t stream) {
             return cuda::Place{device, reinterpret_cast<cudaStream_t>(stream)};
           }),
           py::kw_only(), py::arg("device"), py::arg("stream"));
  bind_use_tensors(m);
  cuda::bind_eager(m);
  cuda::bind_packed(m);
  cuda::bind_policy(m);
  cuda::bind_rows(m);
}

}  // namespace tokfuse
