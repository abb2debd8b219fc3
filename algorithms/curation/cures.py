"""CurES: chooses prompts and their number of rollouts by how large their gradients still are.

    method = tokfuse.algorithms.make("cures", prompts=5000, tau=0.1)
    prompts, state = method.sample(state, 128)               # by exp(sqrt(p (1 - p)) / tau)
    sigma = rollout_sigma(sketches, correct, place, 128)     # from a few rollouts of each prompt
    quota = method.quota(sigma, 1024)                        # sums to 1024 exactly
    state = method.observe(state, prompts[place], correct)   # every training rollout counts

`place` is the index in `prompts` of each rollout's prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful, draws
from tokfuse.runtime.core.checks import (
    BOOL,
    FLOATS,
    INTS,
    Rows,
    check_choice,
    check_dtype,
    check_integer,
    check_number,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.reference.segments import segment_sum

CODE_TEMPERATURE = 100.0  # the released sampler divides by 100 (accepted + 1)


def largest_remainder(share: torch.Tensor, total: int) -> torch.Tensor:
    """Return integers in proportion to `share` that add up to `total` exactly.

    Each row gets the floor of total * share / sum. The rows with the largest remainders get one more; of equal
    remainders the first rows win. If all shares are 0, they count as equal.

    Args:
        share: (rows,), float, finite and >= 0.
        total: an integer >= 0, and 0 if there are no rows.

    Returns:
        (rows,) int64, with |count - total * share / sum| < 1 in every row.

    Raises:
        ValueError: a negative or non-finite share, a negative total, or a total > 0 without rows.
        TypeError: a total that is not an integer.
    """
    op = "largest_remainder"
    check_vector(op, "share", share)
    check_values(op, "share", share, 0.0, always=True)
    if check_integer(op, "total", total, 0) > 0 and share.shape[0] == 0:
        raise refuse(op, "total", "0 without rows", total, "Pass the share of at least one row.")
    if share.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=share.device)
    x = share.double()
    x = x if bool((x > 0).any()) else torch.ones_like(x)
    # Divide by the largest first, so that the sum of huge shares stays finite.
    exact = x / x.max()
    exact = exact * (total / exact.sum())
    count = exact.floor().long()
    missing = total - int(count.sum())
    order = (exact - count).sort(descending=True, stable=True).indices
    count[order[:missing]] += 1
    return count


def gradient_sigma(
    p: torch.Tensor, square_right: torch.Tensor, square_wrong: torch.Tensor, apart: torch.Tensor
) -> torch.Tensor:
    """Return the standard deviation of the policy gradient of one rollout, sqrt(Tr Var((r - p) grad log pi)).

    sigma^2 = p (1-p)^2 E||g+||^2 + p^2 (1-p) E||g-||^2 - p^2 (1-p)^2 ||E g+ - E g-||^2, where g+ and g- are the
    gradients of log pi of correct and wrong rollouts.

    Args:
        p: (prompts,), success rate in [0, 1].
        square_right: (prompts,), >= 0, E||g+||^2. 0 without correct rollouts.
        square_wrong: (prompts,), >= 0, E||g-||^2. 0 without wrong rollouts.
        apart: (prompts,), >= 0, ||E g+ - E g-||^2, or its substitute from norms, see `rollout_sigma`.

    Returns:
        (prompts,) float64, >= 0. It is 0 at p = 0 and p = 1.

    Source: CurES (arXiv 2510.01037) and its released code. Exact.
    """
    op = "gradient_sigma"
    rows = Rows(check_vector(op, "p", p).shape[0], "p", p.device)
    check_values(op, "p", p, 0.0, 1.0, always=True)
    for name, value in (("square_right", square_right), ("square_wrong", square_wrong), ("apart", apart)):
        check_vector(op, name, value, rows)
        check_values(op, name, value, 0.0, always=True)
    p = p.double()
    q = 1 - p
    spread = q * square_right.double() + p * square_wrong.double() - p * q * apart.double()
    return (p * q * spread).clamp_min(0.0).sqrt()


@register(
    "cures_sigma",
    kind="selection",
    system="CurES",
    label="exact (paper, released code)",
    source="arXiv 2510.01037; github.com/ZexuSun/CurES",
    summary="deviation of a prompt's policy gradient, from its rollouts' gradients or their norms",
    differs=(
        "Gradients are by-products of the kernels, not gradients of the embeddings. Norms alone give "
        "the form of the released code, which overestimates."
    ),
)
def rollout_sigma(
    gradient: torch.Tensor,
    correct: torch.Tensor,
    prompt_ids: torch.Tensor,
    num_prompts: int,
    p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `gradient_sigma` of every prompt, from its rollouts' gradients or from their norms. Exact.

    The norm of a sequence is the norm of its summed gradient (for example, of its sketch). Norms of tokens do not add
    up to it. The authors use gradients of the input embeddings, with one backward per rollout.

    Args:
        gradient: (rollouts, ...), finite, a feature of grad log pi of each rollout, e.g. the sketches of
            `policy_step(influence=...)` with advantage 1. This uses ||E g+ - E g-||^2 as in the paper. Or
            (rollouts,), norms: this uses (mean ||g+|| - mean ||g-||)^2 as in the released code, which is smaller,
            so sigma is larger.
        correct: (rollouts,), bool.
        prompt_ids: (rollouts,), int, in [0, num_prompts).
        num_prompts: number of prompts, >= 0.
        p: (num_prompts,), success rates in [0, 1]. None: the share of correct rollouts of each prompt, as in the
            released code: a prompt whose rollouts are all correct or all wrong has sigma 0. `CurES.success`, the mean
            of the posterior, would give it a positive one.

    Returns:
        (num_prompts,) float64. A prompt without rollouts has sigma 0. If all its rollouts are correct, or all are
        wrong, the other side counts as 0 (our choice: the paper's expectation is undefined there).

    Raises:
        ValueError: wrong shapes or dtypes, an id or a rate out of range, a gradient that is not finite.
    """
    op = "rollout_sigma"
    check_integer(op, "num_prompts", num_prompts, 0)
    check_dtype(op, "gradient", gradient, FLOATS)
    rows = Rows(gradient.shape[0], "gradient", gradient.device)
    check_vector(op, "correct", correct, rows, BOOL)
    check_vector(op, "prompt_ids", prompt_ids, rows, INTS)
    if p is not None:
        check_vector(op, "p", p, Rows(num_prompts, "num_prompts", gradient.device))
    check_values(op, "gradient", gradient, always=True)
    check_values(op, "prompt_ids", prompt_ids, 0, num_prompts, open_high=True, always=True)
    x = gradient.detach().double().flatten(1) if gradient.dim() > 1 else gradient.double()[:, None]
    square: list[torch.Tensor] = []
    mean: list[torch.Tensor] = []
    for side in (correct, ~correct):
        count = segment_sum(side.double(), prompt_ids, num_prompts).clamp_min(1.0)
        kept = torch.where(side[:, None], x, 0.0)
        square.append(segment_sum(kept.square().sum(1), prompt_ids, num_prompts) / count)
        total = x.new_zeros(num_prompts, x.shape[1]).index_add_(0, prompt_ids.long(), kept)
        mean.append(total / count[:, None])
    if p is None:
        trials = segment_sum(torch.ones_like(correct, dtype=torch.float64), prompt_ids, num_prompts)
        p = segment_sum(correct.double(), prompt_ids, num_prompts) / trials.clamp_min(1.0)
    apart = (mean[0] - mean[1]).square().sum(1)
    return gradient_sigma(p, square[0], square[1], apart)


@register(
    "cures",
    kind="selection",
    system="CurES",
    label="recon",
    source="arXiv 2510.01037; github.com/ZexuSun/CurES (quota, posterior); sampler from a note",
    summary="prompts drawn by exp(sqrt(p (1 - p)) / tau), rollouts in proportion to the gradients' deviation",
    required=("prompts", "tau"),
    differs=(
        "sampler='paper' (default) is reconstructed; quota and posterior are exact. sampler='code' is the "
        "released one: its temperature 100 (accepted + 1) makes it uniform to within 0.3%. "
        "rounding='exact' (default) adds up to the budget; 'code' rounds, then fills to a multiple. "
        "Gradient norms come from the kernels, not from the embeddings."
    ),
)
@dataclass(frozen=True, kw_only=True)
class CurES(Stateful):
    """w_i = exp(sqrt(p_i (1 - p_i)) / tau), rho = w / sum w; n_i = N sigma_i / sum sigma.

    p_i = (prior[0] + successes) / (prior[0] + prior[1] + trials), the mean of a Beta posterior. rho are the
    probabilities of the prompts, n_i their numbers of rollouts.

    Args:
        prompts: number of prompts of the subset, >= 1.
        tau: temperature, > 0; useful between 0.05 and 0.2. The paper's value was not found.
        prior: (a, b) of the Beta prior, both > 0.
        sampler: "paper", or "code" (temperature 100 (accepted + 1), which ignores tau).
        rounding: "exact" (largest remainders), or "code": round, then add one to the largest until the total is
            divisible by `multiple`.
        multiple: number of GPUs, >= 1, for rounding="code".
        minimum: number of rollouts that every prompt gets, >= 0. With the paper's 0, a prompt with a small sigma
            gets none and is not seen again in the subset.
        seed: seed of the draws, >= 0.

    State: successes and trials of each prompt, and the number of draws. The paper resets them for every subset, as
    `initial_state` does.
    Source: quota and posterior exact, sampler reconstructed.
    """

    prompts: int = 0
    tau: float = 0.0
    prior: tuple[float, float] = (1.0, 1.0)
    sampler: str = "paper"
    rounding: str = "exact"
    multiple: int = 1
    minimum: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self._op, "prompts", self.prompts, 1)
        check_number(self._op, "tau", self.tau, 0.0, open_low=True)
        if len(self.prior) != 2:
            raise refuse(self._op, "prior", "two numbers > 0", self.prior, "Pass (a, b) of the Beta distribution.")
        for i, value in enumerate(self.prior):
            check_number(self._op, f"prior[{i}]", value, 0.0, open_low=True)
        check_choice(self._op, "sampler", self.sampler, ("paper", "code"))
        check_choice(self._op, "rounding", self.rounding, ("exact", "code"))
        check_integer(self._op, "multiple", self.multiple, 1)
        check_integer(self._op, "minimum", self.minimum, 0)
        check_integer(self._op, "seed", self.seed, 0)
        if self.rounding == "exact" and self.multiple != 1:
            raise refuse(
                self._op, "multiple", "left out with rounding 'exact'", self.multiple, "Choose a divisible total."
            )

    def initial_state(self) -> State:
        """Return the state before the first rollout."""
        return {"successes": [0] * self.prompts, "trials": [0] * self.prompts, "draws": 0}

    def observe(self, state: State, prompt_ids: Sequence[int] | torch.Tensor, correct: torch.Tensor) -> State:
        """Return the state with these rollouts counted.

        Args:
            state: the state before.
            prompt_ids: (rollouts,), int, in [0, prompts).
            correct: (rollouts,), bool.
        """
        if not isinstance(prompt_ids, torch.Tensor):
            prompt_ids = torch.tensor(
                [check_integer(self._op, "prompt_ids", i, 0, self.prompts - 1) for i in prompt_ids],
                dtype=torch.int64,
                device="cpu",
            )
        ids = check_vector(self._op, "prompt_ids", prompt_ids, dtypes=INTS).long().cpu()
        right = (
            check_vector(self._op, "correct", correct, Rows(ids.shape[0], "prompt_ids", correct.device), BOOL)
            .long()
            .cpu()
        )
        check_values(self._op, "prompt_ids", ids, 0, self.prompts - 1)
        wins = torch.bincount(ids, right.double(), minlength=self.prompts).long()
        tries = torch.bincount(ids, minlength=self.prompts)
        return state | {
            "successes": [a + b for a, b in zip(state["successes"], wins.tolist(), strict=True)],
            "trials": [a + b for a, b in zip(state["trials"], tries.tolist(), strict=True)],
        }

    def success(self, state: State) -> torch.Tensor:
        """Return the posterior mean of each prompt's success rate, (prompts,) float64."""
        wins, tries = (torch.tensor(state[k], dtype=torch.float64, device="cpu") for k in ("successes", "trials"))
        a, b = self.prior
        return (wins + a) / (tries + a + b)

    def probabilities(self, state: State) -> torch.Tensor:
        """Return the probability of each prompt in a draw of one, (prompts,) float64, sum 1."""
        return torch.softmax(self._scores(state), 0)

    def _scores(self, state: State) -> torch.Tensor:
        p = self.success(state)
        temperature = torch.full_like(p, self.tau)
        if self.sampler == "code":
            wins = torch.tensor(state["successes"], dtype=torch.float64, device="cpu")
            temperature = CODE_TEMPERATURE * (wins + 1)
        return (p * (1 - p)).sqrt() / temperature

    def sample(self, state: State, count: int) -> tuple[torch.Tensor, State]:
        """Return ((count,) int64 different prompts, sorted; the state after the draw). `count` is in [0, prompts]."""
        check_integer(self._op, "count", count, 0, self.prompts)
        # Exponential races: the first `count` arrivals are a draw without replacement. Logarithms, because with a
        # small tau the probabilities underflow.
        race = np.log(draws(self.seed, state["draws"]).exponential(size=self.prompts))
        arrival = race - self._scores(state).numpy()
        chosen = np.sort(np.argsort(arrival, kind="stable")[:count])
        return torch.from_numpy(chosen), state | {"draws": state["draws"] + 1}

    def quota(self, sigma: torch.Tensor, total: int) -> torch.Tensor:
        """Return the number of rollouts of each drawn prompt in proportion to sigma, (prompts drawn,) int64.

        With rounding "exact" they add up to `total`. A prompt with 0 rollouts is left out of the step.

        Args:
            sigma: (prompts drawn,), float, finite and >= 0.
            total: number of rollouts, an integer >= minimum * prompts drawn.
        """
        drawn = check_vector(self._op, "sigma", sigma).shape[0]
        check_values(self._op, "sigma", sigma, 0.0, always=True)
        rest = check_integer(self._op, "total", total, 0) - self.minimum * drawn
        if rest < 0:
            raise refuse(self._op, "total", f">= minimum * prompts = {total - rest}", total, "Raise total.")
        if self.rounding == "exact":
            return largest_remainder(sigma, rest) + self.minimum
        x = sigma.double()
        share = x / x.sum() if float(x.sum()) > 0 else torch.full_like(x, 1 / max(1, x.shape[0]))
        count = (rest * share).round().long() + self.minimum
        missing = -int(count.sum()) % self.multiple
        largest = count.sort(descending=True, stable=True).indices
        for i in range(missing):
            count[largest[i % count.shape[0]]] += 1
        return count
