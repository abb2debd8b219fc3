"""CurES: which prompts to draw, and how many rollouts each gets, by what gradients still move.

    method = tokfuse.algorithms.make("cures", prompts=5000, tau=0.1)
    prompts, state = method.sample(state, 128)               # by exp(sqrt(p (1 - p)) / tau)
    p = method.success(state)[prompts]
    sigma = rollout_sigma(sketches, correct, place, 128, p)  # from a few rollouts of each
    quota = method.quota(sigma, 1024)                        # sums to 1024 exactly
    state = method.observe(state, prompts[place], correct)   # every training rollout counts

`place` is the place in `prompts` of each rollout's prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful, draws
from tokfuse.runtime.core.checks import BOOL, INTS, Rows, check_choice, check_number, check_vector
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.reference.segments import segment_sum

CODE_TEMPERATURE = 100.0  # the released sampler divides by 100 (accepted + 1)


def largest_remainder(share: torch.Tensor, total: int) -> torch.Tensor:
    """Whole numbers in proportion to `share` that add up to `total` exactly.

    The floors of total * share / sum first, then one more to the largest remainders; of equal
    remainders the first rows win. Shares that are all 0 count as equal.

    Args:
        share: (rows,), float >= 0.
        total: >= 0; 0 where there are no rows.

    Returns:
        (rows,) int64; |count - total * share / sum| < 1 in every row.

    Raises:
        ValueError: a negative or non-finite share, a total that nobody can take.
    """
    op = "largest_remainder"
    check_vector(op, "share", share)
    if not bool((share >= 0).all() and share.isfinite().all()):
        raise refuse(op, "share", "finite numbers >= 0", "others", "Check the statistics.")
    if total < 0 or (total > 0 and share.shape[0] == 0):
        raise refuse(
            op, "total", f">= 0 for {share.shape[0]} rows, and 0 without rows", total, "Pass what is to be shared out."
        )
    if share.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=share.device)
    x = share.double()
    x = x if bool((x > 0).any()) else torch.ones_like(x)
    # Scaled by the largest first, so that the sum of huge shares stays finite.
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
    """Standard deviation of the policy gradient of one rollout, sqrt(Tr Var((r - p) grad log pi)).

    sigma^2 = p (1-p)^2 E||g+||^2 + p^2 (1-p) E||g-||^2 - p^2 (1-p)^2 ||E g+ - E g-||^2, g+ and g-
    the gradients of log pi of right and wrong rollouts.

    Args:
        p: (prompts,), success rate in [0, 1].
        square_right, square_wrong: (prompts,), E||g+||^2 and E||g-||^2; 0 for an unseen side.
        apart: (prompts,), ||E g+ - E g-||^2, or its stand-in by norms, see `rollout_sigma`.

    Returns:
        (prompts,) float64, >= 0; 0 at p = 0 and p = 1.

    Source: CurES (arXiv 2510.01037) and its released code. Exact.
    """
    p = p.double()
    q = 1 - p
    spread = q * square_right.double() + p * square_wrong.double() - p * q * apart.double()
    return (p * q * spread).clamp_min(0.0).sqrt()


@register(
    "cures_sigma",
    kind="selection",
    system="CurES",
    label="exact",
    source="arXiv 2510.01037; github.com/ZexuSun/CurES",
    summary="deviation of a prompt's policy gradient, from its rollouts' gradients or their norms",
    differs=(
        "Gradients come from the kernels' by-products, not from the embeddings. Norms alone give "
        "the released code's form, which overestimates."
    ),
)
def rollout_sigma(
    gradient: torch.Tensor, correct: torch.Tensor, prompt_ids: torch.Tensor, num_prompts: int, p: torch.Tensor
) -> torch.Tensor:
    """`gradient_sigma` of every prompt from its rollouts' gradients, or from their norms. Exact.

    Args:
        gradient: (rollouts, ...), a feature of grad log pi of each rollout, e.g. the sketches of
            `policy_step(influence=...)` with advantage 1: ||E g+ - E g-||^2 as in the paper. Or
            (rollouts,), norms: (mean ||g+|| - mean ||g-||)^2 instead, as in the released code; that
            is smaller, so sigma comes out larger.
        correct: (rollouts,), bool.
        prompt_ids: (rollouts,), int, in [0, num_prompts).
        p: (num_prompts,), success rates, e.g. `CurES.success`.

    Returns:
        (num_prompts,) float64. A prompt without rollouts has sigma 0. A side that was not seen
        enters as 0 (our choice: the paper's expectation is undefined there).

    A sequence's norm is that of its summed gradient (of its sketch, say): norms of tokens do not
    add up to it. The authors take gradients of the input embeddings, one backward per rollout.

    Raises:
        ValueError: shapes and dtypes.
    """
    op = "rollout_sigma"
    rows = Rows(gradient.shape[0], "gradient", gradient.device)
    check_vector(op, "correct", correct, rows, BOOL)
    check_vector(op, "prompt_ids", prompt_ids, rows, INTS)
    check_vector(op, "p", p, Rows(num_prompts, "num_prompts", gradient.device))
    x = gradient.detach().double().flatten(1) if gradient.dim() > 1 else gradient.double()[:, None]
    square: list[torch.Tensor] = []
    mean: list[torch.Tensor] = []
    for side in (correct, ~correct):
        count = segment_sum(side.double(), prompt_ids, num_prompts).clamp_min(1.0)
        kept = torch.where(side[:, None], x, 0.0)
        square.append(segment_sum(kept.square().sum(1), prompt_ids, num_prompts) / count)
        total = x.new_zeros(num_prompts, x.shape[1]).index_add_(0, prompt_ids.long(), kept)
        mean.append(total / count[:, None])
    apart = (mean[0] - mean[1]).square().sum(1)
    return gradient_sigma(p, square[0], square[1], apart)


@register(
    "cures",
    kind="selection",
    system="CurES",
    label="recon",
    source="arXiv 2510.01037; github.com/ZexuSun/CurES (quota, posterior); sampler from a note",
    summary="prompts drawn by exp(sqrt(p (1 - p)) / tau), rollouts by the gradients' deviation",
    required=("prompts", "tau"),
    differs=(
        "sampler='paper' (default) is reconstructed; quota and posterior are exact. sampler='code' "
        "is the released one: its temperature 100 (accepted + 1) makes it uniform to 0.3%. "
        "rounding='exact' (default) sums to the budget; 'code' rounds, then fills to a multiple. "
        "Gradient norms come from the kernels, not from the embeddings."
    ),
)
@dataclass(frozen=True, kw_only=True)
class CurES(Stateful):
    """w_i = exp(sqrt(p_i (1 - p_i)) / tau), rho = w / sum w; n_i = N sigma_i / sum sigma.

    p_i = (prior[0] + successes) / (prior[0] + prior[1] + trials), the mean of a Beta posterior.

    Args:
        prompts: number of prompts of the subset.
        tau: temperature, > 0; useful between 0.05 and 0.2. The paper's value was not found.
        prior: (a, b) of the Beta prior.
        sampler: "paper", or "code" (temperature 100 (accepted + 1), which ignores tau).
        rounding: "exact" (largest remainders) or "code": rounded, then one more to the largest
            until the total divides by `multiple`.
        multiple: of rounding="code", the number of GPUs.
        minimum: rollouts that every prompt keeps. The paper's 0 starves a prompt whose sigma is
            small: it is not seen again in the subset.
        seed: of the draws.

    State: successes and trials of each prompt (`initial_state` resets them, as the paper does for
    every subset), and the number of draws. Quota and posterior exact, sampler reconstructed.
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
        check_number(self._op, "prompts", self.prompts, 1)
        check_number(self._op, "tau", self.tau, 0.0, open_low=True)
        for i, value in enumerate(self.prior):
            check_number(self._op, f"prior[{i}]", value, 0.0, open_low=True)
        check_choice(self._op, "sampler", self.sampler, ("paper", "code"))
        check_choice(self._op, "rounding", self.rounding, ("exact", "code"))
        check_number(self._op, "multiple", self.multiple, 1)
        check_number(self._op, "minimum", self.minimum, 0)
        if self.rounding == "exact" and self.multiple != 1:
            raise refuse(
                self._op, "multiple", "left out with rounding 'exact'", self.multiple, "Pass a total that divides."
            )

    def initial_state(self) -> State:
        """Nothing tried."""
        return {"successes": [0] * self.prompts, "trials": [0] * self.prompts, "draws": 0}

    def observe(self, state: State, prompt_ids: Sequence[int] | torch.Tensor, correct: torch.Tensor) -> State:
        """The state with these rollouts counted; (rollouts,) ids and bool."""
        ids = torch.as_tensor(prompt_ids).long().cpu()
        right = (
            check_vector(self._op, "correct", correct, Rows(ids.shape[0], "prompt_ids", correct.device), BOOL)
            .long()
            .cpu()
        )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.prompts:
            raise refuse(
                self._op,
                "prompt_ids",
                f"in [0, {self.prompts})",
                f"{int(ids.min())} to {int(ids.max())}",
                "Raise prompts.",
            )
        wins = torch.bincount(ids, right.double(), minlength=self.prompts).long()
        tries = torch.bincount(ids, minlength=self.prompts)
        return state | {
            "successes": [a + b for a, b in zip(state["successes"], wins.tolist(), strict=True)],
            "trials": [a + b for a, b in zip(state["trials"], tries.tolist(), strict=True)],
        }

    def success(self, state: State) -> torch.Tensor:
        """(prompts,) float64: the posterior means."""
        wins, tries = (torch.tensor(state[k], dtype=torch.float64) for k in ("successes", "trials"))
        a, b = self.prior
        return (wins + a) / (tries + a + b)

    def probabilities(self, state: State) -> torch.Tensor:
        """(prompts,) float64, sum 1: the chance of each prompt in a draw of one."""
        return torch.softmax(self._scores(state), 0)

    def _scores(self, state: State) -> torch.Tensor:
        p = self.success(state)
        temperature = torch.full_like(p, self.tau)
        if self.sampler == "code":
            wins = torch.tensor(state["successes"], dtype=torch.float64)
            temperature = CODE_TEMPERATURE * (wins + 1)
        return (p * (1 - p)).sqrt() / temperature

    def sample(self, state: State, count: int) -> tuple[torch.Tensor, State]:
        """((count,) int64 different prompts, sorted, and the state after the draw)."""
        check_number(self._op, "count", count, 0, self.prompts)
        # Exponential races: the `count` first arrivals are a draw without replacement. Logarithms,
        # because a small tau lets chances underflow.
        race = np.log(draws(self.seed, state["draws"]).exponential(size=self.prompts))
        arrival = race - self._scores(state).numpy()
        chosen = np.sort(np.argsort(arrival, kind="stable")[:count])
        return torch.from_numpy(chosen), state | {"draws": state["draws"] + 1}

    def quota(self, sigma: torch.Tensor, total: int) -> torch.Tensor:
        """(prompts drawn,) int64: rollouts of each, in proportion to sigma.

        They add up to `total` with rounding "exact". A prompt with 0 is left out of the step.
        """
        rest = total - self.minimum * sigma.shape[0]
        if rest < 0:
            raise refuse(self._op, "total", f">= minimum * prompts = {total - rest}", total, "Raise it.")
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
