"""Codes of shapes, KL estimators and levels, and the parameters of each shape by name.

Written by tools/write_shapes.py from runtime/policy/shapes.py and objective.py; do not edit.
"""

import triton
import triton.language as tl

LINEAR_LOGP = tl.constexpr(0)
LINEAR_RATIO = tl.constexpr(1)
PPO_CLIP = tl.constexpr(2)
STOP_GRAD_CLIP = tl.constexpr(3)
SIGMOID_GATE = tl.constexpr(4)
TARGET_RATIO = tl.constexpr(5)
QUADRATIC = tl.constexpr(6)
NFT = tl.constexpr(7)
LOG_CLAMP = tl.constexpr(8)
GAMMA = tl.constexpr(9)

KL_NONE = tl.constexpr(0)
KL_K1 = tl.constexpr(1)
KL_K2 = tl.constexpr(2)
KL_K3 = tl.constexpr(3)
KL_RATIO_K3 = tl.constexpr(4)
KL_K1_STRAIGHT = tl.constexpr(5)
KL_K3_STRAIGHT = tl.constexpr(6)
KL_ABS = tl.constexpr(7)

LEVEL_TOKEN = tl.constexpr(0)
LEVEL_SEQUENCE = tl.constexpr(1)
LEVEL_SEQUENCE_TOKEN = tl.constexpr(2)
LEVEL_SEQUENCE_SUM = tl.constexpr(3)

# Code -> name of each shape whose term reads `signal`.
NEEDS_SIGNAL = {5: "TargetRatio", 7: "NFT"}


@triton.jit
def ppo_clip_parameters(o):
    """Return ratio_min, ratio_max, dual, cap."""
    return o.p0, o.p1, o.p2, o.p3


@triton.jit
def stop_grad_clip_parameters(o):
    """Return ratio_min, ratio_max."""
    return o.p0, o.p1


@triton.jit
def sigmoid_gate_parameters(o):
    """Return tau_positive, tau_negative."""
    return o.p0, o.p1


@triton.jit
def target_ratio_parameters(o):
    """Return low, high."""
    return o.p0, o.p1


@triton.jit
def quadratic_parameters(o):
    """Return penalty."""
    return o.p0


@triton.jit
def nft_parameters(o):
    """Return negative_floor, positive_floor, log_ratio_max, rate_min, rate_max."""
    return o.p0, o.p1, o.p2, o.p3, o.p4


@triton.jit
def log_clamp_parameters(o):
    """Return bound."""
    return o.p0


@triton.jit
def gamma_parameters(o):
    """Return k_positive, lam_positive, k_negative, lam_negative."""
    return o.p0, o.p1, o.p2, o.p3
