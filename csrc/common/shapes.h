// Written by tools/write_shapes.py from runtime/policy/shapes.py and objective.py; do not edit.
#pragma once

#include <cstdint>

#include "common/host_device.h"

// clang-format off
namespace tokfuse {

enum class Shape : int32_t {
  kLinearLogp = 0,
  kLinearRatio = 1,
  kPPOClip = 2,
  kStopGradClip = 3,
  kSigmoidGate = 4,
  kTargetRatio = 5,
  kQuadratic = 6,
  kNFT = 7,
  kLogClamp = 8,
  kGamma = 9,
};
constexpr int kShapeCount = 10;

enum class Level : int32_t {
  kToken = 0,
  kSequence = 1,
  kSequenceToken = 2,
  kSequenceSum = 3,
};
constexpr int kLevelCount = 4;

enum class Kl : int32_t {
  kNone = 0,
  kK1 = 1,
  kK2 = 2,
  kK3 = 3,
  kRatioK3 = 4,
  kK1Straight = 5,
  kK3Straight = 6,
  kAbs = 7,
};
constexpr int kKlCount = 8;

constexpr int kShapeSlots = 6;  // slots for the parameters of a shape

// True for a shape whose term reads `signal`.
TOKFUSE_HD bool needs_signal(Shape shape) {
  return shape == Shape::kTargetRatio || shape == Shape::kNFT;
}

// The parameters of each shape by name. `p` is ObjectiveParams::p.
struct PPOClipParameters {
  float ratio_min, ratio_max, dual, cap;
};
TOKFUSE_HD PPOClipParameters ppo_clip_parameters(const float* p) {
  return {p[0], p[1], p[2], p[3]};
}

struct StopGradClipParameters {
  float ratio_min, ratio_max;
};
TOKFUSE_HD StopGradClipParameters stop_grad_clip_parameters(const float* p) {
  return {p[0], p[1]};
}

struct SigmoidGateParameters {
  float tau_positive, tau_negative;
};
TOKFUSE_HD SigmoidGateParameters sigmoid_gate_parameters(const float* p) {
  return {p[0], p[1]};
}

struct TargetRatioParameters {
  float low, high;
};
TOKFUSE_HD TargetRatioParameters target_ratio_parameters(const float* p) {
  return {p[0], p[1]};
}

struct QuadraticParameters {
  float penalty;
};
TOKFUSE_HD QuadraticParameters quadratic_parameters(const float* p) {
  return {p[0]};
}

struct NFTParameters {
  float negative_floor, positive_floor, log_ratio_max, rate_min, rate_max;
};
TOKFUSE_HD NFTParameters nft_parameters(const float* p) {
  return {p[0], p[1], p[2], p[3], p[4]};
}

struct LogClampParameters {
  float bound;
};
TOKFUSE_HD LogClampParameters log_clamp_parameters(const float* p) {
  return {p[0]};
}

struct GammaParameters {
  float k_positive, lam_positive, k_negative, lam_negative;
};
TOKFUSE_HD GammaParameters gamma_parameters(const float* p) {
  return {p[0], p[1], p[2], p[3]};
}

// X(name, code, needs_signal, zero_without_advantage, parameters) for every shape.
#define TOKFUSE_EACH_SHAPE(X) \
  X(LinearLogp, 0, 0, 1, "") \
  X(LinearRatio, 1, 0, 1, "") \
  X(PPOClip, 2, 0, 1, "ratio_min ratio_max dual cap") \
  X(StopGradClip, 3, 0, 1, "ratio_min ratio_max") \
  X(SigmoidGate, 4, 0, 1, "tau_positive tau_negative") \
  X(TargetRatio, 5, 1, 1, "low high") \
  X(Quadratic, 6, 0, 0, "penalty") \
  X(NFT, 7, 1, 1, "negative_floor positive_floor log_ratio_max rate_min rate_max") \
  X(LogClamp, 8, 0, 1, "bound") \
  X(Gamma, 9, 0, 1, "k_positive lam_positive k_negative lam_negative")

}  // namespace tokfuse
// clang-format on
