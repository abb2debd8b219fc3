"""ADORA: multiplies the advantages of a group by a weight that depends on success and length."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.reference.segments import groups_of, segment_sum

# rule -> (weight, failures of at least this length are ignored)
RULES: dict[str, tuple[float, int | None]] = {
    "llm": (0.1, 4054),
    "vlm": (0.1, 4094),
    "paper_amplify": (2.0, None),
    "paper_attenuate": (0.1, None),
}


@register(
    "adora",
    system="ADORA",
    label="exact (released code)",
    source="github.com/ShadeCloak/ADORA; the paper's rule from its reviews",
    summary="group weight from the longest success compared with the mean failure",
    differs=(
        "rule='llm' and 'vlm' are the two released codes. They disagree on groups without a success "
        "(weight 0.1 and 1); with GRPO, such groups have advantage 0. The paper's rules are recon."
    ),
)
@dataclass(frozen=True, kw_only=True)
class ADORA(Standard):
    """A <- w_g A, for any objective of `Standard`.

    P are the correct responses of the group, F the wrong responses shorter than `length_limit`.
    longer = (max length in P) > (mean length in F).

        llm              w = 1 if longer else weight; without P: weight; with P but without F: 1
        vlm              w = 1 if longer or without P, else weight; with P but without F: weight
        paper_amplify    w = weight if `condition` holds, else 1 (the LLM recipe)
        paper_attenuate  w = 1 if `condition` holds, else weight (the VLM recipe)

    Args:
        rule: "llm", "vlm", "paper_amplify" or "paper_attenuate".
        weight: the weight above. None: 2.0 for paper_amplify, else 0.1.
        length_limit: None: 4054 for llm, 4094 for vlm, no limit for the paper's rules.
        condition: for the paper's rules: "length" (longer), "difficulty" (success rate <= tau) or
            "either". None: "length".
        tau: for "difficulty" and "either". None: 0.5.

    Inputs: group_ids, correct.
    State: none.
    Source: released code, exact; the paper's rules are reconstructed from its reviews.
    """

    rule: str = "llm"
    weight: float | None = None
    length_limit: int | None = None
    condition: str | None = None
    tau: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self._op, "rule", self.rule, RULES)
        if self.weight is not None:
            check_number(self._op, "weight", self.weight, 0.0)
        if self.condition is not None:
            check_choice(self._op, "condition", self.condition, ("length", "difficulty", "either"))
            if not self.rule.startswith("paper"):
                raise refuse(
                    self._op,
                    "condition",
                    f"left out with rule {self.rule!r}",
                    repr(self.condition),
                    "It would have no effect.",
                )
        if self.tau is not None:
            check_number(self._op, "tau", self.tau, 0.0, 1.0)
            if self.condition not in ("difficulty", "either"):
                raise refuse(
                    self._op, "tau", f"left out with condition {self.condition!r}", self.tau, "It would have no effect."
                )

    def group_weight(self, batch: Batch) -> torch.Tensor:
        """Return w of each response's group, (seqs,) float64."""
        batch.require(self._op, "group_ids", "correct")
        assert batch.group_ids is not None and batch.correct is not None
        weight, limit = RULES[self.rule]
        weight = weight if self.weight is None else self.weight
        limit = limit if self.length_limit is None else self.length_limit
        member, length = groups_of(batch.group_ids).member, batch.lengths.double()
        right = batch.correct
        wrong = ~right if limit is None else ~right & (length < limit)
        seqs = batch.num_seqs

        def total(x: torch.Tensor) -> torch.Tensor:
            return segment_sum(x.double(), member, seqs)[member]

        longest = torch.full_like(length, -torch.inf).scatter_reduce(
            0, member, torch.where(right, length, -torch.inf), "amax"
        )[member]
        failures, successes = total(wrong), total(right)
        mean = total(torch.where(wrong, length, 0.0)) / failures.clamp(min=1)
        without = torch.inf if self.rule == "vlm" else -torch.inf
        longer = longest > torch.where(failures > 0, mean, without)
        one = torch.ones_like(length)
        if self.rule == "llm":
            return torch.where(longer, one, weight)
        if self.rule == "vlm":
            return torch.where(longer | (successes == 0), one, weight)
        rate = successes / total(torch.ones_like(right))
        hard = rate <= (0.5 if self.tau is None else self.tau)
        chosen = {"length": longer, "difficulty": hard, "either": longer | hard}
        holds = chosen[self.condition or "length"]
        return torch.where(holds == (self.rule == "paper_amplify"), weight * one, one)

    def advantages(self, batch: Batch) -> Advantage:
        """Return the base advantages multiplied by the weight of the group."""
        value, level = super().advantages(batch)
        weight = self.group_weight(batch).to(value.dtype)
        return Advantage(value * (weight if level == "sequence" else batch.spread(weight)), level)
