"""Preference losses that depend on more than the difference of two rewards."""

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
    """Losses of the rewards of both sides, r = beta (logp - ref).

    Args:
        beta: scale of the implicit reward, > 0.
        form: "apo_zero" 1 - sig(r_w) + sig(r_l); "apo_down" sig(r_w) + 1 - sig(r_w - r_l); "nca"
            -log sig(r_w) - (log sig(-r_w) + log sig(-r_l)) / 2; "sppo_hard" ((r_w - 1/2)^2 +
            (r_l + 1/2)^2) / beta^2.
        weighting: "none", or "wpo": weight by how likely the policy is to generate the pair, see `PairLoss`.
        tail_weight: weight in [0, 1] of tokens beyond the length of the shorter response (LD-DPO). None: 1.
        level_weight: one weight per level of `batch.level`, see `PairLoss`. None: the mean over all pairs.
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
    label="exact (released code)",
    source="arXiv 2404.04656; TRL",
    summary="a binary classifier of each side; rewards are shifted by their running mean",
    differs="The shift is the mean over the previous batches. Earlier versions of TRL first add the "
    "current batch, which would need every logp before any gradient. The current version "
    "has no shift: use shift='none'.",
)
@dataclass(frozen=True, kw_only=True)
class BCO(PairLoss):
    """loss = -log sig(r_w - d) - log sig(-(r_l - d)), r = beta (logp - ref).

    Args:
        beta: scale of the implicit reward, > 0.
        shift: "running": d is the mean over the previous batches of the mean reward of both sides, and 0 for the
            first batch. "none": d = 0.
        weighting: "none", or "wpo": weight by how likely the policy is to generate the pair, see `PairLoss`.
        tail_weight: weight in [0, 1] of tokens beyond the length of the shorter response (LD-DPO). None: 1.
        level_weight: one weight per level of `batch.level`, see `PairLoss`. None: the mean over all pairs.

    State: the running mean and the number of batches.
    Source: paper and TRL, exact.
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
        """Return the running mean with this batch added: its mean reward over all ranks."""
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
    label="exact (released code)",
    source="arXiv 2403.07691; TRL experimental/orpo",
    summary="likelihood of the chosen response plus the log odds ratio, no reference",
    differs="TRL's likelihood term also includes the prompt. Here it includes only the tokens that count.",
)
@dataclass(frozen=True, kw_only=True)
class ORPO(PairLoss):
    """loss = -a_w - lam log sig(o_w - o_l), a = logp / length, o = a - log(1 - exp(a)).

    The odds use the *mean* log-probability. log(1 - exp(a)) keeps its precision as a approaches 0. A response of
    probability 1, such as one without counting tokens, has no odds; its pair has the likelihood term only.

    Args:
        lam: weight of the odds ratio (TRL calls it beta).
        beta: scale of the reported rewards, which must stay 1. The loss does not use it.
        weighting: "none", or "wpo": weight by how likely the policy is to generate the pair, see `PairLoss`.
        tail_weight: weight in [0, 1] of tokens beyond the length of the shorter response (LD-DPO). None: 1.
        level_weight: one weight per level of `batch.level`, see `PairLoss`. None: the mean over all pairs.

    Inputs: no reference.
    State: none.
    Source: paper and TRL, exact.
    """

    beta: float = 1.0
    lam: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "lam", self.lam, 0.0)
        if self.beta != 1.0:
            raise refuse(self._op, "beta", "left out", self.beta, "Set lam, the weight of the odds ratio.")

    @property
    def needs_reference(self) -> bool:
        return False

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        has_odds = (chosen.mean < 0) & (rejected.mean < 0)
        w, r = (torch.where(has_odds, a, -1.0) for a in (chosen.mean, rejected.mean))
        contrast = torch.where(has_odds, logsigmoid(log_odds(w) - log_odds(r)), 0.0)
        return -chosen.mean - self.lam * contrast


def log_odds(a: torch.Tensor) -> torch.Tensor:
    """Return a - log(1 - exp(a)) for a < 0, without cancellation at either end."""
    near = a > -0.6931471805599453
    log1mexp = torch.where(
        near, torch.log(-torch.expm1(torch.where(near, a, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, a)))
    )
    return a - log1mexp


@register(
    "kto",
    kind="preference",
    system=FAMILY,
    label="exact (released code)",
    source="arXiv 2402.01306; TRL kto_trainer",
    summary="unpaired: each response is compared with the batch's divergence from the reference",
)
@dataclass(frozen=True, kw_only=True)
class KTO(PreferenceLoss):
    """lam_D (1 - sig(beta (rho - kl))) if desirable, lam_U (1 - sig(beta (kl - rho))) if not.

    rho = logp - ref. kl is `batch.kl`, detached and at least 0: the result of `kto_kl` on mismatched pairs.

    Args:
        beta: scale of the implicit reward, > 0.
        desirable_weight: lam_D. The authors keep lam_D n_D / (lam_U n_U) in [1, 4/3].
        undesirable_weight: lam_U.

    Inputs: desirable, kl.
    State: none.
    Source: paper and TRL, exact.
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
            raise refuse(self._op, "batch.desirable", "given", None, "Pass a label for every response.")
        if batch.kl is None:
            raise refuse(self._op, "batch.kl", "given", None, "Pass kto_kl of mismatched pairs, or 0 to leave it out.")

    def losses(self, sides: tuple[Side, ...], batch: PreferenceBatch, state: State, units: slice) -> torch.Tensor:
        assert batch.desirable is not None and batch.kl is not None
        (side,), good = sides, batch.desirable[units]
        kl = batch.kl.detach().double().clamp(min=0.0)
        up = good.double()
        sign, lam = 2 * up - 1, self.desirable_weight * up + self.undesirable_weight * (1 - up)
        return lam * (1 - torch.sigmoid(sign * self.beta * (side.log_ratio - kl)))


def mismatched(num_seqs: int) -> torch.Tensor:
    """Return for each prompt the response to append for `kto_kl`: the next prompt's. (num_seqs,) int64.

    Raises:
        ValueError: fewer than two responses, so there is no other one.
    """
    if num_seqs < 2:
        raise refuse(
            "algorithms.kto",
            "num_seqs",
            "at least 2 (a mismatched response)",
            num_seqs,
            "Use larger batches, or kl = 0.",
        )
    return (torch.arange(num_seqs, device="cpu") + 1) % num_seqs


def kto_kl(logp_sum: torch.Tensor, ref_sum: torch.Tensor, world: World | None = None) -> torch.Tensor:
    """Return max(0, mean over all ranks of logp - ref) of mismatched pairs, () float64, detached.

    Args:
        logp_sum: (seqs,), nats. Sum over the response tokens of y_(i+1) under prompt i (see `mismatched`) by the
            policy, computed without gradient.
        ref_sum: (seqs,), nats. The same by the reference.
        world: the ranks that share the batch. None: this process alone.
    """
    ratio = (logp_sum - ref_sum).detach().double()
    total = torch.stack([ratio.sum(), torch.full_like(ratio.sum(), ratio.shape[0])])
    total = (world or World()).sum(total)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0.0)


@dataclass(frozen=True, kw_only=True)
class AOT(PairLoss):
    """-(1-e) log sig(beta d) - e log sig(-beta d), where d is a difference of sorted vectors of the batch.

    Args:
        beta: scale of the implicit reward, > 0.
        paired: True: d = sort(logp_w - logp_l) - sort(ref_w - ref_l), so margins exceed the reference's.
            False: d = sort(rho_w) - sort(rho_l), so chosen log-ratios exceed rejected ones.
        smoothing: e, in [0, 0.5).
        weighting, level_weight: must be left out, because a rank of the sorted vectors belongs to no pair.
        tail_weight: weight in [0, 1] of tokens beyond the length of the shorter response (LD-DPO). None: 1.
    """

    paired: bool = True
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "smoothing", self.smoothing, 0.0, 0.5)
        if self.weighting != "none" or self.level_weight is not None:
            raise refuse(
                self._op, "weighting and level_weight", "left out", "a value", "A sorted rank belongs to no pair."
            )

    @property
    def whole(self) -> bool:
        return True

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
    summary="an earlier sample of the policy as the loser, pushed down or pulled up by an anchor test",
    differs="SePPO is for diffusion and uses squared denoising errors over timesteps. Here they are "
    "log-ratios of tokens. Assumed: at rho_w = 0 the sign is -1. There is no published beta for tokens.",
)
@dataclass(frozen=True, kw_only=True)
class SePPO(PairLoss):
    """loss = -log sig(beta (rho_w - s rho_l)), s = +1 if rho_w > 0, else -1. Analogue.

    The rejected side is a sample of an earlier checkpoint, which `CheckpointRing` draws; it is also the reference.
    If the policy has not become better on the winner, both sides are pulled up.

    Args:
        beta: scale of the implicit reward, > 0.
        weighting: "none", or "wpo": weight by how likely the policy is to generate the pair, see `PairLoss`.
        tail_weight: weight in [0, 1] of tokens beyond the length of the shorter response (LD-DPO). None: 1.
        level_weight: one weight per level of `batch.level`, see `PairLoss`. None: the mean over all pairs.

    State: none; the ring has its own state.
    """

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        w, r = self.reward(chosen), self.reward(rejected)
        sign = torch.where(w.detach() > 0, 1.0, -1.0)
        return -logsigmoid(w - sign * r)
