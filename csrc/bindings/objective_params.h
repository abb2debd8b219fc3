// What the bindings of CPU and CUDA check of an objective and its inputs alike.
#pragma once

#include "bindings/records.h"

namespace tokfuse {

// What is wrong with the sizes, or with inputs that the objective needs, or null.
const char* fault_of(const ObjectiveArgs& o);
const char* fault_of(const ObjectiveParams& o, const float* signal, const float* ref_logp,
                     int64_t tokens);

// The table of shapes that this module was compiled with, as runtime/policy/shapes.py::table().
pybind11::dict shape_table();

}  // namespace tokfuse
