"""preference_step: loss, gradients and rewards of a preference loss, in one pass over the head."""

import torch

from tokfuse.algorithms.preference.base import PreferenceLoss
from tokfuse.algorithms.preference.batch import Layout, PreferenceBatch
from tokfuse.algorithms.preference.result import PreferenceStep
from tokfuse.algorithms.stateful import State
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import LogitOptions, check_logits
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head.problem import check_head
from tokfuse.runtime.ops.token_stats import token_stats
from tokfuse.runtime.ops.unit_step import unit_step
from tokfuse.runtime.policy.results import Gradients

OP = "preference_step"


def preference_step(
    *,
    loss: PreferenceLoss,
    batch: PreferenceBatch,
    target: torch.Tensor,
    logits: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    state: State | None = None,
    normalizer: float | str | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
) -> PreferenceStep:
    """Loss and gradients of a preference loss, from logits or from hidden states and the lm_head.

    loss = sum over pairs of loss_i(sums of logp of both responses) / normalizer. The derivative by
    a logp is one number per sequence, known once both sides have been read.

    Args:
        loss: what `tokfuse.algorithms.make` gives for a name of kind "preference".
        batch: the pairs, the mask and the reference.
        target: (tokens,) int64, in [0, vocab) where a token counts.
        logits: (tokens, vocab); or leave it None and pass
        hidden: (tokens, hidden) and
        weight: (vocab, hidden), the lm_head, with
        bias: (vocab,) or None. Same dtype and device.
        state: of `loss`, for BCO. None: its first.
        normalizer: a number, "batch" for the pairs (unpaired: sequences) of this batch, or None for
            the sum. Over micro-batches and ranks pass the global number of pairs.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        memory_budget: from hidden only: bytes of workspace. None: that of `linear_token_stats`,
            grown to the largest pair, at most 1 GiB.

    Returns:
        PreferenceStep.

    Numerics: log-probabilities as `token_stats`; sums of them and everything after in float64.
        Against the composition of `linear_token_stats` and autograd: float32 rounding. A token of a
        pair without gradient (hinge beyond its margin) has exactly zero gradient.

    Gradients and memory: logits, or hidden, weight and bias where they ask. From hidden no (tokens,
        vocab) tensor: both sides of a pair are in one chunk, whose logits become their gradient in
        place: 6 T H V operations, (2 + 4 f) T H V with a fraction f of rows with gradient. Pairs
        larger than memory_budget, and batches of losses that couple all pairs (AOT) that are, cost
        2 T H V more (`read_twice`). The gradients are held until `loss.backward()`. From logits:
        one read, then one read and one write. The host reads the borders of the pairs once.
        The `reference` backend takes `linear_token_stats` and autograd, and so does a call that
        torch.compile traces (with a graph break for the borders).

    Raises:
        ValueError: shapes, dtypes, devices; neither or both of logits and hidden; a batch that
            lacks what the loss reads, or has what it would ignore.

    Source: both sides of a pair in one chunk as in Liger-Kernel's chunked_loss. Exact.
    """
    if not isinstance(loss, PreferenceLoss):
        raise TypeError(
            f"{OP}: loss must be a PreferenceLoss; got {type(loss).__name__}. Make one with tokfuse.algorithms.make."
        )
    loss.check(batch)
    state = loss.initial_state() if state is None else state
    layout = Layout(batch, loss.whole, loss.token_tail_weight)
    objective = loss.objective(batch, layout, state, _scale(normalizer, batch))
    options = LogitOptions(temperature, softcap, logit_scale, layout.counted)
    _check_input(logits, hidden, weight, bias, memory_budget)
    rows, twice = layout.units.order, 0
    gradients: Gradients = {}
    if logits is not None:
        _check_tokens(batch, logits)
        check_logits(OP, logits, target, options)
        stats = token_stats(
            logits, target, temperature=temperature, softcap=softcap, logit_scale=logit_scale, mask=layout.counted
        )
        value = objective(TokenStats(*(x[rows] for x in stats)), rows, 0, layout.last)
        value = value.to(stats.logp.dtype)
    else:
        assert hidden is not None
        _check_tokens(batch, hidden)
        problem = check_head(OP, hidden, weight, bias, target, options, memory_budget)
        value, stats, gradients, twice = unit_step(
            problem, layout.units, objective, own_budget=memory_budget is not None
        )
    with torch.no_grad():
        stats = TokenStats(*(x.detach() for x in stats))
        sides = layout.sides(stats.logp[rows], stats.sum_sq[rows], rows, 0, layout.num_units)
        losses = loss.losses(sides, batch, state, slice(0, layout.num_units))
        rewards = tuple(loss.reward(side) for side in sides)
    return PreferenceStep(value, losses, rewards, stats, batch, twice, gradients)


def _scale(normalizer: float | str | None, batch: PreferenceBatch) -> float:
    if normalizer is None:
        return 1.0
    if isinstance(normalizer, str):
        if normalizer != "batch":
            raise refuse(
                OP, "normalizer", 'None, a number or "batch"', repr(normalizer), "Pass the global number of pairs."
            )
        return 1.0 / max(1, batch.num_units)
    return 1.0 / check_number(OP, "normalizer", normalizer, 0.0, open_low=True)


def _check_input(
    logits: torch.Tensor | None,
    hidden: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    memory_budget: int | None,
) -> None:
    if (logits is None) == (hidden is None):
        given = "both" if logits is not None else "neither"
        raise refuse(OP, "input", "either logits= or hidden= with weight=", given, "Pass one.")
    if logits is not None:
        checks.check_unused(OP, "logits=", weight=weight, bias=bias, memory_budget=memory_budget)


def _check_tokens(batch: PreferenceBatch, rows: torch.Tensor) -> None:
    tokens = checks.require_tensor(OP, "logits or hidden", rows).shape[0]
    if batch.num_tokens != tokens:
        raise refuse(
            OP, "batch.num_tokens", f"{tokens}, the rows of the input", batch.num_tokens, "Pack one row per token."
        )
