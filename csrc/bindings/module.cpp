// tokfuse._native: the kernels over raw pointers. Tensors arrive as addresses and sizes, so the
// module has no tie to a torch version. Sizes, strides and codes are checked here; addresses cannot
// be.
#include <pybind11/pybind11.h>

#include "bindings/bind.h"
#include "cpu/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
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

// Asks for 2 MiB pages on a fresh, untouched buffer: the first write to it then faults 512 times
// less often. Touching 100 MB of 4 KiB pages costs more than the kernel that fills it.
void advise_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (bytes > 0 && end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace
}  // namespace tokfuse

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of tokfuse over raw pointers";
  m.def("active_isa", &tokfuse::isa_name, "Instruction-set level the kernels run at.");
  m.def("advise_huge_pages", &tokfuse::advise_huge_pages);
  tokfuse::active_isa();  // an impossible TOKFUSE_ISA fails here, at import, not at the first call
  tokfuse::bind_token_stats(m);
  tokfuse::bind_policy(m);
  tokfuse::bind_packed(m);
  tokfuse::bind_distribution(m);
}
