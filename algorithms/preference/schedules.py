"""Schedules for copies of the policy and for the reference policy."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful, draws
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse


def check_period(op: str, name: str, value: object) -> None:
    """Raise an error unless `value` is a number of steps, an int >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refuse(op, name, "an int >= 1 (steps)", value, "Count optimizer steps.")


@register(
    "tr_dpo",
    kind="preference",
    system="The DPO family",
    label="exact (released code)",
    source="arXiv 2404.09656; TRL sync_ref_model",
    summary="the reference follows the policy: the policy is mixed in after a fixed number of steps",
)
@dataclass(frozen=True, kw_only=True)
class TRDPO(Stateful):
    """ref <- mix policy + (1 - mix) ref, every `every` steps.

    Args:
        mix: weight of the policy in (0, 1]; 1 replaces the reference.
        every: number of steps between two updates.

    State: none; the caller counts the steps.
    Source: TRL's defaults, exact.
    """

    mix: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        check_number(self._op, "mix", self.mix, 0.0, 1.0, open_low=True)
        check_period(self._op, "every", self.every)

    def due(self, step: int) -> bool:
        """Return True after optimizer step `step` = every, 2 every, ..."""
        return step > 0 and step % self.every == 0

    @torch.no_grad()
    def update_(self, reference: Iterable[torch.Tensor], policy: Iterable[torch.Tensor]) -> None:
        """Overwrite the reference's parameters, given in the same order as the policy's."""
        for ref, new in zip(reference, policy, strict=True):
            ref.lerp_(new.to(ref.dtype), self.mix)


@register(
    "checkpoint_ring",
    kind="preference",
    system="SePPO",
    label="recon",
    source="arXiv 2410.05255 (as quoted in reviews)",
    summary="draws the saved checkpoint that is reference and sampler, uniformly over all",
    differs="The draw is seeded by the step. A full ring drops its oldest checkpoint (assumed, because "
    "the paper's run ends with 7).",
)
@dataclass(frozen=True, kw_only=True)
class CheckpointRing(Stateful):
    """SePPO's reference: drawn uniformly from the checkpoints saved so far, including step 0. Reconstructed.

    Args:
        size: number of checkpoints kept.
        every: number of steps between two checkpoints.
        seed: seed of the draws.

    State: {"saved": [steps]}, plain data. The caller saves and loads the files.
    """

    size: int = 7
    every: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_period(self._op, "size", self.size)
        check_period(self._op, "every", self.every)

    def initial_state(self) -> State:
        return {"saved": [0]}

    def save(self, state: State, step: int) -> State:
        """Return the state after optimizer step `step`.

        If the new state contains `step`, save that checkpoint. A checkpoint that is no longer in it may be deleted.
        """
        if step % self.every or step in state["saved"]:
            return state
        return {"saved": [*state["saved"], step][-self.size :]}

    def draw(self, state: State, step: int) -> int:
        """Return the step whose checkpoint is the reference at `step`. Every call returns the same."""
        saved: list[int] = state["saved"]
        return saved[int(draws(self.seed, step).integers(len(saved)))]


@register(
    "metatuner",
    kind="preference",
    system="MetaTuner",
    label="utility",
    required=("alpha", "every"),
    source="arXiv 2509.24245 (two agreeing notes)",
    summary="two cross-entropies, summed or alternating, and a frozen copy of the prompt decoder",
    differs="Only the loss and its schedule; the prompt and LoRA generators are models. alpha and the "
    "period of the copy were not found, so they must be given.",
)
@dataclass(frozen=True, kw_only=True)
class MetaTuner(Stateful):
    """loss = CE of the actor on D1 + alpha CE of the prompt on D2, or the two alternating. Utility.

    The actor's term samples its prompt from a frozen copy of the prompt decoder. The copy is renewed every
    `every` steps.

    Args:
        alpha: weight of the prompt's term.
        every: number of steps between two copies.
        form: "joint" (MetaTuner-J): the sum. "alternating" (MetaTuner-I): the actor's term in even steps, alpha
            times the prompt's term in odd steps.

    State: none.
    """

    alpha: float
    every: int
    form: str = "joint"

    def __post_init__(self) -> None:
        check_number(self._op, "alpha", self.alpha, 0.0)
        check_period(self._op, "every", self.every)
        check_choice(self._op, "form", self.form, ("joint", "alternating"))

    def weights(self, step: int) -> tuple[float, float]:
        """Return (weight of the actor's cross-entropy, weight of the prompt's) of step 0, 1, ...

        A term with weight 0 does not need to be computed.
        """
        if self.form == "joint":
            return 1.0, self.alpha
        return (1.0, 0.0) if step % 2 == 0 else (0.0, self.alpha)

    def copy_due(self, step: int) -> bool:
        """Return True before step 0, every, 2 every, ..., when the prompt decoder must be copied."""
        return step % self.every == 0
