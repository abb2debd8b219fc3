// Chooses the instruction-set level once per process: the highest that the processor supports, or
// the one that TOKFUSE_ISA=v2|v3|v4 names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace tokfuse {
namespace {

Isa detect() {
#if defined(TOKFUSE_ISA_LEVELS)
  __builtin_cpu_init();
  Isa best = Isa::kBase;
  if (__builtin_cpu_supports("x86-64-v2")) best = Isa::kV2;
  if (__builtin_cpu_supports("x86-64-v3")) best = Isa::kV3;
  if (__builtin_cpu_supports("x86-64-v4")) best = Isa::kV4;
  if (best == Isa::kBase) throw std::runtime_error("the processor lacks x86-64-v2");
  const char* wanted = std::getenv("TOKFUSE_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  const std::string name = wanted;
  const Isa isa = name == "v2"   ? Isa::kV2
                  : name == "v3" ? Isa::kV3
                  : name == "v4" ? Isa::kV4
                                 : Isa::kBase;
  if (isa == Isa::kBase || static_cast<int>(isa) > static_cast<int>(best)) {
    throw std::runtime_error(
        "TOKFUSE_ISA must be v2, v3 or v4 and supported by this processor; got " + name);
  }
  return isa;
#else
  return Isa::kBase;
#endif
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace tokfuse
