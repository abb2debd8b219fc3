// Checks of arguments that hold on every device: sizes, options, and inputs that belong together.
//
// They throw std::invalid_argument, in Python a ValueError. What a pointer points at is not read
// here, because on CUDA it is memory of the device; bind.h has the checks that only the CPU makes.
#pragma once

#include <cstdint>

#include "common/objective_args.h"
#include "common/packed_args.h"
#include "common/row_args.h"

namespace tokfuse {

void require(bool ok, const char* what);

void check_args(const LogitsArgs& a);
void check_args(const DivergenceArgs& a);
void check_args(const KeptArgs& a);

void check_args(const ObjectiveArgs& o);
// Inputs that the objective of `tokens` tokens needs.
void check_inputs(const ObjectiveParams& o, const float* signal, const float* ref_logp,
                  const float* anchor_logp, int64_t tokens);

void check_args(const GroupAdvantageArgs& a);
void check_args(const GaeArgs& a);
void check_args(const VtraceArgs& a);
void check_args(const WhitenArgs& a);
void check_args(const OpeArgs& a);
void check_args(const MomentsArgs& a);
void check_args(const OffPolicyArgs& a);

// Units of work of offpolicy_weights: the sequences, or without borders blocks of tokens. A block
// is one token if units are normalised by group.
int64_t offpolicy_spans(int64_t tokens, int64_t seqs, bool borders, Normalize normalize);
// Writes these units to `seqs` and `block_tokens`.
void set_spans(OffPolicyArgs* a);

}  // namespace tokfuse
