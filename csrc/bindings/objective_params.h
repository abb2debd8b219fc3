// The objective record of runtime/objective.py, for CPU and CUDA kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "common/objective.h"

namespace tokfuse {

// (shape, level, kl, seq_mean, (p0..p5), kl_coef, kl_clamp, entropy_coef, log_ratio_clamp)
ObjectiveParams objective_params(const pybind11::tuple& t);

}  // namespace tokfuse
