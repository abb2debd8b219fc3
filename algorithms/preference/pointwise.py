"""Preference losses that are no function of a reward difference alone."""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from tokfuse.algorithms.batch import World
from tokfuse.algorithms.preference.base import PairLoss, PreferenceLoss
from tokfuse.algorithms.preference.batch import PreferenceBatch, Side
from tokfuse.algorithms.preference.result import PreferenceStep
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse

FAMILY = "The DPO family"
FORMS = ("apo_zero", "apo_down", "nca", "sppo_hard")


@dataclass(frozen=True, kw_only=True)
class Pointwise(PairLoss):
    """Links on the rewards of the two sides, r = beta (logp - ref).

    Args:
        beta: scale of the implicit reward.
        form: "apo_zero" 1 - sig(r_w) + sig(r_l); "apo_down" sig(r_w) + 1 - sig(r_w - r_l); "nca"
            -log sig(r_w) - (log sig(-r_w) + log sig(-r_l)) / 2; "sppo_hard" ((r_w - 1/2)^2 +
            (r_l + 1/2)^2) / beta^2.
        weighting, tail_weight, level_weight: as in `PairLoss`.
    """

    form: str = "apo_zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self._op, "form", self.form, FORMS)

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        w, r = self.reward(chosen), self.reward(rejected)
        if self.form == "apo_zero":
            return 1 - torch.sigmoid(w) + torch.sigmoid(r)
        if self.form == "apo_down":
            return torch.sigmoid(w) + 1 - torch.sigmoid(w - r)
        if self.form == "nca":
            return -logsigmoid(w) - 0.5 * (logsigmoid(-w) + logsigmoid(-r))
        return ((w - 0.5) ** 2 + (r + 0.5) ** 2) / self.beta**2


@register(
    "bco_pair",
    kind="preference",
    system=FAMILY,
    label="exact",
    source="arXiv 2404.04656; TRL",
    summary="a binary classifier of each side, rewards shifted by their running mean",
    differs="The shift is the mean over the batches before this one. TRL's earlier versions take "
    "this batch into it first, which would need every logp before any gradient; its present one "
    "has no shift: shift='none'.",
)
@dataclass(frozen=True, kw_only=True)
class BCO(PairLoss):
    """loss = -log sig(r_w - d) - log sig(-(r_l - d)), r = beta (logp - ref).

    Args:
        beta: scale of the implicit reward.
        shift: "running": d is the mean over earlier batches of the mean reward of both sides, 0 at
            first; "none": d = 0.
        weighting, tail_weight, level_weight: as in `PairLoss`.

    State: the running mean and the number of batches. Source: paper and TRL, exact.
    """

    shift: str = "running"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self._op, "shift", self.shift, ("running", "none"))

    def initial_state(self) -> State:
        return {"mean": 0.0, "batches": 0} if self.shift == "running" else {}

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        d = state["mean"] if self.shift == "running" else 0.0
        return -logsigmoid(self.reward(chosen) - d) - logsigmoid(d - self.reward(rejected))

    def update(self, state: State, step: PreferenceStep) -> State:
        """The mean over one batch more; the mean reward over all ranks."""
        if self.shift == "none":
            return state
        rewards = torch.cat(step.rewards)
        total = torch.stack([rewards.sum(), torch.full_like(rewards.sum(), rewards.shape[0])])
        total = step.batch.world.sum(total)
        if total[1] == 0:
            return state
        batches = state["batches"] + 1
        mean = state["mean"] + (float(total[0] / total[1]) - state["mean"]) / batches
        return {"mean": mean, "batches": batches}


@register(
    "orpo",
    kind="preference",
    system=FAMILY,
    label="exact",
    source="arXiv 2403.07691; TRL experimental/orpo",
    summary="likelihood of the chosen response and the log odds ratio, no reference",
    differs="TRL's likelihood term covers the prompt, too; here it covers the tokens that count.",
)
@dataclass(frozen=True, kw_only=True)
class ORPO(PairLoss):
    """loss = -a_w - lam log sig(o_w - o_l), a = logp / length, o = a - log(1 - exp(a)).

    The odds are those of the *mean* log-probability, and log(1 - exp(a)) keeps its digits as a
    approaches 0.

    Args:
        lam: weight of the odds ratio (TRL calls it beta).
        beta: unused by the loss; scale of the reported rewards. Left at 1.
        weighting, tail_weight, level_weight: as in `PairLoss`.

    Inputs: no reference. State: none. Source: paper and TRL, exact.
    """

    beta: float = 1.0
    lam: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "lam", self.lam, 0.0)
        if self.beta != 1.0:
            raise refuse(self._op, "beta", "left out", self.beta, "ORPO's weight is lam.")

    @property
    def needs_reference(self) -> bool:
        return False

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        ratio = log_odds(chosen.mean) - log_odds(rejected.mean)
        return -chosen.mean - self.lam * logsigmoid(ratio)


def log_odds(a: torch.Tensor) -> torch.Tensor:
    """a - log(1 - exp(a)) for a < 0, without cancellation at either end."""
    near = a > -0.6931471805599453
    log1mexp = torch.where(
        near, torch.log(-torch.expm1(torch.where(near, a, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, a)))
    )
    return a - log1mexp


@register(
    "kto",
    kind="preference",
    system=FAMILY,
    label="exact",
    source="arXiv 2402.01306; TRL kto_trainer",
    summary="unpaired: each response against the batch's divergence from the reference",
)
@dataclass(frozen=True, kw_only=True)
class KTO(PreferenceLoss):
    """lam_D (1 - sig(beta (rho - kl))) if desirable, lam_U (1 - sig(beta (kl - rho))) if not.

    rho = logp - ref. kl, `batch.kl`, is detached and at least 0: `kto_kl` of mismatched pairs.

    Args:
        beta: scale of the implicit reward.
        desirable_weight, undesirable_weight: lam_D, lam_U; the authors keep lam_D n_D / (lam_U n_U)
            in [1, 4/3].

    Inputs: desirable, kl. State: none. Source: paper and TRL, exact.
    """

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "desirable_weight", self.desirable_weight, 0.0)
        check_number(self._op, "undesirable_weight", self.undesirable_weight, 0.0)

    def check(self, batch: PreferenceBatch) -> None:
        self.check_reference(batch)
        if batch.desirable is None:
            raise refuse(self._op, "batch.desirable", "given", None, "Label every response.")
        if batch.kl is None:
            raise refuse(self._op, "batch.kl", "given", None, "Pass kto_kl of mismatched pairs; 0 leaves it out.")

    def losses(self, sides: tuple[Side, ...], batch: PreferenceBatch, state: State, units: slice) -> torch.Tensor:
        assert batch.desirable is not None and batch.kl is not None
        (side,), good = sides, batch.desirable[units]
        kl = batch.kl.detach().double().clamp(min=0.0)
        up = good.double()
        sign, lam = 2 * up - 1, self.desirable_weight * up + self.undesirable_weight * (1 - up)
        return lam * (1 - torch.sigmoid(sign * self.beta * (side.log_ratio - kl)))


def mismatched(num_seqs: int) -> torch.Tensor:
    """(num_seqs,) int64: the response to put behind each prompt for `kto_kl`: the next one's.

    Raises:
        ValueError: fewer than two responses: there is no other one.
    """
    if num_seqs < 2:
        raise refuse(
            "algorithms.kto",
            "num_seqs",
            "at least 2 (a mismatched response)",
            num_seqs,
            "Use larger batches, or kl = 0.",
        )
    return (torch.arange(num_seqs) + 1) % num_seqs


def kto_kl(logp_sum: torch.Tensor, ref_sum: torch.Tensor, world: World | None = None) -> torch.Tensor:
    """() float64: max(0, mean over all ranks of logp - ref) of mismatched pairs, detached.

    Args:
        logp_sum, ref_sum: (seqs,), nats: sums over the response tokens of y_(i+1) under prompt i
            (`mismatched`), by policy and reference, without gradient.
        world: the ranks that share the batch.
    """
    ratio = (logp_sum - ref_sum).detach().double()
    total = torch.stack([ratio.sum(), torch.full_like(ratio.sum(), ratio.shape[0])])
    total = (world or World()).sum(total)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0.0)


@dataclass(frozen=True, kw_only=True)
class AOT(PairLoss):
    """-(1-e) log sig(beta d) - e log sig(-beta d), d a difference of sorted vectors of the batch.

    Args:
        beta: scale of the implicit reward.
        paired: True: d = sort(logp_w - logp_l) - sort(ref_w - ref_l): the margins dominate the
            reference's. False: d = sort(rho_w) - sort(rho_l): chosen log-ratios dominate rejected.
        smoothing: e, in [0, 0.5).
        weighting, level_weight: must be left out: a rank belongs to no pair.
        tail_weight: as in `PairLoss`.
    """

    whole = True
    paired: bool = True
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "smoothing", self.smoothing, 0.0, 0.5)
        if self.weighting != "none" or self.level_weight is not None:
            raise refuse(
                self._op, "weighting and level_weight", "left out", "a value", "A sorted rank belongs to no pair."
            )

    def check(self, batch: PreferenceBatch) -> None:
        super().check(batch)
        if batch.pair_weight is not None:
            raise refuse(self._op, "batch.pair_weight", "left out", "a tensor", "A sorted rank belongs to no pair.")

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        if self.paired:
            left, right = chosen.logp - rejected.logp, chosen.ref - rejected.ref
        else:
            left, right = chosen.log_ratio, rejected.log_ratio
        u = self.beta * (left.sort().values - right.sort().values)
        return -(1 - self.smoothing) * logsigmoid(u) - self.smoothing * logsigmoid(-u)


@register(
    "seppo",
    kind="preference",
    system="SePPO",
    label="analogue",
    source="inspired by arXiv 2410.05255 Eqs. 7-8, 13-14 (as quoted in reviews)",
    summary="own earlier sample as the loser, pushed down or pulled up by an anchor test",
    differs="SePPO is for diffusion: squared denoising errors over timesteps. Here log-ratios of "
    "tokens. Assumed: at rho_w = 0 the sign is -1. No published beta for tokens.",
)
@dataclass(frozen=True, kw_only=True)
class SePPO(PairLoss):
    """loss = -log sig(beta (rho_w - s rho_l)), s = +1 where rho_w > 0, else -1. Analogue.

    The rejected side is a sample of an earlier checkpoint, which is also the reference: drawn by
    `CheckpointRing`. Where the policy has not become better on the winner, both are pulled up.

    Args:
        beta: scale of the implicit reward.
        weighting, tail_weight, level_weight: as in `PairLoss`.

    State: none; the ring has its own.
    """

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        w, r = self.reward(chosen), self.reward(rejected)
        sign = torch.where(w.detach() > 0, 1.0, -1.0)
        return -logsigmoid(w - sign * r)
