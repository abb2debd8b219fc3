// tokfuse._native: the kernels over raw pointers.
//
// Tensors arrive as addresses and sizes in named structs (bindings/records.h) or as DLPack views
// (bindings/eager.cpp), so the module does not depend on a torch version. The bindings check sizes,
// strides and codes. They cannot check addresses.
#include <pybind11/pybind11.h>

#include "bindings/bind.h"
#include "bindings/records.h"
#include "cpu/kernels.h"
#if defined(TOKFUSE_WITH_CUDA)
#include "bindings/bind_cuda.h"
#endif

namespace tokfuse {
namespace {

const char* isa_name() {
  switch (active_isa()) {
    case Isa::kV4:
      return "x86-64-v4";
    case Isa::kV3:
      return "x86-64-v3";
    case Isa::kV2:
      return "x86-64-v2";
    case Isa::kBase:
      break;
  }
  return "baseline";
}

// The table of shapes that this module was compiled with, as runtime/policy/shapes.py::table().
pybind11::dict shape_table() {
  namespace py = pybind11;
  py::dict table;
#define TOKFUSE_ROW(name, code, signal, zero, parameters)                                          \
  table[#name] = py::make_tuple(code, py::tuple(py::str(parameters).attr("split")()), signal != 0, \
                                zero != 0);
  TOKFUSE_EACH_SHAPE(TOKFUSE_ROW)
#undef TOKFUSE_ROW
  return table;
}

}  // namespace
}  // namespace tokfuse

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of tokfuse over raw pointers";
  m.attr("sanitizers") = TOKFUSE_SANITIZERS;  // "" or what CMake was given, e.g. address,undefined
  m.def("active_isa", &tokfuse::isa_name, "Instruction-set level the kernels run at.");
  m.attr("cuda_version") = TOKFUSE_CUDA_VERSION;  // of nvcc; "" without CUDA kernels
  m.attr("cuda_archs") = TOKFUSE_CUDA_ARCHS;      // e.g. "80,90,100,120"
  m.attr("shapes") = tokfuse::shape_table();
  tokfuse::bind_records(m);
#if defined(TOKFUSE_WITH_CUDA)
  pybind11::module_ cuda = m.def_submodule("cuda");
  tokfuse::bind_cuda(cuda);
  for (const char* name : tokfuse::record_names()) cuda.attr(name) = m.attr(name);
#endif
  tokfuse::active_isa();  // an impossible TOKFUSE_ISA fails here, at import, not at the first call
  tokfuse::bind_token_stats(m);
  tokfuse::bind_token_stats_at(m);
  tokfuse::bind_policy(m);
  tokfuse::bind_packed(m);
  tokfuse::bind_distribution(m);
  tokfuse::bind_tensors(m);
  tokfuse::bind_eager(m);
}
