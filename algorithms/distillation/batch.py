"""Input of the distillation methods: the packed responses of one step, and what is known about their tokens."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from tokfuse.algorithms.batch import Batch, World, cut_sequences
from tokfuse.runtime.core.checks import BOOL, FLOATS, Rows, check_cu_seqlens, check_optional
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.reference.segments import segment_sum, sequence_index

OP = "DistillationBatch"
LOGPS = ("old_logp", "logp", "teacher_logp")
CONTEXTS = ("informed", "pruned")


@dataclass(frozen=True, kw_only=True)
class DistillationBatch:
    """Packed responses that the student learns from. No field has a gradient.

    The responses may come from the student, the teacher or a data set. Row t of the student and of the teacher
    predict the same token, possibly after different prompts.

    Args:
        num_tokens: number of packed tokens.
        cu_seqlens: (seqs + 1,), int32. Offsets of the responses.
        mask: (tokens,), bool. True where a token counts. None: all tokens count.
        old_logp: (tokens,), float, nats. Log-probability of the sampled token when it was sampled, by the student.
        logp: (tokens,), float, nats. The same by the student now. On the first update it equals old_logp.
        teacher_logp: (tokens,), float, nats. The same by the teacher.
        informed: (seqs,), bool. True if the teacher's prompt contains privileged context (SDPO). Other responses do
            not count. None: all True.
        pruned: (seqs,), bool. True if the instruction was pruned (LeaF).
        world: the ranks that share the batch.

    Raises:
        ValueError: a wrong shape, dtype or device, or cu_seqlens that are no prefix sum.
    """

    num_tokens: int
    cu_seqlens: torch.Tensor
    mask: torch.Tensor | None = None
    old_logp: torch.Tensor | None = None
    logp: torch.Tensor | None = None
    teacher_logp: torch.Tensor | None = None
    informed: torch.Tensor | None = None
    pruned: torch.Tensor | None = None
    world: World = World()

    def __post_init__(self) -> None:
        device = self.cu_seqlens.device
        seqs = check_cu_seqlens(OP, self.cu_seqlens, self.num_tokens, device)
        tokens, per_seq = Rows(self.num_tokens, "num_tokens", device), Rows(seqs, "cu_seqlens", device)
        check_optional(OP, "mask", self.mask, tokens, BOOL)
        for name in LOGPS:
            check_optional(OP, name, getattr(self, name), tokens, FLOATS)
        for name in CONTEXTS:
            check_optional(OP, name, getattr(self, name), per_seq, BOOL)

    @property
    def num_seqs(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def valid(self) -> torch.Tensor:
        """The mask, or all True without one; (tokens,) bool."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.num_tokens, dtype=torch.bool, device=self.cu_seqlens.device)

    @property
    def sequence(self) -> torch.Tensor:
        """Index of every token's sequence, (tokens,) int64."""
        return sequence_index(self.cu_seqlens, self.num_tokens)

    def lengths(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the number of True tokens of each sequence, (seqs,) int64."""
        total: torch.Tensor = segment_sum(mask.long(), self.sequence, self.num_seqs)
        return total

    def require(self, op: str, *names: str) -> None:
        """Raise an error if the batch lacks one of these fields."""
        for name in names:
            if getattr(self, name) is None:
                raise refuse(op, f"batch.{name}", "given", None, _HOW_TO_GET[name])

    def rows(self, seqs: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the sequences `seqs`, in this order, (tokens,) int64."""
        return cut_sequences(self.cu_seqlens, seqs)[1]

    def take(self, seqs: torch.Tensor) -> "DistillationBatch":
        """Return a part of the batch: only the sequences `seqs`, (count,) int64, in this order."""
        border, tokens = cut_sequences(self.cu_seqlens, seqs)
        cut: dict[str, Any] = {"num_tokens": tokens.shape[0], "cu_seqlens": border}
        for name in ("mask", *LOGPS, *CONTEXTS):
            value = getattr(self, name)
            if value is not None:
                cut[name] = value[seqs if name in CONTEXTS else tokens]
        return replace(self, **cut)

    def for_policy(self, mask: torch.Tensor) -> Batch:
        """Return the batch of a policy-gradient step on the tokens of `mask`. Its rewards are 0."""
        old = self.old_logp
        assert old is not None
        return Batch(
            reward=old.new_zeros(self.num_seqs),
            cu_seqlens=self.cu_seqlens,
            old_logp=old,
            logp=self.logp,
            ref_logp=self.teacher_logp,
            mask=mask,
            world=self.world,
        )


_SCORE = "Pass the field logp of tokfuse.token_stats or tokfuse.linear_token_stats"
_HOW_TO_GET = {
    "old_logp": f"{_SCORE}, of the student that sampled the tokens.",
    "logp": f"{_SCORE}, of the current student, or old_logp on the first update.",
    "teacher_logp": f"{_SCORE}, of the teacher.",
    "informed": "Pass True for the responses whose teacher saw privileged context.",
    "pruned": "Pass True for the responses to a pruned instruction.",
}
