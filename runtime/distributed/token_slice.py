"""Assignment of the tokens of a packed batch to the ranks of a context- or sequence-parallel group."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.distributed import collectives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TokenSlice:
    """The part of a packed batch that this rank holds. Every rank holds the same number of tokens.

    Create the global tensors first, including shifted targets (`shifted_targets`), and slice them
    afterwards. A rank cannot shift across its own border.

        part = TokenSlice.contiguous(num_tokens, group)
        stats = tokfuse.token_stats(logits_of(part.take(input_ids)), part.take(target),
                                    mask=part.take(mask))
        logp = part.gather(stats.logp)      # all tokens, on every rank; differentiable

    Args:
        num_tokens: number of tokens of the whole batch.
        order: (ranks * local,) int64, the token at every position of every rank; -1 for padding.
        group: process group. None: the default group.
    """

    num_tokens: int
    order: torch.Tensor
    group: "ProcessGroup | None" = None

    @classmethod
    def contiguous(cls, num_tokens: int, group: "ProcessGroup | None" = None) -> "TokenSlice":
        """Return the slice of equal contiguous pieces: rank r holds piece r (Ulysses, sequence parallelism)."""
        return cls._of_pieces(num_tokens, group, 1)

    @classmethod
    def zigzag(cls, num_tokens: int, group: "ProcessGroup | None" = None) -> "TokenSlice":
        """Return the slice of 2 * ranks pieces: rank r holds pieces r and 2 * ranks - 1 - r.

        This balances the work of causal ring attention.
        """
        return cls._of_pieces(num_tokens, group, 2)

    @classmethod
    def _of_pieces(cls, num_tokens: int, group: "ProcessGroup | None", pieces: int) -> "TokenSlice":
        check_number("TokenSlice", "num_tokens", num_tokens, 0)
        collectives.require_group("TokenSlice", group)
        ranks = collectives.num_ranks(group)
        size = -(-num_tokens // (ranks * pieces))
        place = torch.arange(ranks * pieces * size, device="cpu").view(ranks * pieces, size)
        if pieces == 2:
            place = torch.stack([place[:ranks], place[ranks:].flip(0)], 1)
        place = place.flatten()
        return cls(num_tokens, torch.where(place < num_tokens, place, -1), group)

    @property
    def index(self) -> torch.Tensor:
        """The tokens of this rank, (local,) int64; -1 for padding."""
        return (
            self.order.chunk(collectives.num_ranks(self.group))[collectives.own_rank(self.group)]
            if self.order.numel()
            else self.order
        )

    def take(self, x: torch.Tensor, fill: Any = 0) -> torch.Tensor:
        """Return this rank's part of a global tensor, (local, ...). Padding is `fill` in the dtype of x."""
        if x.shape[:1] != (self.num_tokens,):
            raise refuse(
                "TokenSlice.take",
                "x",
                f"({self.num_tokens}, ...) long, the whole batch",
                f"shape {tuple(x.shape)}",
                "Pass a global tensor.",
            )
        index = self.index.to(x.device)
        if self.num_tokens == 0:
            return x
        out = x[index.clamp(min=0)]
        inside = (index >= 0).view(-1, *[1] * (x.dim() - 1))
        return torch.where(inside, out, torch.as_tensor(fill, dtype=x.dtype, device=x.device))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the parts of all ranks in global order, (num_tokens, ...), on every rank.

        The forward is one all-gather. The backward has no collective: it slices this rank's part from the
        gradient of the whole tensor. So every rank must compute the same loss from the gathered tensor.
        Ratios or means over sequences that cross ranks need this.
        """
        local = self.index.shape[0]
        if x.shape[:1] != (local,):
            raise refuse(
                "TokenSlice.gather",
                "x",
                f"({local}, ...) long, this rank's part",
                f"shape {tuple(x.shape)}",
                "Pass a tensor of the tokens that take returned.",
            )
        out: torch.Tensor = _Gather.apply(x, self)
        return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, part: TokenSlice) -> torch.Tensor:
        ctx.part = part
        every = collectives.all_gather(x, part.group).flatten(0, 1)
        order = part.order.to(x.device)
        out = torch.zeros((part.num_tokens, *x.shape[1:]), dtype=x.dtype, device=x.device)
        out[order[order >= 0]] = every[order >= 0]
        return out

    @staticmethod
    @first_order("tokfuse.distributed")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.part.take(grad), None


def shifted_targets(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (target, mask) of next-token prediction over a packed batch. Slice them afterwards.

    target_t = tokens_{t+1}. The last token of a sequence has no target. Row t counts if its target counts.

    Args:
        tokens: (tokens,) int64, the input ids of the whole batch.
        cu_seqlens: (seqs + 1,) int32 packing offsets.
        mask: (tokens,) bool, True at tokens to learn (completions). None: all tokens.

    Returns:
        target (tokens,) int64, 0 where the mask is False; mask (tokens,) bool.
    """
    count = tokens.shape[0]
    last = torch.zeros(count, dtype=torch.bool, device=tokens.device)
    ends = cu_seqlens[1:].long() - 1
    last[ends[cu_seqlens[1:] > cu_seqlens[:-1]]] = True
    keep = ~last
    if mask is not None:
        keep = keep & mask.roll(-1)
    return torch.where(keep, tokens.roll(-1), 0), keep
