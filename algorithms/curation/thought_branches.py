"""Thought Branches: measures how much a sentence of a chain of thought matters, by resampling from it.

"Importance" is a change of the outcome's distribution. "Resilience" is the number of times that a content must be
removed until it does not come back. Neither is a gradient influence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import (
    BOOL,
    Rows,
    check_choice,
    check_integer,
    check_number,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse


def kl_binary(successes_p: float, trials_p: int, successes_q: float, trials_q: int, *, alpha: float = 1e-9) -> float:
    """Return KL(Bernoulli p || Bernoulli q) in nats from counts, each smoothed by alpha; at least 0.

    p = (successes + alpha) / (trials + 2 alpha); p ln(p / q) + (1 - p) ln((1 - p) / (1 - q)).

    Args:
        successes_p, trials_p: counts of p, trials >= 1, successes in [0, trials].
        successes_q, trials_q: counts of q, trials >= 1, successes in [0, trials].
        alpha: > 0. 1e-9 as in the released code, 1 for Laplace. With 1e-9, an event that q never had costs about
            ln(1 / alpha).

    Source: released analyze_rollouts.py. Exact.
    """
    for name, wins, trials in (("p", successes_p, trials_p), ("q", successes_q, trials_q)):
        check_integer("kl_binary", f"trials_{name}", trials, 1)
        check_number("kl_binary", f"successes_{name}", wins, 0, trials)
    check_number("kl_binary", "alpha", alpha, 0.0, open_low=True)
    p = (successes_p + alpha) / (trials_p + 2 * alpha)
    q = (successes_q + alpha) / (trials_q + 2 * alpha)
    # log(1 - p) from the failures, because 1 - p cancels for small alpha.
    fail_p = (trials_p - successes_p + alpha) / (trials_p + 2 * alpha)
    fail_q = (trials_q - successes_q + alpha) / (trials_q + 2 * alpha)
    return max(0.0, p * math.log(p / q) + fail_p * math.log(fail_p / fail_q))


class Resilience(NamedTuple):
    """Resilience of one sentence of one chain: removals, whether its content stayed away, the last chain."""

    interventions: int
    abandoned: bool
    chain: list[str]


@register(
    "thought_branches",
    kind="selection",
    system="Thought Branches",
    label="exact (paper, released code)",
    source="arXiv 2510.27484; github.com/interp-reasoning/thought-branches",
    summary="counterfactual importance and resilience of a sentence, from resampled chains",
    differs=(
        "Loop and constants match the released code. form='paper' (default): the kept side is the rollouts that "
        "keep the sentence. form='code': the similar rollouts are pooled into it, as the code does by default. The "
        "caller passes the sampler and the embedder."
    ),
)
@dataclass(frozen=True, kw_only=True)
class ThoughtBranches:
    """importance(S_i) = KL(outcome | resampled sentence i is dissimilar || outcome | S_i kept), for binary outcomes.

    Args:
        similar: a sentence with at least this cosine has the same content, in [-1, 1].
        min_dissimilar: if the share of dissimilar rollouts is at most this, all rollouts are used. In [0, 1].
        max_interventions: maximum number of removals of the resilience loop, >= 1.
        alpha: smoothing of `kl_binary`, > 0.
        form: "paper" or "code".

    State: none.
    Source: released code, exact.
    """

    similar: float = 0.6
    min_dissimilar: float = 0.05
    max_interventions: int = 20
    alpha: float = 1e-9
    form: str = "paper"

    def __post_init__(self) -> None:
        op = "algorithms.thought_branches"
        check_choice(op, "form", self.form, ("paper", "code"))
        check_number(op, "similar", self.similar, -1.0, 1.0)
        check_number(op, "min_dissimilar", self.min_dissimilar, 0.0, 1.0)
        check_integer(op, "max_interventions", self.max_interventions, 1)
        check_number(op, "alpha", self.alpha, 0.0, open_low=True)

    def importance(self, similarity: torch.Tensor, outcome: torch.Tensor, kept_outcome: torch.Tensor) -> float:
        """Return the counterfactual importance, nats.

        Args:
            similarity: (rollouts,), finite, cosine of each rollout's sentence i with S_i. For the condition of
                Counterfactual++, "for all j >= i": the maximum over the sentences j >= i.
            outcome: (rollouts,), bool, outcomes of rollouts resampled at i.
            kept_outcome: (rollouts',), bool, outcomes of rollouts that keep S_i (resampled at i + 1).
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
                "Resample more rollouts.",
            )
        check_values(op, "similarity", similarity, always=True)
        differs = similarity < self.similar
        if float(differs.double().mean()) <= self.min_dissimilar:
            differs = torch.ones_like(differs)
        branch = outcome[differs]
        if self.form == "code":
            kept_outcome = torch.cat([kept_outcome, outcome[~differs]])
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
        """Remove sentence i, and remove its content again each time it comes back, until it stays away.

        Each removal resamples the chain from that sentence on. Of the new sentences, the most similar one (of equal
        ones the first) is the next to remove, if it is similar enough.

        Args:
            chain: the sentences.
            i: index of the sentence, in [0, len(chain)).
            resample: function of a prefix that returns the sentences with which a new chain continues it.
            similarity: function (sentence, candidates) that returns the cosine with each candidate, finite.

        Returns:
            Resilience(interventions, abandoned, chain).
        """
        op = "algorithms.thought_branches"
        check_integer(op, "i", i, 0, len(chain) - 1)
        target, now, place = chain[i], list(chain), i
        for count in range(1, self.max_interventions + 1):
            rest = list(resample(now[:place]))
            now = now[:place] + rest
            found = similarity(target, rest) if rest else []
            scores = [check_number(op, "similarity(sentence, candidates)", s, -math.inf) for s in found]
            if not scores or max(scores) < self.similar:
                return Resilience(count, True, now)
            place += scores.index(max(scores))
        return Resilience(self.max_interventions, False, now)


def counterfactual_plus_plus(kept_rate: float, abandoned_rate: float) -> float:
    """Return the outcome rate of rollouts that keep S_i minus the outcome rate of chains without it.

    This is the released code's form for a binary outcome, base(i + 1) - final(i), in [-1, 1].

    Args:
        kept_rate: outcome rate of rollouts that keep S_i, in [0, 1].
        abandoned_rate: outcome rate of chains that ended the resilience loop, in [0, 1].
    """
    check_number("counterfactual_plus_plus", "kept_rate", kept_rate, 0.0, 1.0)
    check_number("counterfactual_plus_plus", "abandoned_rate", abandoned_rate, 0.0, 1.0)
    return kept_rate - abandoned_rate


def transplant_curve(outcomes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the change of the outcome rate with the length of a transplanted prefix, (prefixes,) float64.

    Args:
        outcomes: for each prefix length 0, 1, ... of a chain generated with a hint, (rollouts,) bool. The outcomes
            are of continuations of the prefix, resampled with the prompt without the hint (100 in the paper).
    """
    if not outcomes or any(o.numel() == 0 for o in outcomes):
        raise refuse(
            "transplant_curve",
            "outcomes",
            "at least one rollout per prefix",
            [o.numel() for o in outcomes],
            "Resample every prefix.",
        )
    for one in outcomes:
        check_vector("transplant_curve", "outcomes", one, dtypes=BOOL)
    rates = torch.stack([o.double().mean() for o in outcomes])
    return rates - rates[0]
