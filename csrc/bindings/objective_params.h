// The records of an objective and of its inputs (runtime/policy/objective.py,
// runtime/backends/policy_record.py), for CPU and CUDA kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "common/objective_args.h"

namespace tokfuse {

// (shape, level, kl, seq_mean, (p0..p5), kl_coef, kl_clamp, entropy_coef, log_ratio_clamp)
ObjectiveParams objective_params(const pybind11::tuple& t);

// The first kObjectiveFields of a policy record; what follows is the backend's own.
// (params, tokens, seqs, logp, old_logp, advantage, advantage_per_seq, mask, cu_seqlens, weight,
// signal, ref_logp, kl_weight, entropy, entropy_weight, inv_normalizer, normalize_by_seqs,
// token_loss, d_logp, d_entropy, metrics)
constexpr size_t kObjectiveFields = 21;
ObjectiveArgs objective_args(const pybind11::tuple& t);

// Sizes, and that the sequences, the signal and the reference are there where the objective needs
// them.
void check_objective_inputs(const ObjectiveArgs& o);
void check_token_inputs(const ObjectiveParams& o, const float* signal, const float* ref_logp,
                        int64_t tokens);

// The table of shapes that this module was compiled with, as runtime/policy/shapes.py::table().
pybind11::dict shape_table();

}  // namespace tokfuse
