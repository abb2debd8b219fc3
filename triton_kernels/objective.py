"""The per-token mathematics of every policy objective, as jit functions.

    policy_term: loss of one token and its derivative, as a function of the log-ratio
    kl_term:     KL estimate of one token and its derivative with respect to logp
    token_terms: the weighted sum of both and the entropy bonus, for the row and token kernels

csrc/common/objective.h has the same functions for the CPU and CUDA kernels. Shape, KL estimator and
the presence of an input are compile-time values; all numbers are run-time values. All functions
accept scalars (one row per program) and blocks of tokens, in float32. runtime/policy/shapes.py
defines the codes and the parameter names; shape_codes.py is generated from it. Notation: A
advantage, r = exp(log_ratio), k = logp - ref_logp.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tokfuse.triton_kernels.shape_codes import (
    GAMMA,
    KL_ABS,
    KL_K1,
    KL_K1_STRAIGHT,
    KL_K2,
    KL_K3,
    KL_K3_STRAIGHT,
    KL_NONE,
    KL_RATIO_K3,
    LINEAR_LOGP,
    LINEAR_RATIO,
    LOG_CLAMP,
    NEEDS_SIGNAL,
    NFT,
    PPO_CLIP,
    QUADRATIC,
    SIGMOID_GATE,
    STOP_GRAD_CLIP,
    TARGET_RATIO,
    gamma_parameters,
    log_clamp_parameters,
    nft_parameters,
    ppo_clip_parameters,
    quadratic_parameters,
    sigmoid_gate_parameters,
    stop_grad_clip_parameters,
    target_ratio_parameters,
)

# The log-ratio that a bound applies to: that of each token, or the one at the objective's level. A
# token-level objective applies both bounds at once.
TOKEN_STAGE = tl.constexpr(1)
LEVEL_STAGE = tl.constexpr(2)
BOTH_STAGES = tl.constexpr(3)

CLIPPED_LOW = tl.constexpr(1)  # A < 0 and r below the lower bound: no gradient
CLIPPED_HIGH = tl.constexpr(2)  # A > 0 and r above the upper bound: no gradient
CLIPPED_DUAL = tl.constexpr(4)  # A < 0 and r above the dual bound or the cap: no gradient


class ObjectiveNumbers(NamedTuple):
    """The run-time values of an objective. shape_codes.py gives names to p0, ..., p5."""

    p0: Any
    p1: Any
    p2: Any
    p3: Any
    p4: Any
    p5: Any
    kl_coef: Any  # may be negative
    kl_clamp: Any  # bound on |k|; the gradient is zero outside
    entropy_coef: Any
    log_ratio_clamp: Any  # bound on |logp - old_logp|; the gradient is zero outside
    anchor_coef: Any  # of the second KL term; may be negative
    anchor_clamp: Any


# The objective of the compile cases: PPO's clip with all bounds and a KL term.
CASE_CODES = (PPO_CLIP.value, KL_K3.value, KL_NONE.value)
CASE_NUMBERS = ObjectiveNumbers(0.8, 1.2, 3.0, 9.0, 0.0, 0.0, 0.1, 20.0, 0.01, 20.0, 0.0, 20.0)


class TokenPointers(NamedTuple):
    """Per-token inputs, each (T,) float32; None if the objective has no such term."""

    old_logp: Any
    advantage: Any
    mask: Any  # (T,) bool; None: every token counts
    agg_weight: Any  # aggregation weight without 1 / normaliser; None: 1
    token_weight: Any
    signal: Any
    ref_logp: Any
    kl_weight: Any
    entropy_weight: Any
    anchor_logp: Any = None
    anchor_weight: Any = None


def require_signal(x: TokenPointers, shape: int) -> None:
    """Raise an error if the shape reads a signal and there is none: the kernels would use 0."""
    if shape in NEEDS_SIGNAL and x.signal is None:
        raise ValueError(f"triton_kernels: signal must be given for shape {NEEDS_SIGNAL[shape]}; got None.")


@triton.jit
def load_or(ptr, offs, keep, missing: tl.constexpr):
    """Return ptr[offs] if keep, else 0. For an absent input return the number `missing`."""
    if ptr is None:
        return missing
    else:
        return tl.load(ptr + offs, mask=keep, other=0.0)


@triton.jit
def clip(x, low, high):
    """Return x limited to [low, high]. NaN stays NaN, which tl.minimum does not guarantee."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def sigmoid(x):
    # exp takes a non-positive argument. So it cannot overflow, and the tail keeps its relative
    # accuracy.
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def expm1_pair(x):
    """Return (e^x - 1, e^x - 1 - x) with a relative error of a few roundings. tl has no expm1."""
    # Series for |x| < 1/2. Its first dropped term is x^9 / 9!, 4e-8 of the sum.
    q = 2.48015873e-5 * x + 1.98412698e-4
    q = q * x + 1.38888889e-3
    q = q * x + 8.33333333e-3
    q = q * x + 4.16666667e-2
    q = q * x + 1.66666667e-1
    q = (q * x + 0.5) * x * x
    em1 = tl.exp(x) - 1.0
    small = tl.abs(x) < 0.5
    return tl.where(small, x + q, em1), tl.where(small, q, em1 - x)


@triton.jit
def bounded_log_ratio(log_ratio, a, o, SHAPE: tl.constexpr, STAGE: tl.constexpr):
    """Return (log_ratio after the objective's clamps, 0 if a clamp stops the gradient else 1).

    LogClamp narrows the token bound on the side that would improve the objective. NFT narrows the
    upper bound at the objective's level.
    """
    low, high = -o.log_ratio_clamp, o.log_ratio_clamp
    if SHAPE == LOG_CLAMP and STAGE != LEVEL_STAGE:
        bound = tl.minimum(log_clamp_parameters(o), o.log_ratio_clamp)
        high = tl.where(a >= 0.0, bound, o.log_ratio_clamp)
        low = tl.where(a <= 0.0, -bound, -o.log_ratio_clamp)
    if SHAPE == NFT and STAGE != TOKEN_STAGE:
        _, _, log_ratio_max, _, _ = nft_parameters(o)
        high = tl.minimum(log_ratio_max, o.log_ratio_clamp)
    inside = tl.where((log_ratio < low) | (log_ratio > high), 0.0, 1.0)
    return clip(log_ratio, low, high), inside


@triton.jit
def clip_flags(a, r, low, high):
    return tl.where((a < 0.0) & (r < low), CLIPPED_LOW, tl.where((a > 0.0) & (r > high), CLIPPED_HIGH, 0))


@triton.jit
def ppo_clip_term(r, a, o):
    ratio_min, ratio_max, dual, cap = ppo_clip_parameters(o)
    ceiling = tl.minimum(dual, cap)
    flags = clip_flags(a, r, ratio_min, ratio_max)
    flags = tl.where((flags == 0) & (a < 0.0) & (r > ceiling), CLIPPED_DUAL, flags)
    value = tl.where(flags == CLIPPED_LOW, ratio_min, tl.where(flags == CLIPPED_HIGH, ratio_max, r))
    loss = -a * tl.where(flags == CLIPPED_DUAL, ceiling, value)
    return loss, tl.where(flags == 0, loss, 0.0), flags


@triton.jit
def nft_term(r, a, rate, o):
    """Return (loss, d loss / d log_ratio). The floors change the value only, not the gradient."""
    negative_floor, positive_floor, _, rate_min, rate_max = nft_parameters(o)
    above = tl.where(r > positive_floor, r, positive_floor)
    q = clip(rate, rate_min, rate_max)
    rest = (1.0 - q * r) / (1.0 - q)
    floored = tl.where(rest > negative_floor, rest, negative_floor)
    loss = tl.where(a > 0.0, -a * tl.log(above), tl.where(a < 0.0, a * tl.log(floored), 0.0))
    up = -a * (r / above)
    down = -a * (q * r / (1.0 - q)) / floored
    return loss, tl.where(a > 0.0, up, tl.where(a < 0.0, down, 0.0))


@triton.jit
def policy_term(log_ratio, logp, a, signal, o, SHAPE: tl.constexpr):
    """Return (loss, d loss / d log_ratio, d loss / d logp through an explicit logp, clip flags)."""
    r = tl.exp(log_ratio)
    zero = tl.where(r >= 0.0, 0.0, 0.0)  # not r * 0: r may be NaN
    flags = tl.where(r >= 0.0, 0, 0)
    if SHAPE == LINEAR_LOGP:
        return -a * logp, zero, -a + zero, flags
    elif SHAPE == LINEAR_RATIO or SHAPE == LOG_CLAMP:
        loss = tl.where(a == 0.0, 0.0, -a * r)
        return loss, loss, zero, flags
    elif SHAPE == PPO_CLIP:
        loss, d_log_ratio, flags = ppo_clip_term(r, a, o)
        return loss, d_log_ratio, zero, flags
    elif SHAPE == STOP_GRAD_CLIP:
        ratio_min, ratio_max = stop_grad_clip_parameters(o)
        d_logp = -clip(r, ratio_min, ratio_max) * a
        return d_logp * logp, zero, d_logp, clip_flags(a, r, ratio_min, ratio_max)
    elif SHAPE == SIGMOID_GATE:
        tau_positive, tau_negative = sigmoid_gate_parameters(o)
        tau = tl.where(a > 0.0, tau_positive, tau_negative)
        s = sigmoid(tau * (r - 1.0))
        complement = sigmoid(-tau * (r - 1.0))  # 1 - s would lose digits
        return -(4.0 / tau) * s * a, -4.0 * s * complement * r * a, zero, flags
    elif SHAPE == TARGET_RATIO:
        low, high = target_ratio_parameters(o)
        gap = r - (1.0 - low + (low + high) * sigmoid(signal))
        slope = tl.where(gap > 0.0, r, tl.where(gap < 0.0, -r, 0.0))
        return tl.abs(gap) * tl.abs(a), tl.abs(a) * slope, zero, flags
    elif SHAPE == QUADRATIC:
        penalty, over = quadratic_parameters(o), r - 1.0
        return -a * r + penalty * over * over, -r * (a - 2.0 * penalty * over), zero, flags
    elif SHAPE == NFT:
        loss, d_log_ratio = nft_term(r, a, signal, o)
        return loss, d_log_ratio, zero, flags
    else:
        tl.static_assert(SHAPE == GAMMA)
        k_positive, lam_positive, k_negative, lam_negative = gamma_parameters(o)
        k, lam = tl.where(a >= 0.0, k_positive, k_negative), tl.where(a >= 0.0, lam_positive, lam_negative)
        d_logp = -tl.exp(lam + k * log_ratio - lam * r) * a
        return d_logp * logp, zero, d_logp, flags


@triton.jit
def kl_term(logp, ref_logp, log_ratio, clamp, log_ratio_clamp, KL: tl.constexpr):
    """Return (KL estimate, its derivative in logp). `log_ratio` (to old_logp): RatioK3 only."""
    raw = logp - ref_logp
    k = clip(raw, -clamp, clamp)
    inside = tl.where((raw < -clamp) | (raw > clamp), 0.0, 1.0)
    em1, k3 = expm1_pair(-k)  # e^-k - 1 and e^-k - 1 + k
    if KL == KL_K1:
        return k, inside
    elif KL == KL_K2:
        return 0.5 * k * k, inside * k
    elif KL == KL_K3:
        return k3, inside * -em1
    elif KL == KL_RATIO_K3:
        d = clip(log_ratio, -log_ratio_clamp, log_ratio_clamp)
        r = tl.exp(d)
        return r * k3, r * (tl.where(d == log_ratio, k3, 0.0) - inside * em1)
    elif KL == KL_K1_STRAIGHT:
        return k, inside * k
    elif KL == KL_K3_STRAIGHT:
        return k3, inside * k
    else:
        tl.static_assert(KL == KL_ABS)
        return tl.abs(k), inside * tl.where(k > 0.0, 1.0, tl.where(k < 0.0, -1.0, 0.0))


@triton.jit
def token_terms(
    log_ratio,  # at the objective's level, bounded
    logp,
    old_logp,
    entropy,
    a,
    agg,  # aggregation weight times 1 / normaliser
    x,  # TokenPointers
    offs,
    keep,
    o,  # ObjectiveNumbers
    SHAPE: tl.constexpr,
    KL: tl.constexpr,
    ANCHOR: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
):
    """Return (token loss, d_logp, d_entropy, chain, flags).

    `chain` is the derivative through the ratio; d_logp excludes it. Sequence levels share it
    between the tokens of the sequence.
    """
    w = load_or(x.token_weight, offs, keep, 1.0)
    signal = load_or(x.signal, offs, keep, 0.0)
    loss, d_ratio, d_logp, flags = policy_term(log_ratio, logp, a, signal, o, SHAPE)
    loss, d_logp = w * loss, w * d_logp
    d_entropy = tl.where(loss == 0.0, 0.0, 0.0)
    if KL != KL_NONE:
        ref_logp = tl.load(x.ref_logp + offs, mask=keep, other=0.0)
        kl, d_kl = kl_term(logp, ref_logp, logp - old_logp, o.kl_clamp, o.log_ratio_clamp, KL)
        coef = o.kl_coef * load_or(x.kl_weight, offs, keep, 1.0)
        loss += coef * kl
        d_logp += coef * d_kl
    if ANCHOR != KL_NONE:
        anchor_logp = tl.load(x.anchor_logp + offs, mask=keep, other=0.0)
        kl, d_kl = kl_term(logp, anchor_logp, logp - old_logp, o.anchor_clamp, o.log_ratio_clamp, ANCHOR)
        coef = o.anchor_coef * load_or(x.anchor_weight, offs, keep, 1.0)
        loss += coef * kl
        d_logp += coef * d_kl
    if ENTROPY_BONUS:
        d_entropy = -o.entropy_coef * load_or(x.entropy_weight, offs, keep, 1.0) + d_entropy
        loss += d_entropy * entropy
    return agg * loss, agg * d_logp, agg * d_entropy, agg * w * d_ratio, flags


@triton.jit
def token_objective(
    logp,
    entropy,
    scale,  # inv_normalizer: 1 / normaliser
    x,
    offs,
    keep,
    o,
    SHAPE: tl.constexpr,
    KL: tl.constexpr,
    ANCHOR: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
):
    """Return (token loss, d_logp, d_entropy, ratio, flags) of a token-level objective.

    The first three are 0 for masked tokens.
    """
    old_logp = tl.load(x.old_logp + offs, mask=keep, other=0.0)
    a = tl.load(x.advantage + offs, mask=keep, other=0.0)
    agg = scale * load_or(x.agg_weight, offs, keep, 1.0)
    d, inside = bounded_log_ratio(logp - old_logp, a, o, SHAPE, BOTH_STAGES)
    loss, d_logp, d_entropy, chain, flags = token_terms(
        d, logp, old_logp, entropy, a, agg, x, offs, keep, o, SHAPE, KL, ANCHOR, ENTROPY_BONUS
    )
    d_logp += inside * chain
    return (tl.where(keep, loss, 0.0), tl.where(keep, d_logp, 0.0), tl.where(keep, d_entropy, 0.0), tl.exp(d), flags)
