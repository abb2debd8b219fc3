"""Input of the algorithms: one packed rollout batch, and the ranks that share it.

Shapes: T tokens, S sequences. Sequence i has the tokens cu_seqlens[i] : cu_seqlens[i + 1].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from tokfuse.runtime.core.checks import BOOL, FLOATS, INTS, Rows, check_choice, check_cu_seqlens, check_vector
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.distributed import collectives
from tokfuse.runtime.reference.segments import segment_sum, sequence_index

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "Batch"


@dataclass(frozen=True)
class World:
    """The ranks that hold the parts of one batch. Without arguments: this process alone.

    Every global decision of an algorithm (top-K, quantile, histogram, mean) uses `gather`. The size of the
    gathered tensors does not depend on the number of tokens.

    All responses to one prompt must be on one rank. Group statistics are local; batch statistics are global.

    Args:
        gather: function that takes a tensor of the same shape on every rank and returns (ranks, ...) in rank
            order. `World.of_group()` makes one from torch.distributed. None: one rank.
        rank: index of this process in that order.
    """

    gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    rank: int = 0

    @classmethod
    def of_group(cls, group: "ProcessGroup | None" = None) -> "World":
        """Return the ranks of a process group, each with a different part of the batch. None: the default group."""
        collectives.require_group("World.of_group", group)
        return cls(lambda x: collectives.all_gather(x, group), collectives.own_rank(group))

    def all(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` of every rank, (ranks, ...)."""
        return x.unsqueeze(0) if self.gather is None else self.gather(x.contiguous())

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks. It is added in rank order, so every rank has the same bits."""
        return self.all(x).sum(0)

    def vectors(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the vectors of all ranks. Their lengths may differ; they are padded to the longest to be sent."""
        sizes = self.all(torch.tensor([x.shape[0]], device=x.device)).flatten().tolist()
        padded = x.new_zeros(max(sizes))
        padded[: x.shape[0]] = x
        return [row[:size] for row, size in zip(self.all(padded), sizes, strict=True)]

    def together(self, run: Callable[..., torch.Tensor], *vectors: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of run(vectors of all ranks, joined in rank order).

        Every rank solves the same small problem.
        """
        parts = [self.vectors(x) for x in vectors]
        whole = run(*(torch.cat(part) for part in parts))
        mine: torch.Tensor = whole.split([len(x) for x in parts[0]])[self.rank]
        return mine


def cut_sequences(cu_seqlens: torch.Tensor, seqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (offsets of the sequences `seqs` once packed, (count + 1,) int32; their tokens, (tokens,) int64)."""
    length = (cu_seqlens[1:] - cu_seqlens[:-1]).long()[seqs]
    border = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    shift = cu_seqlens[:-1].long()[seqs] - border[:-1]
    tokens = torch.arange(int(border[-1]), device=seqs.device) + shift.repeat_interleave(length)
    return border.to(torch.int32), tokens


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed responses of one rollout and their measured statistics. No field has a gradient.

    Args:
        reward: (seqs,), float. One reward per response.
        cu_seqlens: (seqs + 1,), int32. Offsets of the responses.
        old_logp: (tokens,), float, nats. Log-probability under the policy at the start of the update. For
            replayed data: under the policy that generated the token.
        group_ids: (seqs,), int. Prompt of each response.
        mask: (tokens,), bool. True where a token counts. None: all tokens count.
        correct: (seqs,), bool. Whether the response was verified as correct. None: methods that need it raise an
            error, and `skip_uniform` compares the rewards instead.
        finished: (seqs,), bool. False if the generation window cut the response off. None: all finished.
        greedy_reward: (seqs,), float. Reward of the greedy response to the same prompt (ReMax).
        turn: (seqs,), int. Agent turn that the response belongs to (EPO).
        demonstration: (seqs,), bool. True for a teacher's trace, False for a sample of the policy (DYPO).
        token_reward: (tokens,), float. Reward per token. None: `reward` on the last counting token.
        value: (tokens,), float. The critic's value of the state before the token.
        median_value: (tokens,), float. Learned conditional median of the return (BPO).
        ref_logp: (tokens,), float, nats. Log-probability under the reference policy (CDPO: the bias model).
        sampler_logp: (tokens,), float, nats. Log-probability that the rollout engine reported.
        second_logp: (tokens,), float, nats. Log-probability under the old policy at another temperature
            (DCPO). `token_stats` returns it with `second_temperature`.
        logp: (tokens,), float, nats. Log-probability under the current policy. On the first update it equals
            old_logp.
        entropy: (tokens,), float, nats. Entropy of the current policy.
        sum_sq: (tokens,), float. Sum of squared probabilities of the old policy (OTB).
        window: (tokens,), bool. True for tokens generated in this step (T-PPO). None: all.
        causal_weight: (tokens,), float. Weight of each token's entropy (CIP).
        advantage: (tokens,) or (seqs,), float. Set by `Algorithm.prepare`.
        advantage_level: "token" or "sequence", the unit of `advantage`. Set by `Algorithm.prepare`.
        signal: (tokens,), float. Target signal or success rate, for shapes that need one. Set by
            `Algorithm.prepare`.
        token_weight: (tokens,), float. Multiplies the policy term. None: 1.
        imitation: (seqs,), float. Weight of the log-likelihood of the response. Set by `Algorithm.prepare` (DYPO,
            A2PR).
        contrast: (seqs,), bool. Whether the response is compared with others of its prompt. Set by
            `Algorithm.prepare` (DYPO).
        prompt_share: (seqs,), float. 1 / number of responses to the prompt in the rollout. Set by
            `Algorithm.prepare` (DYPO).
        turn_entropy: (seqs,), float, nats. Mean entropy of the response's turn over all rollouts. Set by
            `Algorithm.prepare` (EPO).
        world: the ranks that share the batch.

    Raises:
        ValueError: a wrong shape, dtype or device, or cu_seqlens that are no prefix sum.
    """

    reward: torch.Tensor
    cu_seqlens: torch.Tensor
    old_logp: torch.Tensor
    group_ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    finished: torch.Tensor | None = None
    greedy_reward: torch.Tensor | None = None
    turn: torch.Tensor | None = None
    demonstration: torch.Tensor | None = None
    token_reward: torch.Tensor | None = None
    value: torch.Tensor | None = None
    median_value: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    sampler_logp: torch.Tensor | None = None
    second_logp: torch.Tensor | None = None
    logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    sum_sq: torch.Tensor | None = None
    window: torch.Tensor | None = None
    causal_weight: torch.Tensor | None = None
    advantage: torch.Tensor | None = None
    advantage_level: str = "sequence"
    signal: torch.Tensor | None = None
    token_weight: torch.Tensor | None = None
    imitation: torch.Tensor | None = None
    contrast: torch.Tensor | None = None
    prompt_share: torch.Tensor | None = None
    turn_entropy: torch.Tensor | None = None
    world: World = World()

    def __post_init__(self) -> None:
        check_choice(OP, "advantage_level", self.advantage_level, ("token", "sequence"))
        tokens = check_vector(OP, "old_logp", self.old_logp).shape[0]
        device = self.old_logp.device
        seqs = check_cu_seqlens(OP, self.cu_seqlens, tokens, device)
        for name in PER_SEQUENCE | PER_TOKEN:
            value = getattr(self, name)
            if value is None:
                continue
            per_token = name in PER_TOKEN
            if name == "advantage":
                per_token = self.advantage_level == "token"
            rows = Rows(tokens, "old_logp", device) if per_token else Rows(seqs, "cu_seqlens", device)
            check_vector(OP, name, value, rows, (PER_SEQUENCE | PER_TOKEN)[name])

    @property
    def num_tokens(self) -> int:
        return self.old_logp.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.reward.shape[0]

    @property
    def valid(self) -> torch.Tensor:
        """The mask, or all True without one; (tokens,) bool."""
        return torch.ones_like(self.old_logp, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def sequence(self) -> torch.Tensor:
        """Index of every token's sequence, (tokens,) int64."""
        return sequence_index(self.cu_seqlens, self.num_tokens)

    @property
    def lengths(self) -> torch.Tensor:
        """Number of counting tokens of each sequence, (seqs,) int64."""
        return segment_sum(self.valid.long(), self.sequence, self.num_seqs)

    def spread(self, per_sequence: torch.Tensor) -> torch.Tensor:
        """Return the value of each token's sequence, (tokens,)."""
        return per_sequence[self.sequence]

    def sequence_mean(self, per_token: torch.Tensor) -> torch.Tensor:
        """Return the mean over the counting tokens of each sequence, (seqs,) float64. A sequence without one: 0."""
        x = torch.where(self.valid, per_token.double(), 0.0)
        total: torch.Tensor = segment_sum(x, self.sequence, self.num_seqs)
        return total / self.lengths.clamp(min=1)

    def global_mean(self, per_token: torch.Tensor) -> torch.Tensor:
        """Return the mean over the counting tokens of all ranks, () float64. Without one: 0."""
        x = torch.where(self.valid, per_token.double(), 0.0)
        sums = self.world.sum(torch.stack([x.sum(), self.valid.sum().double()]))
        return sums[0] / sums[1].clamp(min=1)

    def require(self, op: str, *names: str) -> None:
        """Raise an error if the batch lacks one of these fields."""
        for name in names:
            if getattr(self, name) is None:
                raise refuse(op, f"batch.{name}", "given", None, _HOW_TO_GET.get(name, _PASS_IT))

    def with_policy(self, logp: torch.Tensor, entropy: torch.Tensor | None = None) -> "Batch":
        """Return the same batch with detached statistics of the current policy."""
        entropy = self.entropy if entropy is None else entropy.detach()
        return replace(self, logp=logp.detach(), entropy=entropy)

    def take(self, seqs: torch.Tensor) -> "Batch":
        """Return a minibatch: only the sequences `seqs`, (count,) int64, in this order.

        Prepared fields are copied, so advantages keep the statistics of the whole batch.
        """
        border, tokens = cut_sequences(self.cu_seqlens, seqs)
        cut: dict[str, Any] = {"cu_seqlens": border}
        for name in PER_SEQUENCE | PER_TOKEN:
            value = getattr(self, name)
            per_token = name in PER_TOKEN
            if name == "advantage":
                per_token = self.advantage_level == "token"
            if value is not None:
                cut[name] = value[tokens if per_token else seqs]
        return replace(self, **cut)

    def rows(self, seqs: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the sequences `seqs`, in this order, (tokens,) int64."""
        return cut_sequences(self.cu_seqlens, seqs)[1]

    def to_state(self) -> dict[str, Any]:
        """Return the fields, tensors and strings only, for a checkpoint; without `world`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "world"}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], world: World) -> "Batch":
        """Return the batch of a `to_state` checkpoint."""
        return cls(**state, world=world)


PER_SEQUENCE = {
    "reward": FLOATS,
    "greedy_reward": FLOATS,
    "group_ids": INTS,
    "turn": INTS,
    "correct": BOOL,
    "finished": BOOL,
    "demonstration": BOOL,
    "advantage": FLOATS,
    "imitation": FLOATS,
    "contrast": BOOL,
    "prompt_share": FLOATS,
    "turn_entropy": FLOATS,
}
PER_TOKEN = dict.fromkeys(
    (
        "old_logp",
        "logp",
        "ref_logp",
        "sampler_logp",
        "second_logp",
        "entropy",
        "sum_sq",
        "value",
        "median_value",
        "token_reward",
        "causal_weight",
        "signal",
        "token_weight",
    ),
    FLOATS,
) | {"mask": BOOL, "window": BOOL}

_PASS_IT = "Pass it when you create the Batch."
_PREPARE = "Call algorithm.prepare(batch, state) first."
_HOW_TO_GET = {
    "imitation": _PREPARE,
    "contrast": _PREPARE,
    "prompt_share": _PREPARE,
    "turn_entropy": _PREPARE,
    "logp": "Pass batch.with_policy(token_stats(...).logp), or old_logp on the first update.",
    "entropy": "Pass token_stats(...).entropy.",
    "sum_sq": "Pass token_stats(...).sum_sq.",
    "second_logp": "Pass token_stats(..., second_temperature=algorithm.temperature(state)).",
    "ref_logp": "Score the tokens with the reference policy, or make the algorithm with kl=None.",
    "value": "Pass the critic's values, or choose a group baseline.",
}
