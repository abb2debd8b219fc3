"""Losses of the difference of two implicit rewards, with independent options: the DPO family."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from tokfuse.algorithms.preference.base import PairLoss
from tokfuse.algorithms.preference.batch import Side
from tokfuse.algorithms.preference.likelihood import NLL
from tokfuse.algorithms.stateful import State
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.shapes import clamped

LINKS = ("logistic", "robust", "hinge", "square", "exo", "discopop")
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
LENGTHS = ("sum", "mean")
EXPONENT_MAX = 80.0  # as in TRL, whose exponents are float32


@dataclass(frozen=True, kw_only=True)
class Contrast(PairLoss):
    """loss = link(u) + likelihood term, u = beta (s_chosen - s_rejected) - margin.

    s is f(logp - ref), or logp without a reference, summed over the tokens of a response or averaged.

    Args:
        beta: scale of the implicit reward, > 0.
        link: with e = smoothing. "logistic" -(1-e) log sig(u) - e log sig(-u), which is cDPO for e > 0; "robust"
            [-(1-e) log sig(u) + e log sig(-u)] / (1-2e); "hinge" max(0, 1-u); "square"
            ((u - 1/2) / beta)^2 = (s_w - s_l - 1/(2 beta))^2 (IPO); "exo" KL of (sig(u), sig(-u))
            from (1-e, e); "discopop" (1-m) (-log sig(u)) + m exp(-u), m = sig(u / tau).
        smoothing: e, in [0, 0.5), only for "logistic", "robust" and "exo".
        tau: temperature of m, only for "discopop".
        margin: subtracted from u (SimPO's gamma).
        length: "sum" or "mean" over the counting tokens.
        reference: False uses logp alone; passing a reference is then an error.
        divergence: f of the log-ratio x: "reverse_kl" x, "forward_kl" -exp(-x), "js" log sig(x),
            "alpha" exp((alpha-1) x) / (alpha-1). Exponents are clamped to at most 80, with gradient 0 beyond.
            Only "reverse_kl" has length "mean".
        alpha: parameter of the divergence "alpha", and only for it; not 1.
        nll: likelihood term of the chosen response, or None.
        weighting: "none", or "wpo": weight by how likely the policy is to generate the pair, see `PairLoss`.
        tail_weight: weight in [0, 1] of tokens beyond the length of the shorter response (LD-DPO). None: 1.
        level_weight: one weight per level of `batch.level`, see `PairLoss`. None: the mean over all pairs.
    """

    link: str = "logistic"
    smoothing: float = 0.0
    tau: float | None = None
    margin: float = 0.0
    length: str = "sum"
    reference: bool = True
    divergence: str = "reverse_kl"
    alpha: float | None = None
    nll: NLL | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self._op, "link", self.link, LINKS)
        check_choice(self._op, "length", self.length, LENGTHS)
        check_choice(self._op, "divergence", self.divergence, DIVERGENCES)
        check_number(self._op, "margin", self.margin, -math.inf)
        self._check_smoothing()
        self._check_used("tau", self.tau, self.link == "discopop", "link 'discopop'")
        self._check_used("alpha", self.alpha, self.divergence == "alpha", "divergence 'alpha'")
        if self.tau is not None:
            check_number(self._op, "tau", self.tau, 0.0, open_low=True)
        if self.alpha is not None and not abs(self.alpha - 1.0) > 1e-6:
            raise refuse(
                self._op, "alpha", "not 1 (the limit is divergence 'reverse_kl')", self.alpha, "Use that divergence."
            )
        if self.nll is not None and self.nll.level is not None and self.level_weight is None:
            raise refuse(self._op, "nll.level", "left out without level_weight", self.nll.level, "Set level_weight.")
        if self.nll is not None and self.nll.reduction == "batch_mean" and self.level_weight:
            raise refuse(
                self._op,
                "nll.reduction",
                "'sum' or 'mean' with level_weight",
                "'batch_mean'",
                "Each level has its own mean.",
            )
        if not self.reference and self.divergence != "reverse_kl":
            raise refuse(
                self._op,
                "divergence",
                "'reverse_kl' without a reference",
                repr(self.divergence),
                "Only a ratio to the reference has a divergence.",
            )
        if self.length == "mean" and self.divergence != "reverse_kl":
            raise refuse(
                self._op,
                "divergence",
                "'reverse_kl' with length 'mean'",
                repr(self.divergence),
                "The constants of f' cancel between responses of one weight only. Use length='sum'.",
            )

    def _check_smoothing(self) -> None:
        check_number(self._op, "smoothing", self.smoothing, 0.0, 0.5)
        if self.link in ("hinge", "square", "discopop") and self.smoothing != 0.0:
            raise refuse(
                self._op, "smoothing", f"left out with link {self.link!r}", self.smoothing, "It would have no effect."
            )
        if self.link == "robust" and self.smoothing == 0.5:
            raise refuse(
                self._op, "smoothing", "below 0.5 with link 'robust'", 0.5, "At 0.5 the labels carry no information."
            )
        if self.link == "exo" and self.smoothing == 0.0:
            raise refuse(self._op, "smoothing", "above 0 with link 'exo' (log 0)", 0.0, "The paper's code uses 1e-3.")

    def _check_used(self, name: str, value: object, used: bool, by: str) -> None:
        if used != (value is not None):
            want = f"given with {by}, and only then"
            raise refuse(self._op, name, want, value, "Set both options or none.")

    @property
    def needs_reference(self) -> bool:
        return self.reference

    @property
    def likelihood(self) -> NLL | None:
        return self.nll

    def score(self, side: Side) -> torch.Tensor:
        """Return s of one side: the implicit reward divided by beta."""
        x = side.log_ratio
        if self.divergence == "forward_kl":
            x = -torch.exp(clamped(-x, high=EXPONENT_MAX))
        elif self.divergence == "js":
            x = logsigmoid(x)
        elif self.divergence == "alpha":
            assert self.alpha is not None
            x = torch.exp(clamped((self.alpha - 1.0) * x, high=EXPONENT_MAX)) / (self.alpha - 1.0)
        return x / side.length if self.length == "mean" else x

    def reward(self, side: Side) -> torch.Tensor:
        """Return beta s, the value that the link compares."""
        return self.beta * self.score(side)

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        u = self.reward(chosen) - self.reward(rejected) - self.margin
        e = self.smoothing
        if self.link == "logistic":
            return -(1 - e) * logsigmoid(u) - e * logsigmoid(-u)
        if self.link == "robust":
            return (-(1 - e) * logsigmoid(u) + e * logsigmoid(-u)) / (1 - 2 * e)
        if self.link == "hinge":
            return torch.relu(1 - u)
        if self.link == "square":
            return ((u - 0.5) / self.beta) ** 2
        if self.link == "exo":
            up = torch.sigmoid(u) * (logsigmoid(u) - math.log1p(-e))
            return up + torch.sigmoid(-u) * (logsigmoid(-u) - math.log(e))
        assert self.tau is not None
        gate = u / self.tau
        # exp(-u) overflows where the gate is 0, so multiply in log space.
        return torch.sigmoid(-gate) * -logsigmoid(u) + torch.exp(logsigmoid(gate) - u)
