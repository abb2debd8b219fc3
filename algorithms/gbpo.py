"""BPO and GBPO: regress the ratio onto an analytic bounded target, weighted by |A|."""

from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.advantages import gae_and_returns
from tokfuse.algorithms.base import State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.ops.group_advantage import group_advantage
from tokfuse.runtime.policy.shapes import Shape, TargetRatio

SOURCE = "arXiv 2604.18578; github.com/bounded-ratio-rl/bounded_ratio_rl"


@register(
    "gbpo",
    system="BRRL / BPO / GBPO",
    label="exact (released code)",
    source=SOURCE,
    summary="L1 regression of the ratio onto 1 -+ eps, by the sign of reward minus median",
    differs=(
        "tau is 1e-4 as in the released script (its config says 1.0). If all rewards of a group are "
        "equal, the advantage is exactly 0 here; in the code it is a rounding error."
    ),
)
@dataclass(frozen=True, kw_only=True)
class GBPO(Standard):
    """loss_t = |r - r*| |A|, r* = 1 - low + (low + high) sigmoid(signal).

    A = (R - mean_g) / (std_g + eps), signal = (R - median_g) / (std_g + eps) / tau.

    Outside the bounds the gradient pulls the ratio back instead of vanishing. A compares with the mean and the
    target with the median, so their signs may differ: a majority at the median is held near ratio 1, while the
    minority is moved.

    Args:
        shape: a `TargetRatio` with the widths low and high of the target.
        tau: temperature of the sigmoid. A small value saturates it.

    Inputs: group_ids.
    State: none.
    Source: released code, exact.
    """

    shape: Shape = TargetRatio(low=0.2, high=0.2)
    tau: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "tau", self.tau, 0.0, open_low=True)

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the batch with the target signal on every token."""
        batch.require(self._op, "group_ids")
        signal = group_advantage(
            self.rewards(batch), batch.group_ids, "gbpo_target", eps=self.eps, std=self.std, singleton=self.singleton
        )
        return replace(super().prepare(batch, state), signal=batch.spread(signal / self.tau))


@register(
    "bpo",
    system="BRRL / BPO / GBPO",
    label="exact (released code)",
    source=SOURCE,
    summary="GBPO with a critic: target (Q - median) / lam_target, weight |Q - V|",
    differs="The paper's settings are for control tasks. Q is the return of `tokfuse.gae`.",
)
@dataclass(frozen=True, kw_only=True)
class BPO(Standard):
    """loss_t = |r - r*| |Q - V|, r* = 1 - low + (low + high) sigmoid((Q - u) / lam_target).

    Q = GAE + V. u is the learned conditional median (`median_loss`).

    Args:
        shape: a `TargetRatio`; its widths are 0.3 for MuJoCo and Atari, 0.2 for IsaacLab.
        lam_target: temperature of the sigmoid.
        signal_bound: |signal| is clamped to this value (IsaacLab: 10). None: no clamp.

    Inputs: value, median_value, reward or token_reward.
    State: none.
    Source: released code, exact.
    """

    advantage: str = "gae"
    whiten: bool | None = False
    shape: Shape = TargetRatio(low=0.3, high=0.3)
    lam_target: float = 1e-3
    signal_bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "lam_target", self.lam_target, 0.0, open_low=True)
        if self.signal_bound is not None:
            check_number(self._op, "signal_bound", self.signal_bound, 0.0, open_low=True)

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the batch with the target signal on every token."""
        batch.require(self._op, "value", "median_value")
        assert batch.median_value is not None
        options = {k: v for k, v in self._given().items() if v is not None}
        _, q = gae_and_returns(batch, self.rewards(batch), options)
        signal = (q - batch.median_value) / self.lam_target
        if self.signal_bound is not None:
            signal = signal.clamp(-self.signal_bound, self.signal_bound)
        return replace(super().prepare(batch, state), signal=signal)


def median_loss(q: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return softplus(q - u) - (q - u) / 2 per token. Its minimum over u is a smoothed median of q.

    Args:
        q: (tokens,), returns; detached.
        u: (tokens,), the predicted median; receives the gradient.

    BPO adds this loss with coefficient 0.5.
    """
    gap = q.detach() - u
    return torch.nn.functional.softplus(gap) - 0.5 * gap
