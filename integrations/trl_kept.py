"""The ids that a sampler with top-p or top-k kept, in TRL's GRPO trainer.

TRL 1.16 has no such field. A `rollout_func` may return one, `kept_ids`: for each completion and each of its tokens, the
list of kept ids. In TRL's batches it travels as two tensors, so that they can be shuffled and split like all others.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tokfuse.integrations import trl_seams as host
from tokfuse.integrations.padded import Padding
from tokfuse.runtime.core.errors import refuse

OP = "FusedGRPOTrainer"
FIELD = "kept_ids"
"""Name of the field that `rollout_func` returns, and of the ids in a batch: (batch, kept) int32, -1 for padding."""
COUNTS = "kept_counts"
"""Name of the number of ids of each token in a batch: (batch, length) int32."""


class KeptIds(NamedTuple):
    """The kept ids of the completion tokens of a batch, packed. A token that nobody sampled has none."""

    flat: torch.Tensor
    """(kept,) int32."""
    offsets: torch.Tensor
    """(tokens + 1,) int64."""

    def arguments(self) -> dict[str, torch.Tensor]:
        """Return the arguments of `policy_step`."""
        return {"kept_ids": self.flat, "kept_offsets": self.offsets}


def of_batch(inputs: dict[str, Any]) -> KeptIds | None:
    """Return the kept ids of a batch of TRL, or None without them."""
    if FIELD not in inputs:
        return None
    ids, rows = inputs[FIELD], Padding(inputs["completion_mask"].bool())
    counts = rows.pack(inputs[COUNTS]).to(torch.int64)
    return KeptIds(ids[ids >= 0], torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


class Recorded(NamedTuple):
    """The kept ids of a rollout, one tensor per completion."""

    ids: list[torch.Tensor]
    """(kept,) int32: of all its tokens, concatenated."""
    counts: list[torch.Tensor]
    """(length,) int32: number of ids of each token."""

    @staticmethod
    def of_lists(
        kept: Sequence[Sequence[Sequence[int]]],
        completions: Sequence[Sequence[int]],
        sampled: Sequence[Sequence[int]] | None,
    ) -> "Recorded":
        """Return the record of a rollout from its lists. Raise ValueError if a sampled token is not in its list.

        Args:
            kept: kept ids of each token of each completion.
            completions: the completions.
            sampled: 1 for tokens of the policy, 0 for tokens of a tool, whose ids are ignored. None: all are sampled.
        """
        out = Recorded([], [])
        if len(kept) != len(completions):
            raise _wrong("one list per completion", f"{len(kept)} for {len(completions)}")
        for i, (of_tokens, tokens) in enumerate(zip(kept, completions, strict=True)):
            if len(of_tokens) != len(tokens):
                raise _wrong("one list per token", f"{len(of_tokens)} for {len(tokens)} in completion {i}")
            used = [[] if sampled is not None and not sampled[i][t] else ids for t, ids in enumerate(of_tokens)]
            for t, (ids, token) in enumerate(zip(used, tokens, strict=True)):
                if token not in ids and (sampled is None or sampled[i][t]):
                    raise _wrong("with the sampled token in each list", f"no {token} at token {t} of completion {i}")
            out.ids.append(torch.tensor([x for ids in used for x in ids], dtype=torch.int32))
            out.counts.append(torch.tensor([len(ids) for ids in used], dtype=torch.int32))
        return out

    def packed(self, device: torch.device) -> KeptIds:
        """Return the kept ids of all tokens."""
        counts = torch.cat(self.counts).to(torch.int64)
        return KeptIds(torch.cat(self.ids).to(device), torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device))

    def fields(self, completion_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the fields of a batch with this (batch, length) mask."""
        ids = torch.nn.utils.rnn.pad_sequence(self.ids, batch_first=True, padding_value=-1)
        counts = torch.nn.utils.rnn.pad_sequence(self.counts, batch_first=True)
        counts = torch.nn.functional.pad(counts, (0, completion_mask.shape[1] - counts.shape[1]))
        return {FIELD: ids.to(completion_mask.device), COUNTS: counts.to(completion_mask.device)}


def _wrong(want: str, actual: str) -> ValueError:
    return refuse(OP, "kept_ids of rollout_func", want, actual, "Return the ids that the sampler kept for each token.")


class KeptHead(host.Head):
    """TRL's head over the kept ids of a batch. TRL calls it once for each part of the batch, in order."""

    def __init__(self, kept: KeptIds) -> None:
        super().__init__(self._run)
        self._kept, self._start = kept, 0

    def _run(self, hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor, *rest: Any) -> Any:
        start, self._start = self._start, self._start + targets.shape[0]
        offsets = self._kept.offsets[start : self._start + 1]
        first, last = offsets[[0, -1]].tolist()
        part = KeptIds(self._kept.flat[first:last], offsets - first)
        given = part.arguments() | {"mask": part.offsets.diff() > 0}
        return host.token_head(hidden, weight, bias, targets, *rest, kept=given)
