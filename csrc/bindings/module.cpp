// tokfuse._native: the kernels over raw pointers. Tensors arrive as addresses and sizes, or as
// DLPack views (bindings/eager.cpp), so the module has no tie to a torch version. Sizes, strides
// and codes are checked here; addresses cannot be.
#include <pybind11/pybind11.h>

#include "bindings/bind.h"
#include "cpu/kernels.h"

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

}  // namespace
}  // namespace tokfuse

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of tokfuse over raw pointers";
  m.attr("sanitizers") = TOKFUSE_SANITIZERS;  // "" or what CMake was given, e.g. address,undefined
  m.def("active_isa", &tokfuse::isa_name, "Instruction-set level the kernels run at.");
  tokfuse::active_isa();  // an impossible TOKFUSE_ISA fails here, at import, not at the first call
  tokfuse::bind_token_stats(m);
  tokfuse::bind_policy(m);
  tokfuse::bind_packed(m);
  tokfuse::bind_distribution(m);
  tokfuse::bind_tensors(m);
  tokfuse::bind_eager(m);
}
