// Shared by the binding files: argument checks, and one bind_<op> per file.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/objective_params.h"
#include "cpu/kernels.h"

namespace tokfuse {

void bind_token_stats(pybind11::module_& m);
void bind_policy(pybind11::module_& m);
void bind_packed(pybind11::module_& m);
void bind_distribution(pybind11::module_& m);
void bind_tensors(pybind11::module_& m);
void bind_eager(pybind11::module_& m);

using Address = uintptr_t;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("tokfuse._native: ") + what);
}

inline void require_threads(int threads) {
  require(threads >= 1 && threads <= 4096, "threads must be in [1, 4096]");
}

// A non-null pointer, unless there is nothing to point at.
inline void require_pointer(Address address, int64_t count, const char* what) {
  if (count > 0 && address == 0)
    throw std::invalid_argument(std::string("tokfuse._native: ") + what + " is null");
}

inline DType dtype_of(int code) {
  require(code >= 0 && code <= 2, "dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<DType>(code);
}

// (logits, stride, dtype, tokens, vocab, target, mask, temperatures, temperature, softcap,
// logit_scale, bias_logits, bias_stride, bias_scale, threads, index, total, tile, tile_stride)
LogitsArgs logits_args(const pybind11::tuple& t);

// Sizes, null pointers and offsets of a record that is complete but for logp and entropy.
void check_objective(const ObjectiveArgs& o);

}  // namespace tokfuse
