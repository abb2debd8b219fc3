"""A small packed batch for the policy objectives, and every method with the formula of its paper.

The formulas are Python arithmetic in float64, one token at a time. `l` is the current log-probability, and
`l0` is the same number with a stop-gradient. Derivatives are finite differences in `l`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokfuse
from tokfuse import Objective
from tokfuse.runtime.policy.shapes import Shape

LENGTHS = (5, 0, 1, 9, 4, 3)  # the last sequence is fully masked
# Log-ratios on both sides of every clip, far outside, beyond the clamp of 20, and exactly 0.
LOG_RATIOS = (
    0.05,
    -0.05,
    0.24,
    -0.3,
    0.9,
    -1.4,
    0.0,
    1.2,
    -0.12,
    25.0,
    -26.0,
    0.15,
    2.4,
    -0.6,
    0.33,
    -0.21,
    0.37,
    -2.2,
    0.1,
    -0.01,
    0.02,
    0.5,
)

# Every shape, with parameters that differ from the defaults.
SHAPES: dict[str, Shape] = {
    "linear_logp": tokfuse.LinearLogp(),
    "linear_ratio": tokfuse.LinearRatio(),
    "ppo": tokfuse.PPOClip(low=0.2, high=0.28),
    "ppo_dual_cap": tokfuse.PPOClip(low=0.1, high=0.3, dual=2.5, cap=2.0),
    "ppo_bounds": tokfuse.PPOClip(low=None, high=None, ratio_min=0.5, ratio_max=1.5, dual=1.2),
    "cispo": tokfuse.StopGradClip(low=0.4, ratio_min=None),
    "sapo": tokfuse.SigmoidGate(tau_positive=0.9),
    "gbpo": tokfuse.TargetRatio(low=0.3, high=0.2),
    "r2vpo": tokfuse.Quadratic(penalty=0.3),
    "nft": tokfuse.NFT(negative_floor=0.01, positive_floor=0.9, rate_min=0.2, rate_max=0.8),
    "gmpo": tokfuse.LogClamp(bound=0.35),
    "gamma": tokfuse.Gamma(k_positive=1.5, lam_positive=2.0, k_negative=2.5, lam_negative=1.0),
}


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of `policy_loss`, as float64 tensors."""

    logp: Tensor
    inputs: dict[str, Any]

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
        """Return (logp, the other arguments) in a dtype. Masks and offsets stay unchanged."""
        other = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in self.inputs.items()
        }
        return self.logp.to(dtype), other


def batch(*names: str, per_sequence: bool = False) -> Batch:
    """Return old_logp, advantage, mask, cu_seqlens and the named inputs. Values are exact in float32."""
    tokens, seqs = sum(LENGTHS), len(LENGTHS)
    gen = torch.Generator().manual_seed(11)

    def uniform(low: float, high: float, size: int = tokens) -> Tensor:
        return (torch.rand(size, generator=gen) * (high - low) + low).float().double()

    old = uniform(-3.0, -0.2)
    logp = (old + torch.tensor(LOG_RATIOS, dtype=torch.float64)).float().double()
    lengths = torch.tensor(LENGTHS)
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[[1, 9]] = False
    mask[-LENGTHS[-1] :] = False
    per_seq = torch.tensor([1.5, 9.0, -0.75, -1.25, 0.5, 2.0], dtype=torch.float64)
    per_token = uniform(-2.0, 2.0)
    per_token[4] = 0.0
    vectors = {
        "token_weight": uniform(0.2, 2.0),
        "signal": uniform(0.1, 0.9),
        "ref_logp": (logp + uniform(-1.5, 1.5)).float().double(),
        "kl_weight": uniform(0.0, 1.0),
        "entropy": uniform(0.1, 4.0),
        "entropy_weight": uniform(0.0, 1.0),
        "sampler_logp": (old + uniform(-0.5, 0.5)).float().double(),
    }
    vectors["anchor_logp"], vectors["anchor_weight"] = (logp + uniform(-1.5, 1.5)).float().double(), uniform(0.0, 1.0)
    vectors["ref_logp"][3], vectors["ref_logp"][6] = logp[3] + 30.0, logp[6]
    cu = torch.zeros(seqs + 1, dtype=torch.int32)
    cu[1:] = lengths.cumsum(0)
    inputs = {
        "old_logp": old,
        "cu_seqlens": cu,
        "mask": mask,
        "advantage": per_seq.repeat_interleave(lengths) if per_sequence else per_token,
    }
    return Batch(logp, inputs | {name: vectors[name] for name in names})


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ratio(l: float, o: float) -> float:  # noqa: E741
    return math.exp(clip(l - o, -20.0, 20.0))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def ppo(l, l0, o, a, s, low=0.8, high=1.28, dual=math.inf, cap=math.inf):  # noqa: E741
    loss = max(-a * min(ratio(l, o), cap), -a * clip(ratio(l, o), low, high))
    return min(loss, -a * dual) if a < 0 else loss


def sapo(l, l0, o, a, s):  # noqa: E741
    tau = 1.0 if a > 0 else 1.05
    return -(4 / tau) * sigmoid(tau * (ratio(l, o) - 1)) * a


def gbpo(l, l0, o, a, s):  # noqa: E741
    return abs(ratio(l, o) - (1 - 0.2 + (0.2 + 0.3) * sigmoid(s))) * abs(a)


def nft_ratio(l: float, o: float) -> float:  # noqa: E741
    return math.exp(clip(l - o, -20.0, 10.0))


def nft(l, l0, o, a, s, floor=1.0):  # noqa: E741
    q = clip(s, 0.02, 0.98)
    if a > 0:
        return -a * math.log(nft_ratio(l, o))
    rest, rest0 = ((1 - q * nft_ratio(x, o)) / (1 - q) for x in (l, l0))
    return a * math.log(rest + (max(rest0, floor) - rest0))  # clips the value and keeps the gradient


# Every token-level method: (objective, formula of one token(l, l0, old, advantage, signal)).
TOKEN_METHODS: dict[str, tuple[Objective, Callable[..., float]]] = {
    "ppo": (Objective(shape=tokfuse.PPOClip(low=0.2, high=0.28)), ppo),
    "ppo_dual": (Objective(shape=tokfuse.PPOClip(low=0.2, high=0.28, dual=3.0)), lambda *x: ppo(*x, dual=3.0)),
    "two_sided": (Objective(shape=tokfuse.PPOClip(low=0.2, high=0.28, cap=2.0)), lambda *x: ppo(*x, cap=2.0)),
    "bapo_bounds": (
        Objective(shape=tokfuse.PPOClip(low=None, high=None, ratio_min=0.6, ratio_max=3.0)),
        lambda *x: ppo(*x, low=0.6, high=3.0),
    ),
    "cispo": (
        Objective(shape=tokfuse.StopGradClip()),
        lambda l, l0, o, a, s: -min(ratio(l0, o), 5.0) * a * l,  # noqa: E741
    ),
    "cispo_widths": (
        Objective(shape=tokfuse.StopGradClip(low=0.3, high=0.5, ratio_min=None, ratio_max=None)),
        lambda l, l0, o, a, s: -clip(ratio(l0, o), 0.7, 1.5) * a * l,  # noqa: E741
    ),
    "sapo": (Objective(shape=tokfuse.SigmoidGate()), sapo),
    "gbpo": (Objective(shape=tokfuse.TargetRatio(low=0.2, high=0.3)), gbpo),
    "r2vpo": (
        Objective(shape=tokfuse.Quadratic(penalty=0.04)),
        lambda l, l0, o, a, s: -ratio(l, o) * a + 0.04 * (ratio(l, o) - 1) ** 2,  # noqa: E741
    ),
    "nft": (Objective(shape=tokfuse.NFT()), nft),
    "nft_low_floor": (Objective(shape=tokfuse.NFT(negative_floor=1e-3)), lambda *x: nft(*x, floor=1e-3)),
    "gpg": (Objective(shape=tokfuse.LinearLogp()), lambda l, l0, o, a, s: -a * l),  # noqa: E741
    "surrogate": (
        Objective(shape=tokfuse.LinearRatio()),
        lambda l, l0, o, a, s: -a * ratio(l, o),  # noqa: E741
    ),
}


def gspo(l, l0, o, a, s):  # noqa: E741
    """Return max(-A s, -A clip(s)) of the geometric mean ratio, for every token of the sequence."""
    mean = math.exp(sum(clip(x - y, -20, 20) for x, y in zip(l, o, strict=True)) / len(l))
    return [max(-x * mean, -x * clip(mean, 0.8, 1.2)) for x in a]


def gspo_token(l, l0, o, a, s):  # noqa: E741
    """Return the same value. The gradient goes through each token's own ratio."""
    mean = math.exp(sum(clip(x - y, -20, 20) for x, y in zip(l0, o, strict=True)) / len(l))
    own = [mean * math.exp(x - x0) for x, x0 in zip(l, l0, strict=True)]
    return [max(-x * r, -x * clip(r, 0.8, 1.2)) for x, r in zip(a, own, strict=True)]


def gmpo(l, l0, o, a, s):  # noqa: E741
    """Return -A exp(mean of sgn min(sgn d, sgn clip(d, -e, e))), e = 0.4."""
    total = 0.0
    for x, y, advantage in zip(l, o, a, strict=True):
        d, sign = clip(x - y, -20, 20), math.copysign(1.0, advantage)
        total += sign * min(sign * d, sign * clip(d, -0.4, 0.4))
    return [-x * math.exp(total / len(l)) for x in a]


def vespo(l, l0, o, a, s):  # noqa: E741
    """Return -sg(e^lam w^k e^(-lam w)) A logp with w = exp(sum of log-ratios)."""
    log_w = clip(sum(clip(x - y, -20, 20) for x, y in zip(l0, o, strict=True)), -20, 20)
    out = []
    for x, advantage in zip(l, a, strict=True):
        k, lam = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        out.append(-math.exp(lam + k * log_w - lam * math.exp(log_w)) * advantage * x)
    return out


def nft_sequence(l, l0, o, a, s):  # noqa: E741
    """Return NFT with exp(min(sum of log-ratios, 10)) as every token's ratio; A and q are per sequence."""
    total, total0 = (sum(clip(x - y, -20, 20) for x, y in zip(v, o, strict=True)) for v in (l, l0))
    return [nft(total, total0, 0.0, x, q) for x, q in zip(a, s, strict=True)]


# Every sequence-level method: formula of the valid tokens of one sequence, as lists.
SEQUENCE_METHODS: dict[str, tuple[Objective, Callable[..., list[float]]]] = {
    "gspo": (Objective(level="sequence"), gspo),
    "gspo_token": (Objective(level="sequence_token"), gspo_token),
    "gmpo": (Objective(level="sequence", shape=tokfuse.LogClamp(bound=0.4)), gmpo),
    "vespo": (Objective(level="sequence_sum", shape=tokfuse.Gamma()), vespo),
    "nft_sequence": (Objective(level="sequence_sum", shape=tokfuse.NFT()), nft_sequence),
}


def by_sequence(method: Callable[..., float] | None, sequence: Any = None) -> Callable[..., Any]:
    """Return a sequence formula that applies a token formula to each token."""
    if method is None:
        return sequence
    return lambda *lists: [method(*values) for values in zip(*lists, strict=True)]


@dataclass
class Direct:
    """Token losses (without aggregation weights) and the derivative of their total, in Python floats."""

    formula: Callable[..., list[float]]  # formula of one sequence
    batch: Batch
    term: Callable[[int, float, float], float] = field(default=lambda t, l, l0: 0.0)  # noqa: E741

    def __post_init__(self) -> None:
        i = self.batch.inputs
        self.old, self.adv = i["old_logp"].tolist(), i["advantage"].tolist()
        self.signal = i["signal"].tolist() if "signal" in i else [0.0] * len(self.old)
        keep, cu = i["mask"].tolist(), i["cu_seqlens"].tolist()
        spans = [range(a, b) for a, b in zip(cu, cu[1:], strict=False)]
        self.groups = [[t for t in span if keep[t]] for span in spans]
        self.weight = i["token_weight"].tolist() if "token_weight" in i else [1.0] * len(self.old)

    def losses(self, live: list[float], frozen: list[float]) -> list[float]:
        """Return the loss of every token; 0 for masked tokens."""
        out = [0.0] * len(live)
        for group in self.groups:
            if not group:
                continue
            lists = ([v[t] for t in group] for v in (live, frozen, self.old, self.adv, self.signal))
            for t, value in zip(group, self.formula(*lists), strict=True):
                out[t] = self.weight[t] * value + self.term(t, live[t], frozen[t])
        return out

    def evaluate(self, agg: list[float] | None = None) -> tuple[list[float], list[float]]:
        """Return (token losses times agg, derivative of their sum with respect to every logp)."""
        frozen = self.batch.logp.tolist()
        agg = agg or [1.0] * len(frozen)

        slopes = []
        for t, at in enumerate(frozen):
            up, down = list(frozen), list(frozen)
            up[t], down[t] = at + 1e-6, at - 1e-6
            pairs = zip(agg, self.losses(up, frozen), self.losses(down, frozen), strict=True)
            # Differentiate each token separately: one loss of e^20 would hide the differences of all others.
            change = math.fsum(w * (high - low) for w, high, low in pairs)
            slopes.append(change / (up[t] - down[t]))
        values = [w * x for w, x in zip(agg, self.losses(frozen, frozen), strict=True)]
        return values, slopes
