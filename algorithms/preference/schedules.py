"""When a copy of the policy is taken, and what becomes of the reference."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful, draws
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse


def check_period(op: str, name: str, value: object) -> None:
    """A number of steps, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refuse(op, name, "an int >= 1 (steps)", value, "Count optimizer steps.")


@register(
    "tr_dpo",
    kind="preference",
    system="The DPO family",
    label="exact",
    source="arXiv 2404.09656; TRL sync_ref_model",
    summary="the reference follows the policy: mixed in every so many steps",
)
@dataclass(frozen=True, kw_only=True)
class TRDPO(Stateful):
    """ref <- mix policy + (1 - mix) ref every `every` steps; mix 1 replaces it.

    Args:
        mix: in (0, 1].
        every: steps between two updates.

    State: none; it counts the caller's steps. Source: TRL's defaults, exact.
    """

    mix: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        check_number(self._op, "mix", self.mix, 0.0, 1.0, open_low=True)
        check_period(self._op, "every", self.every)

    def due(self, step: int) -> bool:
        """True after optimizer step `step` = every, 2 every, ..."""
        return step > 0 and step % self.every == 0

    @torch.no_grad()
    def update_(self, reference: Iterable[torch.Tensor], policy: Iterable[torch.Tensor]) -> None:
        """Overwrite the reference's parameters, in the order of the policy's."""
        for ref, new in zip(reference, policy, strict=True):
            ref.lerp_(new.to(ref.dtype), self.mix)


@register(
    "checkpoint_ring",
    kind="preference",
    system="SePPO",
    label="recon",
    source="arXiv 2410.05255 (as quoted in reviews)",
    summary="which of the saved checkpoints is reference and sampler: uniform over all",
    differs="The draw is seeded by the step; a full ring drops its oldest checkpoint (assumed: the "
    "paper's run ends with 7).",
)
@dataclass(frozen=True, kw_only=True)
class CheckpointRing(Stateful):
    """SePPO's reference: uniform over the checkpoints saved so far, step 0 among them.
    Reconstructed.

    Args:
        size: checkpoints kept.
        every: steps between two checkpoints.
        seed: of the draws.

    State: {"saved": [steps]}: plain data. Saving and loading the files is the caller's.
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
        """The state after optimizer step `step`; where `step` is in it now, save that checkpoint;
        what left it may be deleted."""
        if step % self.every or step in state["saved"]:
            return state
        return {"saved": [*state["saved"], step][-self.size :]}

    def draw(self, state: State, step: int) -> int:
        """The step whose checkpoint is the reference of step `step`; the same at every call."""
        saved: list[int] = state["saved"]
        return saved[int(draws(self.seed, step).integers(len(saved)))]


@register(
    "metatuner",
    kind="preference",
    system="MetaTuner",
    label="utility",
    required=("alpha", "every"),
    source="arXiv 2509.24245 (two agreeing notes)",
    summary="two cross-entropies, summed or in turn, and a frozen copy of the prompt decoder",
    differs="Only the loss and its schedule: prompt and LoRA generators are models. alpha and the "
    "period of the copy were not found and are required.",
)
@dataclass(frozen=True, kw_only=True)
class MetaTuner(Stateful):
    """loss = CE of the actor on D1 + alpha CE of the prompt on D2, or the two in turn. Utility.

    The actor's term samples its prompt from a frozen copy of the prompt decoder, renewed every
    `every` steps.

    Args:
        alpha: weight of the prompt's term.
        every: steps between two copies.
        form: "joint" (MetaTuner-J): the sum; "alternating" (MetaTuner-I): actor's term in even
            steps, alpha times the prompt's in odd ones.

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
        """(weight of the actor's cross-entropy, weight of the prompt's) in step 0, 1, ...; a term
        of weight 0 need not be computed."""
        if self.form == "joint":
            return 1.0, self.alpha
        return (1.0, 0.0) if step % 2 == 0 else (0.0, self.alpha)

    def copy_due(self, step: int) -> bool:
        """True before step 0, every, 2 every, ...: copy the prompt decoder."""
        return step % self.every == 0
