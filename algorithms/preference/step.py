"""preference_step: loss, gradients and rewards of a preference loss, in one pass over the head."""

import torch

from tokfuse.algorithms.preference.base import PreferenceLoss
from tokfuse.algorithms.preference.batch import Layout, PreferenceBatch
from tokfuse.algorithms.preference.result import PreferenceStep
from tokfuse.algorithms.stateful import State
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.forward_gradients import Gradients
from tokfuse.runtime.core.logit_options import LogitOptions, check_logits
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head.problem import check_head, probed
from tokfuse.runtime.lm_head.units import UnitStats
from tokfuse.runtime.ops import influence as influence_op
from tokfuse.runtime.ops.influence import InfluenceSpec
from tokfuse.runtime.ops.token_stats import token_stats
from tokfuse.runtime.ops.unit_step import unit_step

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
    influence: InfluenceSpec | None = None,
) -> PreferenceStep:
    """Return the loss and gradients of a preference loss, from logits or from hidden states and the lm_head.

    loss = sum over pairs of loss_i(sums of logp of both responses) / normalizer. The derivative with respect to a logp
    is one number per sequence. It is known as soon as both responses have been read.

    Args:
        loss: a `PreferenceLoss`; `tokfuse.algorithms.make` returns one for a name of kind "preference".
        batch: the pairs, the mask and the reference.
        target: (tokens,) int64, in [0, vocab) where a token counts.
        logits: (tokens, vocab). None: use hidden and weight.
        hidden: (tokens, hidden), the last hidden states. None: use logits.
        weight: (vocab, hidden), the lm_head; may have another dtype than hidden (see `linear_token_stats`).
        bias: (vocab,), or None.
        state: state of `loss` (BCO). None: its initial state.
        normalizer: a number; "batch" for the number of pairs (unpaired: sequences) of this batch; None for the
            sum. With micro-batches or ranks, pass the global number of pairs, and set `batch.counts` if
            `loss.counts(batch)` is not empty.
        temperature: divisor of the logits, > 0: a number, or (tokens,) with one per row.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: factor of the logits before the cap (Cohere), > 0.
        memory_budget: from hidden only: bytes of workspace. None: the default of `linear_token_stats`, enlarged
            to fit the largest pair, at most 1 GiB.
        influence: also return gradient norms of every token and a sketch of every sequence in `step.influence`. Only
            from hidden. It computes grad_hidden even if hidden requires no gradient.

    Returns:
        PreferenceStep.

    Numerics:
        Log-probabilities as in `token_stats`; their sums and all later values in float64. The difference to
        `linear_token_stats` with autograd is float32 rounding. If a pair has no gradient (hinge beyond its margin),
        the gradient of its tokens is exactly zero.

    Gradients and memory:
        Gradients of logits, or of hidden, weight and bias if they require one. They are held until
        `loss.backward()`.

        From hidden, no (tokens, vocab) tensor exists. Both sides of a pair are in one chunk, whose logits are
        overwritten by their gradient: 6 T H V operations, or (2 + 4 f) T H V if a fraction f of the rows has a
        gradient. Pairs larger than memory_budget cost 2 T H V more (`read_twice`); so do batches larger than it if
        the loss couples all pairs (AOT). From logits: one read, then one read and one write.

        The call synchronises once to read the offsets of the pairs. The `reference` backend uses
        `linear_token_stats` with autograd, and so does a call inside torch.compile (with a graph break to read the
        offsets).

    Raises:
        ValueError: wrong shapes, dtypes or devices; neither or both of logits and hidden; a batch that lacks an input
            of the loss, or has one that it would ignore.

    Source: both sides of a pair in one chunk, as in Liger-Kernel's chunked_loss. Exact.
    """
    if not isinstance(loss, PreferenceLoss):
        raise TypeError(
            f"{OP}: loss must be a PreferenceLoss; got {type(loss).__name__}. Make one with tokfuse.algorithms.make."
        )
    loss.check(batch)
    loss.check_counts(batch, normalizer)
    state = loss.initial_state() if state is None else state
    layout = Layout(batch, loss.whole, loss.token_tail_weight)
    objective = loss.objective(batch, layout, state, _scale(normalizer, batch))
    options = LogitOptions(temperature, softcap, logit_scale, layout.counted).floats()
    _check_input(logits, hidden, weight, bias, memory_budget, influence)
    rows, twice = layout.units.order, 0
    gradients: Gradients = {}
    if logits is not None:
        _check_tokens(batch, logits)
        check_logits(OP, logits, target, options)
        stats = token_stats(
            logits, target, temperature=temperature, softcap=softcap, logit_scale=logit_scale, mask=layout.counted
        )
        value = objective(UnitStats(*(x[rows] for x in stats)), rows, 0, layout.last)
        value = value.to(stats.logp.dtype)
    else:
        assert hidden is not None
        _check_tokens(batch, hidden)
        problem = check_head(OP, hidden, weight, bias, target, options, memory_budget)
        if influence is not None:
            problem = influence_op.request(OP, influence, problem, batch.cu_seqlens)
        problem = probed(OP, problem, batch.cu_seqlens)
        value, stats, gradients, twice = unit_step(
            problem, layout.units, objective, own_budget=memory_budget is not None
        )
    of_gradient = None
    if influence is not None:
        of_gradient = influence_op.collect(influence, problem, gradients, batch.cu_seqlens)
    with torch.no_grad():
        stats = TokenStats(*(x.detach() for x in stats))
        sides = layout.sides(stats.logp[rows], stats.sum_sq[rows], rows, 0, layout.num_units)
        losses = loss.losses(sides, batch, state, slice(0, layout.num_units))
        rewards = tuple(loss.reward(side) for side in sides)
    return PreferenceStep(value, losses, rewards, stats, batch, twice, gradients, of_gradient)


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
    influence: InfluenceSpec | None,
) -> None:
    if (logits is None) == (hidden is None):
        given = "both" if logits is not None else "neither"
        raise refuse(OP, "input", "either logits= or hidden= with weight=", given, "Pass exactly one of the two.")
    if logits is not None:
        checks.check_unused(OP, "logits=", weight=weight, bias=bias, memory_budget=memory_budget, influence=influence)


def _check_tokens(batch: PreferenceBatch, rows: torch.Tensor) -> None:
    tokens = checks.require_tensor(OP, "logits or hidden", rows).shape[0]
    if batch.num_tokens != tokens:
        raise refuse(
            OP, "batch.num_tokens", f"{tokens}, the rows of the input", batch.num_tokens, "Pack one row per token."
        )
