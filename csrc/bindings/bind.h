// Shared by the bindings of the CPU kernels: argument checks, and one bind_<op> per file.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "bindings/objective_params.h"
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

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("tokfuse._native: ") + what);
}

// `fault` is what is wrong, or null.
inline void require_none(const char* fault) { require(fault == nullptr, fault); }

inline void require_threads(int threads) {
  require(threads >= 1 && threads <= 4096, "threads must be in [1, 4096]");
}

// A non-null pointer, unless there is nothing to point at.
inline void require_pointer(const void* pointer, int64_t count, const char* what) {
  if (count > 0 && pointer == nullptr)
    throw std::invalid_argument(std::string("tokfuse._native: ") + what + " is null");
}

inline void require_pointers(std::initializer_list<const void*> pointers, int64_t count,
                             const char* what) {
  for (const void* pointer : pointers) require_pointer(pointer, count, what);
}

// Sizes, options, tiles, the values of the index; not those of the target.
void check_logits(const LogitsArgs& a);

// Sizes, null pointers and offsets of everything but logp and entropy.
void check_objective(const ObjectiveArgs& o);

}  // namespace tokfuse
