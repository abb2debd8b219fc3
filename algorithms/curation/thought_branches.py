"""Thought Branches: how much one sentence of a chain of thought matters, by resampling from it.

"Importance" is a change of the outcome's distribution and "resilience" the number of times that a
content must be removed until it stays away. Neither is a gradient influence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import BOOL, Rows, check_number, check_vector
from tokfuse.runtime.core.errors import refuse


def kl_binary(successes_p: float, trials_p: int, successes_q: float, trials_q: int, *, alpha: float = 1e-9) -> float:
    """KL(Bernoulli p || Bernoulli q) in nats from counts, each smoothed by alpha; at least 0.

    p = (successes + alpha) / (trials + 2 alpha); p ln(p / q) + (1 - p) ln((1 - p) / (1 - q)).

    Args:
        successes_p, trials_p, successes_q, trials_q: counts, trials >= 1.
        alpha: > 0; 1e-9 as released, 1 for Laplace. The small one makes an event that q never saw
            cost about ln(1 / alpha).

    Source: released analyze_rollouts.py. Exact.
    """
    for name, wins, trials in (("p", successes_p, trials_p), ("q", successes_q, trials_q)):
        check_number("kl_binary", f"trials_{name}", trials, 1)
        check_number("kl_binary", f"successes_{name}", wins, 0, trials)
    check_number("kl_binary", "alpha", alpha, 0.0, open_low=True)
    p = (successes_p + alpha) / (trials_p + 2 * alpha)
    q = (successes_q + alpha) / (trials_q + 2 * alpha)
    # log(1 - p) from the failures, since 1 - p cancels for small alpha.
    fail_p = (trials_p - successes_p + alpha) / (trials_p + 2 * alpha)
    fail_q = (trials_q - successes_q + alpha) / (trials_q + 2 * alpha)
    return max(0.0, p * math.log(p / q) + fail_p * math.log(fail_p / fail_q))


class Resilience(NamedTuple):
    """Of one sentence of one chain."""

    interventions: int
    abandoned: bool
    chain: list[str]


@register(
    "thought_branches",
    kind="selection",
    system="Thought Branches",
    label="exact",
    source="arXiv 2510.27484; github.com/interp-reasoning/thought-branches",
    summary="counterfactual importance and resilience of a sentence, from resampled chains",
    differs=(
        "Estimator, loop and constants are the released code's; the KL definitions come from a "
        "note that agrees. Sampler and embedder are the caller's."
    ),
)
@dataclass(frozen=True, kw_only=True)
class ThoughtBranches:
    """importance(S_i) = KL(outcome | resampled sentence i is dissimilar || outcome | S_i kept).

    Args:
        similar: cosine from which a sentence counts as the same content.
        min_dissimilar: with a dissimilar share of rollouts at most this, all of them are used.
        max_interventions: cap of the resilience loop.
        alpha: smoothing of `kl_binary`.

    Outcomes are binary. State: none. Source: released code, exact.
    """

    similar: float = 0.6
    min_dissimilar: float = 0.05
    max_interventions: int = 20
    alpha: float = 1e-9

    def __post_init__(self) -> None:
        op = "algorithms.thought_branches"
        check_number(op, "similar", self.similar, -1.0, 1.0)
        check_number(op, "min_dissimilar", self.min_dissimilar, 0.0, 1.0)
        check_number(op, "max_interventions", self.max_interventions, 1)
        check_number(op, "alpha", self.alpha, 0.0, open_low=True)

    def importance(self, similarity: torch.Tensor, outcome: torch.Tensor, kept_outcome: torch.Tensor) -> float:
        """Counterfactual importance, nats.

        Args:
            similarity: (rollouts,), cosine of each rollout's sentence i with S_i. For the condition
                of Counterfactual++, "for all j >= i", its maximum over the sentences j >= i.
            outcome: (rollouts,), bool, of rollouts resampled at i.
            kept_outcome: (rollouts',), bool, of rollouts that keep S_i (resampled at i + 1).
        """
        op = "algorithms.thought_branches"
        check_vector(op, "similarity", similarity)
        rows = Rows(similarity.shape[0], "similarity", similarity.device)
        check_vector(op, "outcome", outcome, rows, BOOL)
        check_vector(op, "kept_outcome", kept_outcome, dtypes=BOOL)
        if not (outcome.numel() and kept_outcome.numel()):
            raise refuse(
                op,
                "outcome and kept_outcome",
                "of at least one rollout each",
                f"{outcome.numel()} and {kept_outcome.numel()}",
                "Resample.",
            )
        differs = similarity < self.similar
        if float(differs.double().mean()) <= self.min_dissimilar:
            differs = torch.ones_like(differs)
        branch = outcome[differs]
        return kl_binary(
            int(branch.sum()), branch.numel(), int(kept_outcome.sum()), kept_outcome.numel(), alpha=self.alpha
        )

    def resilience(
        self,
        chain: Sequence[str],
        i: int,
        resample: Callable[[list[str]], Sequence[str]],
        similarity: Callable[[str, Sequence[str]], Sequence[float]],
    ) -> Resilience:
        """Remove sentence i, and again wherever its content comes back, until it stays away.

        Resample at i; of the new sentences at or behind i take the most similar one (the first of
        equals); if it is similar, cut there and repeat.

        Args:
            chain: sentences. i: which one.
            resample: prefix -> the sentences that a new chain continues it with.
            similarity: (sentence, candidates) -> cosine with each.
        """
        op = "algorithms.thought_branches"
        check_number(op, "i", i, 0, len(chain) - 1)
        target, now, place = chain[i], list(chain), i
        for count in range(1, self.max_interventions + 1):
            rest = list(resample(now[:place]))
            now = now[:place] + rest
            scores = list(similarity(target, rest)) if rest else []
            if not scores or max(scores) < self.similar:
                return Resilience(count, True, now)
            place += scores.index(max(scores))
        return Resilience(self.max_interventions, False, now)


def counterfactual_plus_plus(kept_rate: float, abandoned_rate: float) -> float:
    """Outcome rate of rollouts that keep S_i, minus that of chains that the resilience loop ended.

    The released code's form for a binary outcome, base(i + 1) - final(i), in [-1, 1].
    """
    check_number("counterfactual_plus_plus", "kept_rate", kept_rate, 0.0, 1.0)
    check_number("counterfactual_plus_plus", "abandoned_rate", abandoned_rate, 0.0, 1.0)
    return kept_rate - abandoned_rate


def transplant_curve(outcomes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Change of the outcome rate with the length of a transplanted prefix, (prefixes,) float64.

    Args:
        outcomes: per prefix length 0, 1, ... of a chain made with a hint, (rollouts,) bool outcomes
            of resampling behind it under the prompt without the hint (100 in the paper).
    """
    if not outcomes or any(o.numel() == 0 for o in outcomes):
        raise refuse(
            "transplant_curve",
            "outcomes",
            "at least one rollout per prefix",
            [o.numel() for o in outcomes],
            "Resample every prefix.",
        )
    rates = torch.stack([o.double().mean() for o in outcomes])
    return rates - rates[0]
