// Shared by the bindings of the CPU kernels: checks of pointers and of what they point at, and the
// function of each file that binds its kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "bindings/checks.h"
#include "bindings/records.h"
#include "cpu/kernels.h"

namespace tokfuse {

void bind_token_stats(pybind11::module_& m);
void bind_token_stats_at(pybind11::module_& m);
void bind_policy(pybind11::module_& m);
void bind_packed(pybind11::module_& m);
void bind_distribution(pybind11::module_& m);
void bind_tensors(pybind11::module_& m);
void bind_eager(pybind11::module_& m);

inline void require_threads(int threads) {
  require(threads >= 1 && threads <= 4096, "threads must be in [1, 4096]");
}

// A non-null pointer, unless there is nothing to point at.
inline void require_pointer(const void* pointer, int64_t count, const char* what) {
  if (count > 0 && pointer == nullptr) require(false, (std::string(what) + " is null").c_str());
}

inline void require_pointers(std::initializer_list<const void*> pointers, int64_t count,
                             const char* what) {
  for (const void* pointer : pointers) require_pointer(pointer, count, what);
}

// Checks sizes, options, tiles and the values of the index. first_bad_row checks the target.
void check_logits(const LogitsArgs& a);

// Sizes, null pointers and cu_seqlens; not logp, which a fused kernel writes itself.
void check_objective(const ObjectiveArgs& o);

}  // namespace tokfuse
