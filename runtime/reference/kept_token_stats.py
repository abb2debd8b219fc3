"""Reference of `tokfuse.kept_token_stats`: softmax over the kept ids of each row, differentiable."""

import torch

from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import check_values
from tokfuse.runtime.core.token_ids import TokenIds
from tokfuse.runtime.reference.token_stats import rounded, transformed_logits

OP = "kept_token_stats"


def forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    kept_ids: torch.Tensor,
    kept_offsets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse); see `tokfuse.kept_token_stats` for the contract."""
    tokens, vocab = logits.shape
    if not torch.compiler.is_compiling():
        check(logits, target, kept_ids, kept_offsets, mask, temperature)
    rows = row_of_each(kept_ids, kept_offsets)
    keep = torch.ones(tokens, dtype=torch.bool, device=logits.device) if mask is None else mask
    counts = keep[rows]
    z = torch.where(counts, logits[rows, torch.where(counts, kept_ids, 0)], 0.0)
    if isinstance(temperature, torch.Tensor):
        temperature = torch.where(keep, temperature, 1.0)[rows]
    u = transformed_logits(z.unsqueeze(-1), temperature, softcap, logit_scale).squeeze(-1)
    u = torch.where(counts, u, float("-inf"))

    zero = u.new_zeros(tokens)
    top = torch.full_like(zero, float("-inf")).scatter_reduce(0, rows, u.detach(), "amax")
    dead = top == float("-inf")  # no kept id, or only -inf: the row has no distribution
    # Like token_stats.log_softmax: the sum leaves out the largest logit m, so it gets no gradient from the sum.
    place = torch.arange(u.shape[0], device=u.device)
    behind = torch.full_like(target, u.shape[0])
    largest = behind.scatter_reduce(0, rows, torch.where(u == top[rows], place, u.shape[0]), "amin")
    m = torch.where(dead, 0.0, torch.cat([u, u.new_zeros(1)])[largest])
    alone = (place == largest[rows]) & top.isfinite()[rows]
    x = torch.where(alone, 0.0, u - m[rows])
    rest = zero.index_add(0, rows, torch.where(alone, 0.0, x.exp())).log1p()
    logp_all = x - rest[rows]
    # 0 * -inf is NaN in forward and backward, so an excluded logit gets log p = 0 before the product.
    finite = torch.where(logp_all == float("-inf"), 0.0, logp_all)
    entropy = -zero.index_add(0, rows, logp_all.exp() * finite)
    hit = counts & (kept_ids == target[rows])
    logp = zero.index_add(0, rows, torch.where(hit, logp_all, 0.0))
    found = zero.index_add(0, rows, hit.to(u.dtype)) > 0
    logp = torch.where(found, logp, float("-inf"))

    def final(x: torch.Tensor, dead_value: float) -> torch.Tensor:
        return torch.where(keep, torch.where(dead, dead_value, x), 0.0)

    minus_inf = float("-inf")
    stats = final(logp, minus_inf), final(entropy, 0.0), final(m + rest, minus_inf)
    return rounded(stats, logits.dtype)


def row_of_each(ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(kept,) the row that each kept id belongs to."""
    rows = torch.arange(offsets.shape[0] - 1, device=ids.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=ids.shape[0])


def restricted(logits: torch.Tensor, kept: TokenIds | None, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the logits with -inf outside the kept ids, or as they are if `kept` is None. Differentiable."""
    if kept is None:
        return logits
    row, ids = row_of_each(kept.flat, kept.offsets), kept.flat
    if mask is not None:  # the ids of a masked row have no meaning
        ids = torch.where(mask[row], ids, 0)
    return torch.full_like(logits, float("-inf")).index_put((row, ids), logits[row, ids])


def constant_if_excluded(kept: TokenIds | None, logp: torch.Tensor) -> torch.Tensor:
    """Return logp, detached in rows whose target is not a kept id: there it is -inf for any logits."""
    return logp if kept is None else torch.where(logp == float("-inf"), logp.detach(), logp)


def gradient_if_kept(kept: TokenIds | None, logp: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor | None:
    """Return the gradient that arrives at logp, 0 in rows whose target is not a kept id."""
    return grad if kept is None or grad is None else torch.where(logp == float("-inf"), 0.0, grad)


def check(
    logits: torch.Tensor,
    target: torch.Tensor,
    kept_ids: torch.Tensor,
    kept_offsets: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
) -> None:
    """Raise ValueError for target, temperature or kept ids out of range. Reads the values."""
    vocab = logits.shape[1]
    check_values(OP, target, vocab, mask, temperature)
    check_ids(kept_ids, row_of_each(kept_ids, kept_offsets), vocab, mask)


def check_ids(ids: torch.Tensor, rows: torch.Tensor, vocab: int, mask: torch.Tensor | None, op: str = OP) -> None:
    """Raise ValueError if, in a row where mask is True, a kept id is out of range or occurs twice."""
    if mask is not None:
        ids, rows = ids[mask[rows]], rows[mask[rows]]
    bad = (ids < 0) | (ids >= vocab)
    if bool(bad.any()):
        at = int(bad.to(torch.uint8).argmax())
        raise refuse(
            op,
            "kept_ids",
            f"in [0, {vocab}) in every row where mask is True",
            f"{int(ids[at])} in row {int(rows[at])}",
            "Pass vocabulary ids.",
        )
    key = (rows * vocab + ids).sort().values
    twice = key[1:] == key[:-1]
    if bool(twice.any()):
        at = int(key[int(twice.to(torch.uint8).argmax())])
        raise refuse(
            op,
            "kept_ids",
            "different from each other within a row",
            f"{at % vocab} twice in row {at // vocab}",
            "Remove the duplicate.",
        )
