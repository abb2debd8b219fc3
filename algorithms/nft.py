"""NFT: maximum likelihood, where wrong answers train an implicit negative policy."""

from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.base import State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import KL, Objective
from tokfuse.runtime.policy.shapes import NFT as NFTShape
from tokfuse.runtime.policy.shapes import Shape
from tokfuse.runtime.reference.segments import groups_of, segment_sum


@register(
    "nft",
    system="NFT",
    label="exact (released code)",
    source="arXiv 2505.18116; github.com/NVlabs/NFT",
    summary="-log r on right answers, -log of the implicit negative policy on wrong ones",
    differs=(
        "The code switches to DAPO's loss if neg_weight is negative; here that is an error, use 'dapo'. "
        "At token level the code divides the sum of each micro-batch by 1000 and then by the number of "
        "micro-batches; here the sum of the whole optimizer step is divided by `constant`. The code does not "
        "bound log r below; here the bound is -80, because float32 ends there."
    ),
)
@dataclass(frozen=True, kw_only=True)
class NFT(Standard):
    """w_g [ c (-log r) + (1 - c) neg_weight (-log((1 - q r) / (1 - q))) ], with straight-through floors.

    c is 1 for a correct response, else 0. q is the group's success rate, clamped to the shape's [0.02, 0.98]. Groups
    in which all or no responses are correct are left out. w_g is 1, 1 - q or sqrt((1 - q) / q) for normalize 0, 1
    or 2; the authors' scripts use 1. On policy, normalize=2 equals GRPO (population deviation) and normalize=1 equals
    Dr.GRPO.

    Args:
        shape: floors and clamps, a `tokfuse.NFT`.
        normalize: 0, 1 or 2, see above.
        neg_weight: weight of wrong answers; 0 is rejection fine-tuning.
        constant: divisor of the sum over all tokens of an optimizer step, with level "token". With level
            "sequence_sum", the loss is the plain sum over sequences. It does not grow with the batch, so
            micro-batches must come from `Plan.take`.

    Inputs: group_ids, correct.
    State: none.
    Source: released code (dp_actor.py, train_7B.sh), exact.
    """

    shape: Shape = NFTShape()
    skip_uniform: bool = True
    aggregation: str = ""
    normalize: int = 1
    neg_weight: float = 1.0
    constant: float = 1000.0

    def _objective(self, kl: KL | None, entropy_coef: float) -> Objective:
        # The code bounds log r above only. 80 is the lowest bound at which exp stays normal in float32.
        return replace(super()._objective(kl, entropy_coef), log_ratio_clamp=80.0)

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence_sum"):
            raise refuse(self._op, "level", "'token' or 'sequence_sum'", repr(self.level), "The paper has these two.")
        if self.aggregation == "":  # the default depends on the level; Objective checks a given value
            name = "token_sum" if self.level == "token" else "seq_mean_token_mean"
            object.__setattr__(self, "aggregation", name)
        super().__post_init__()
        if not isinstance(self.shape, NFTShape):
            raise refuse(self._op, "shape", "a tokfuse.NFT", self.shape, "Set the floors on the NFT shape.")
        if self.normalize not in (0, 1, 2):
            raise refuse(self._op, "normalize", "0, 1 or 2", self.normalize, "The authors' scripts use 1.")
        unread = {"advantage": "grpo"} | dict.fromkeys(("eps", "std", "scale", "singleton", "whiten", "overlong"))
        for option, default in unread.items():
            if (value := getattr(self, option)) != default:
                advice = "Set normalize and neg_weight."
                raise refuse(self._op, option, "left out (the weights are of the success rate)", repr(value), advice)
        check_number(self._op, "neg_weight", self.neg_weight, 0.0)
        check_number(self._op, "constant", self.constant, 0.0, open_low=True)

    @property
    def _divides_by_length(self) -> bool:
        return False

    def _normalizer(self, batch: Batch) -> float | str:
        if not self._fixed_divisor:
            return "batch"
        # Each sequence has one loss, so its mean is that loss. Divided by 1, they are summed.
        whole = self.constant if self.aggregation == "token_sum" else 1.0
        # Each rank contributes an equal part, so that the counts of all ranks add up to the constant.
        return whole / len(batch.world.all(batch.old_logp.new_zeros(())))

    @property
    def _fixed_divisor(self) -> bool:
        return self.aggregation == "token_sum" or self.level == "sequence_sum"

    def rate(self, batch: Batch) -> torch.Tensor:
        """Return q, the clamped success rate of each response's group, (seqs,) float64."""
        batch.require(self._op, "group_ids", "correct")
        assert batch.group_ids is not None and batch.correct is not None
        assert isinstance(self.shape, NFTShape)
        member = groups_of(batch.group_ids).member
        right = batch.correct.double()
        total, size = (segment_sum(x, member, batch.num_seqs)[member] for x in (right, torch.ones_like(right)))
        return (total / size).clamp(self.shape.rate_min, self.shape.rate_max)

    def advantages(self, batch: Batch) -> Advantage:
        """Return w_g for correct responses and -neg_weight w_g for wrong ones: the sign selects the branch."""
        q = self.rate(batch)
        assert batch.correct is not None
        weight = (torch.ones_like(q), 1 - q, ((1 - q) / q).sqrt())[self.normalize]
        signed = torch.where(batch.correct, weight, -self.neg_weight * weight)
        return Advantage(signed.to(batch.old_logp.dtype), "sequence")

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the batch with q on every token."""
        signal = batch.spread(self.rate(batch)).to(batch.old_logp.dtype)
        return replace(super().prepare(batch, state), signal=signal)
