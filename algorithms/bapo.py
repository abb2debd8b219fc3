"""BAPO: searches clip bounds such that positive tokens supply a target share of the loss."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch, World
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import plan_mask, token_advantage
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.shapes import PPOClip


class Search(NamedTuple):
    """The options of BAPO's search."""

    target: float
    low: tuple[float, float]
    high: tuple[float, float]
    step_low: float
    step_high: float


DEFAULTS = {
    "paper": Search(0.4, (0.6, 0.9), (1.2, 3.0), 0.02, 0.05),
    "code": Search(1.0, (0.6, 0.8), (1.2, 2.0), 0.05, 0.05),
}


@register(
    "bapo",
    system="BAPO",
    label="exact (paper, released code)",
    source="arXiv 2510.18927 Eq. 8, Alg. 1; github.com/WooooDyy/BAPO",
    summary="PPO clip; one histogram pass finds the bounds that give a target share of positive loss",
    differs=(
        "form='paper' (default): share P / (P + N) >= 0.4, upper bound first. form='code': P / N >= 1, lower bound "
        "first, dual clip 3, the bounds and steps of the release's bapo_trainer.yaml, and a last step that ends at "
        "the last value; Alg. 1 takes no step past it. The release searches for every micro-batch; here one search "
        "serves the whole optimizer step. Eq. 8's factor pi_rollout is an expectation over tokens; sampled "
        "tokens already have it, so it is not applied again. A larger lower bound never raises the share, so the "
        "loop has only three outcomes, and one pass finds the same one."
    ),
)
@dataclass(frozen=True, kw_only=True)
class BAPO(Standard):
    """PPO whose ratio bounds [c_low, c_high] are chosen for each batch, for any estimator of `Standard`.

    e_t = min(r, c_high) A for A > 0, and max(r, c_low) A for A < 0. P is the sum of positive e, N the sum of
    negative |e|. The search starts at (low[0], high[0]) and raises the bounds in steps while the statistic is below
    `target`. It starts again for every loss.

    Args:
        target: bound on P / (P + N) with form "paper", on P / N with form "code". None: 0.4 (paper), 1 (code).
        low: (first, last) value of c_low. None: (0.6, 0.9) (paper), (0.6, 0.8) (code).
        high: (first, last) value of c_high. None: (1.2, 3.0) (paper), (1.2, 2.0) (code).
        step_low: step of c_low. None: 0.02 (paper), 0.05 (code).
        step_high: step of c_high. None: 0.05.
        form: "paper" or "code". With "paper", a step past the last value is not taken. With "code", the last step is
            shortened to end at it.

    Inputs: logp of the current policy.
    State: none.
    Cost: one gather of 2 (grid + 2) numbers, and one synchronisation with the device, because the bounds are numbers
    in the objective.
    Source: paper and released code, each exact in its form.
    """

    target: float | None = None
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    step_low: float | None = None
    step_high: float | None = None
    form: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self._op, "form", self.form, ("paper", "code"))
        used = self.settings
        check_number(self._op, "target", used.target, 0.0)
        for name, step in (("low", used.step_low), ("high", used.step_high)):
            first, last = getattr(used, name)
            check_number(self._op, f"{name}[0]", first, 0.0)
            check_number(self._op, f"{name}[1]", last, first)
            check_number(self._op, f"step_{name}", step, 0.0, open_low=True)
        if self.shape != PPOClip():
            raise refuse(self._op, "shape", "left out (its bounds are searched)", self.shape, "Set low and high.")

    @property
    def settings(self) -> "Search":
        """The options of the search, with the defaults of the form."""
        base = DEFAULTS[self.form]
        given = {name: value for name in base._fields if (value := getattr(self, name)) is not None}
        return base._replace(**given)

    @property
    def needs_policy(self) -> bool:
        """Always True: the search reads the current ratios."""
        return True

    def objective(self, batch: Batch, state: State) -> Plan:
        """Return the plan with the bounds of this batch."""
        batch.require(self._op, "logp")
        plan = super().objective(batch, state)
        assert plan.batch.logp is not None
        ratio = (plan.batch.logp.double() - plan.batch.old_logp.double()).clamp(-20, 20).exp()
        c_low, c_high = self.search(ratio, token_advantage(plan), plan_mask(plan), batch.world)
        shape = PPOClip(
            low=None, high=None, ratio_min=c_low, ratio_max=c_high, dual=3.0 if self.form == "code" else None
        )
        return replace(plan, objective=replace(plan.objective, shape=shape))

    def search(
        self, ratio: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor, world: World | None = None
    ) -> tuple[float, float]:
        """Return (c_low, c_high).

        Args:
            ratio: (tokens,).
            advantage: (tokens,).
            mask: (tokens,), bool.
            world: the ranks. None: this process alone.
        """
        used = self.settings
        first_low, last_low = used.low[0], self._grid(used.low, used.step_low)[-1]
        grid = self._grid(used.high, used.step_high)
        r, a = ratio.double(), torch.where(mask, advantage.double(), 0.0)
        r = torch.where(mask, r, 1.0)
        # Bin of a positive token: the first candidate bound that is at least its ratio.
        edges = torch.tensor(grid, dtype=torch.float64, device=r.device)
        place = torch.searchsorted(edges, r)
        up = a.clamp(min=0)
        zero = r.new_zeros(len(grid) + 1)
        inside, size = (zero.index_add(0, place, x) for x in (up * r, up))
        down = (-a).clamp(min=0)
        lows = torch.stack([(down * r.clamp(min=c)).sum() for c in (first_low, last_low)])
        sums = (world or World()).sum(torch.cat([inside, size, lows]))
        inside, size, lows = sums.split([len(grid) + 1, len(grid) + 1, 2])
        positive = inside.cumsum(0)[:-1] + edges * (size.sum() - size.cumsum(0)[:-1])
        return self._choose(positive.tolist(), lows.tolist(), grid, (first_low, last_low))

    def _grid(self, ends: tuple[float, float], step: float) -> list[float]:
        """Return the values that a bound takes. Steps are integers, because adding up 0.02 drifts past the last one."""
        first, last = ends
        steps = int((last - first) / step + 1e-9)
        grid = [min(first + k * step, last) for k in range(steps + 1)]
        return [*grid, last] if self.form == "code" and last - grid[-1] > 1e-9 * step else grid

    def _choose(
        self, positive: list[float], negative: list[float], grid: list[float], low: tuple[float, float]
    ) -> tuple[float, float]:
        """Return the bounds, from P at every candidate c_high (`positive`) and N at both c_low (`negative`)."""
        target, (first_low, last_low) = self.settings.target, low

        def reached(p: float, n: float) -> bool:
            if self.form == "paper":
                return p + n == 0.0 or p / (p + n) >= target
            return n <= 0.0 or p / (n + 1e-8) >= target

        if reached(positive[0], negative[0]):
            return first_low, grid[0]
        paper = self.form == "paper"
        for p, bound in zip(positive[paper:], grid[paper:], strict=True):
            if reached(p, negative[0 if paper else 1]):
                return (first_low if paper else last_low), bound
        return last_low, grid[-1]
