"""Methods whose loss is one divergence over the whole vocabulary: GKD, DistiLLM, total variation."""

from dataclasses import dataclass

from tokfuse.algorithms.distillation.base import Distillation, DistillationPlan, mean_plan
from tokfuse.algorithms.distillation.batch import DistillationBatch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful, draws
from tokfuse.runtime.core.checks import check_choice, check_integer, check_number
from tokfuse.runtime.core.divergence import generalised_jsd
from tokfuse.runtime.core.errors import refuse


@register(
    "gkd",
    kind="distillation",
    system="GKD",
    label="exact (released code)",
    source="arXiv 2306.13649 Eq. 1, Alg. 1; TRL experimental/gkd",
    summary="generalised JSD on a mixture of the student's own responses and the data set's",
    differs="lam 0.5 and beta 0.5 are TRL's defaults; the paper compares several values of both. TRL's default "
    "temperature is 0.9, which it also samples with; here it is 1, as in the paper. TRL draws u <= lam, so its "
    "lam=0 can still sample from the student; here u < lam. The paper's optional reward is the loss of another "
    "method, added.",
)
@dataclass(frozen=True, kw_only=True)
class GKD(Distillation):
    """loss = mean over tokens of JSD(beta) = beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    p is the student, q the teacher. beta = 0 is KL(q || p), the forward KL, and beta = 1 is KL(p || q), the reverse KL:
    the limits of JSD(beta) / beta and JSD(beta) / (1 - beta), as in the paper's and TRL's convention.

    Each step takes the student's responses with probability lam, and otherwise the data set's responses; see `source`.

    Args:
        beta: weight of the teacher in the mixture m, in [0, 1].
        lam: share of steps on the student's own responses, in [0, 1]. 1 is fully on-policy.
        temperature: divides the logits of both models, > 0. The loss is not multiplied by its square.
        aggregation: "token_mean", as in TRL, or "seq_mean_token_mean".
        seed: seed of the draws of `source`.

    Inputs: the responses of the step. No log-probabilities are needed.
    State: none.
    Source: the paper and TRL, exact.
    """

    beta: float = 0.5
    lam: float = 0.5
    temperature: float = 1.0
    aggregation: str = "token_mean"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self._op, "beta", self.beta, 0.0, 1.0)
        check_number(self._op, "lam", self.lam, 0.0, 1.0)
        check_integer(self._op, "seed", self.seed, 0)
        self.check_temperature(self.temperature)
        self.check_aggregation(self.aggregation)

    def source(self, step: int) -> str:
        """Return whose responses to train on in a step: "student" or "data". Every call returns the same."""
        return "student" if draws(self.seed, step).random() < self.lam else "data"

    def objective(self, batch: DistillationBatch) -> DistillationPlan:
        """Return the plan of a batch, for `distill_step`."""
        self.check_contexts(batch)
        return mean_plan(batch, generalised_jsd(self.beta), self.aggregation, temperature=self.temperature)


@register(
    "tvd",
    kind="distillation",
    system="Total variation distillation",
    label="exact (released code)",
    source="arXiv 2307.15190; the released code of DistiLLM (tv_distance)",
    summary="half the L1 distance of the two distributions, token by token",
    differs="The paper derives the token-level distance from a bound on the sequence-level one, and samples from both "
    "models. Here the responses are those that you pass. The gradient at p = q is 0.",
)
@dataclass(frozen=True, kw_only=True)
class TotalVariation(Distillation):
    """loss = mean over tokens of 1/2 sum_v |p_v - q_v|. At most 1, so no single token dominates.

    Args:
        temperature: divides the logits of both models, > 0.
        aggregation: "token_mean", as in the released code, or "seq_mean_token_mean".

    Inputs: the responses of the step.
    State: none.
    Source: the released code of DistiLLM, exact.
    """

    temperature: float = 1.0
    aggregation: str = "token_mean"

    def __post_init__(self) -> None:
        self.check_temperature(self.temperature)
        self.check_aggregation(self.aggregation)

    def objective(self, batch: DistillationBatch) -> DistillationPlan:
        """Return the plan of a batch, for `distill_step`."""
        self.check_contexts(batch)
        return mean_plan(batch, {"kind": "tvd"}, self.aggregation, temperature=self.temperature)


@register(
    "distillm",
    kind="distillation",
    system="DistiLLM",
    label="exact (released code)",
    source="arXiv 2402.03898 Eqs. 3-5; github.com/jongwooko/distillm (losses.py, finetune.py)",
    summary="skew KL: compares with a mixture that contains a little of the compared distribution",
    differs="alpha is 0.1 as in the released code. form='reverse' (default) is the type 'srkl' of its OPT and "
    "OpenLLaMA scripts, form='forward' the 'sfkl' of its GPT-2 script. The code's skewed forward KL leaves out the "
    "teacher's entropy: the same gradient, another value. kd_ratio, a weight against the cross-entropy of the data, "
    "is 1 in the scripts; for less, add that loss yourself.",
)
@dataclass(frozen=True, kw_only=True)
class DistiLLM(Distillation):
    """loss = mean over tokens of a skew KL between the student p and the teacher q.

        form "reverse":  KL(p || alpha p + (1 - alpha) q)
        form "forward":  KL(q || alpha q + (1 - alpha) p)

    The divergence is at most -log(alpha), and its gradient is bounded, unlike the gradient of a KL.
    `make("distillm_schedule", ...)` chooses the responses of each step.

    Args:
        form: "reverse" or "forward".
        alpha: weight in the mixture of the distribution whose average is taken, in (0, 1).
        temperature: divides the logits of both models, > 0.
        aggregation: "token_mean", as in the released code, or "seq_mean_token_mean".

    Inputs: the responses of the step.
    State: none.
    Source: the released code, exact.
    """

    form: str = "reverse"
    alpha: float = 0.1
    temperature: float = 1.0
    aggregation: str = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self._op, "form", self.form, ("reverse", "forward"))
        check_number(self._op, "alpha", self.alpha, 0.0, 1.0, open_low=True, open_high=True)
        self.check_temperature(self.temperature)
        self.check_aggregation(self.aggregation)

    def objective(self, batch: DistillationBatch) -> DistillationPlan:
        """Return the plan of a batch, for `distill_step`."""
        self.check_contexts(batch)
        divergence = {"kind": f"skew_{self.form}", "alpha": self.alpha}
        return mean_plan(batch, divergence, self.aggregation, temperature=self.temperature)


@register(
    "distillm_schedule",
    kind="distillation",
    system="DistiLLM",
    label="exact (released code)",
    source="github.com/jongwooko/distillm (finetune.py)",
    summary="adaptive share of the student's own responses, reused from a replay buffer",
    required=("total_steps",),
    differs="The draws are seeded by the step. As in the code, the validation loss to beat changes only if the share "
    "rises. The buffer itself is the caller's.",
)
@dataclass(frozen=True, kw_only=True)
class AdaptiveSchedule(Stateful):
    """Which responses a step trains on. u is uniform in [0, 1), phi the threshold:

        u < phi f(step / total_steps)                         sample from the student, and store the responses
        u < phi, and fewer than `capacity` responses stored   the same
        u < phi otherwise                                     take responses from the buffer
        otherwise                                             take responses of the data set

    f(x) is 1 - x for replay "decreasing", x for "increasing", 1/2 for "constant". After every validation whose loss is
    at least the loss to beat + loss_eps, phi rises by threshold_step, up to 1, and this loss is the next one to beat.

    Args:
        total_steps: number of optimizer steps of the run.
        replay: "decreasing", "constant" or "increasing".
        threshold: phi at the start, in [0, 1].
        threshold_step: increase of phi.
        loss_eps: margin by which the validation loss must have risen, >= 0.
        capacity: number of responses that the buffer holds.
        seed: seed of the draws.

    State: phi, and the validation loss to beat (None before the first `update`).
    Source: the released code, exact.
    """

    total_steps: int = 0
    replay: str = "decreasing"
    threshold: float = 0.0
    threshold_step: float = 0.1
    loss_eps: float = 0.1
    capacity: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self._op, "total_steps", self.total_steps, 1)
        check_choice(self._op, "replay", self.replay, ("decreasing", "constant", "increasing"))
        check_number(self._op, "threshold", self.threshold, 0.0, 1.0)
        check_number(self._op, "threshold_step", self.threshold_step, 0.0, 1.0)
        check_number(self._op, "loss_eps", self.loss_eps, 0.0)
        check_integer(self._op, "capacity", self.capacity, 1)
        check_integer(self._op, "seed", self.seed, 0)

    def initial_state(self) -> State:
        return {"threshold": self.threshold, "to_beat": None}

    def source(self, state: State, step: int, stored: int) -> str:
        """Return whose responses to train on in a step: "student", "buffer" or "data".

        Args:
            state: the state of the schedule.
            step: optimizer step, in [0, total_steps].
            stored: number of responses in the buffer.
        """
        if not 0 <= step <= self.total_steps:
            raise refuse(self._op, "step", f"in [0, {self.total_steps}]", step, "Count optimizer steps.")
        progress = step / self.total_steps
        fresh = {"decreasing": 1.0 - progress, "increasing": progress, "constant": 0.5}[self.replay]
        drawn, phi = draws(self.seed, step).random(), state["threshold"]
        if drawn < phi * fresh or (drawn < phi and stored < self.capacity):
            return "student"
        return "buffer" if drawn < phi else "data"

    def update(self, state: State, validation_loss: float) -> State:
        """Return the state after a validation. Call it once before the first step, too."""
        loss = check_number(self._op, "validation_loss", validation_loss, float("-inf"))
        if state["to_beat"] is None:
            return {**state, "to_beat": loss}
        if loss < state["to_beat"] + self.loss_eps:
            return state
        return {"threshold": min(state["threshold"] + self.threshold_step, 1.0), "to_beat": loss}
