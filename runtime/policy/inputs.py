"""The inputs of an objective: their record, their checks, and their form for kernels on a device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core import checks, native
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.graph_ops import graph_number
from tokfuse.runtime.policy.objective import Objective

Normalizer = float | int | str | torch.Tensor | None


class PolicyInputs(NamedTuple):
    """Per-token inputs of an objective. They carry no gradient. None means that the term is absent.

    If old_logp is None, the update is on policy: the old policy is the current one, and every ratio is 1.
    """

    old_logp: torch.Tensor | None
    advantage: torch.Tensor
    advantage_level: str = "token"
    mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    token_weight: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    kl_weight: torch.Tensor | None = None
    entropy_weight: torch.Tensor | None = None
    anchor_logp: torch.Tensor | None = None
    anchor_weight: torch.Tensor | None = None


# ----------------------------------------------------------------------------------------- checks


def check_logp(op: str, logp: torch.Tensor, entropy: torch.Tensor | None) -> None:
    """Raise an error unless `logp` and `entropy`, the two differentiable inputs, are valid vectors."""
    checks.require_tensor(op, "logp", logp)
    if logp.dim() != 1 or not logp.dtype.is_floating_point:
        raise refuse(
            op,
            "logp",
            "a floating-point vector of shape (tokens,)",
            f"{tuple(logp.shape)} {logp.dtype}",
            "Call logp[mask], or logp.flatten() with a mask.",
        )
    checks.check_main(op, "logp", logp)
    rows = checks.Rows(logp.shape[0], "logp", logp.device)
    checks.check_optional(op, "entropy", entropy, rows)


def check_inputs(
    op: str, inputs: PolicyInputs, objective: Objective, tokens: int, device: torch.device, has_entropy: bool
) -> None:
    """Raise an error if an input has a wrong shape, is missing, or would be ignored by the objective."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{op}: objective must be a tokfuse.Objective; got {type(objective).__name__}. "
            "Pass, for example, Objective(shape=PPOClip(low=0.2, high=0.28))."
        )
    if inputs.advantage_level not in ("token", "sequence"):
        raise refuse(
            op, "advantage_level", "'token' or 'sequence'", repr(inputs.advantage_level), "Pass one of the two."
        )
    rows = checks.Rows(tokens, "the tokens", device)
    checks.check_optional(op, "mask", inputs.mask, rows, checks.BOOL)
    per_sequence = inputs.advantage_level == "sequence"
    if inputs.cu_seqlens is not None:
        checks.check_cu_seqlens(op, inputs.cu_seqlens, tokens, device)
    elif objective.needs_sequences or per_sequence or objective.counts_sequences:
        why = (
            "advantage_level='sequence'"
            if per_sequence
            else (f"level={objective.level!r}, aggregation={objective.aggregation!r}")
        )
        raise refuse(op, "cu_seqlens", f"given for {why}", "None", "Pass the packing offsets (seqs + 1,) int32.")
    units = rows
    if per_sequence:
        assert inputs.cu_seqlens is not None
        units = checks.Rows(inputs.cu_seqlens.shape[0] - 1, "cu_seqlens", device)
    checks.check_constant_vector(op, "advantage", inputs.advantage, units)
    for name in ("old_logp", *VECTORS[2:]):
        value = getattr(inputs, name)
        if value is not None:
            checks.check_constant_vector(op, name, value, rows)
    _check_used(op, inputs, objective, has_entropy)


def _check_used(op: str, inputs: PolicyInputs, o: Objective, has_entropy: bool) -> None:
    o.shape.check_signal(op, inputs.signal is not None)
    needs = [
        ("kl_weight", None, inputs.kl_weight is not None and o.kl is None, "kl=None"),
        ("ref_logp", o.kl is not None, inputs.ref_logp is not None, "a KL term"),
        ("anchor_weight", None, inputs.anchor_weight is not None and o.anchor is None, "anchor=None"),
        ("anchor_logp", o.anchor is not None, inputs.anchor_logp is not None, "an anchor term"),
        ("anchor_logp", None, inputs.anchor_logp is not None and o.anchor is None, "anchor=None"),
        ("entropy", o.entropy_coef != 0.0, has_entropy, "an entropy bonus"),
        ("entropy_weight", None, inputs.entropy_weight is not None and o.entropy_coef == 0.0, "entropy_coef=0"),
    ]
    for name, needed, given, what in needs:
        if needed and not given:
            raise refuse(op, name, f"given for {what}", "None", "Pass one value per token.")
        if needed is None and given:
            raise refuse(op, name, f"None with {what}", "a tensor", "Remove it: it would have no effect.")


def check_sampler(op: str, sampler_logp: torch.Tensor | None, tokens: int, device: torch.device) -> None:
    """Raise an error unless `sampler_logp`, the rollout engine's log-probabilities, is None or (tokens,)."""
    if sampler_logp is not None:
        rows = checks.Rows(tokens, "the tokens", device)
        checks.check_constant_vector(op, "sampler_logp", sampler_logp, rows)


def inverse_normalizer(op: str, normalizer: Normalizer, objective: Objective) -> float:
    """Return `inverse_of`. Raise an error for "batch" with a sum over tokens, which has no count."""
    if isinstance(normalizer, str) and normalizer == "batch" and objective.aggregation == "token_sum":
        raise refuse(
            op,
            "normalizer",
            "a number with aggregation='token_sum'",
            "'batch'",
            "Pass sequences * max length, as Dr.GRPO does.",
        )
    return inverse_of(op, normalizer)


def inverse_of(op: str, normalizer: Normalizer) -> float:
    """Return 1 / normalizer. The result is 1.0 for None, and -1.0 for "batch" (the count of this batch).

    Inside torch.compile the result is a `graph_ops.Number` if the normalizer is a tensor, or a number that
    changes between calls. A tensor whose value is not positive and finite gives NaN.
    """
    if normalizer is None:
        return 1.0
    if isinstance(normalizer, str):
        if normalizer != "batch":
            raise refuse(
                op,
                "normalizer",
                "None, a number, a 0-dim tensor or 'batch'",
                repr(normalizer),
                "Pass the global token or sequence count.",
            )
        return -1.0
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            raise refuse(
                op, "normalizer", "a 0-dim tensor", f"shape {tuple(normalizer.shape)}", "Pass one global count."
            )
        checks.check_dtype(op, "normalizer", normalizer, checks.FLOATS | checks.INTS)
        checks.check_constant(op, "normalizer", normalizer)
        if torch.compiler.is_compiling():
            count = normalizer.detach().reshape(()).double().cpu()
            return torch.where((count > 0) & count.isfinite(), 1.0 / count, torch.nan)  # type: ignore[return-value]
        normalizer = float(normalizer)
    number = checks.check_number(op, "normalizer", normalizer, 0.0, open_low=True)
    if torch.compiler.is_compiling():
        return 1.0 / graph_number(normalizer)  # type: ignore[return-value]
    return 1.0 / number


def may_carry_gradient(x: Any, objective: Objective) -> torch.Tensor | None:
    """Return False for tokens whose coefficient is 0 for all logits, (tokens,) bool. None means all True.

    The common case is an advantage of zero, often for whole groups. Rows that the clip will stop are not
    known yet, so they are True. `x` contains the per-token inputs of the objective.
    """
    if not objective.shape.zero_without_advantage:
        return None
    terms = [x.advantage != 0 if x.token_weight is None else (x.advantage != 0) & (x.token_weight != 0)]
    for coef, weight in (
        (0.0 if objective.kl is None else objective.kl.coef, x.kl_weight),
        (0.0 if objective.anchor is None else objective.anchor.coef, x.anchor_weight),
        (objective.entropy_coef, x.entropy_weight),
    ):
        if coef != 0.0 and weight is None:
            return None
        if coef != 0.0:
            terms.append(weight != 0)
    return torch.stack(terms).any(0)


# ------------------------------------------------------------------------------- device kernels

# (cu_seqlens, mask, tokens, seq_mean, seq_advantage) -> counts (seqs,) int32, aggregation weights
# (tokens,) or None, advantages (tokens,) or None. Runs on the device; the host reads no value.
Prepare = Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
# (mask, (tokens,) vector, counts or None: count tokens) -> 1 / count of this batch, () float32. Does not synchronise.
Count = Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor | None], torch.Tensor]
OPTIONAL_VECTORS = ("token_weight", "signal", "ref_logp", "kl_weight", "entropy_weight", "anchor_logp", "anchor_weight")
VECTORS = ("old_logp", "advantage", *OPTIONAL_VECTORS)


class DeviceInputs(NamedTuple):
    """The inputs of an objective for kernels that see one token at a time."""

    vectors: dict[str, torch.Tensor | None]
    """The inputs named in `VECTORS`, (tokens,) float32. At a sequence level the advantage may be per sequence."""
    mask: torch.Tensor | None
    agg_weight: torch.Tensor | None
    """(tokens,) aggregation weight before the normaliser. None means 1."""
    inv_normalizer: float | torch.Tensor
    """1 / normaliser; a () float32 tensor if the normaliser is the count of this batch."""
    counts: torch.Tensor | None
    """(seqs,) int32, valid tokens of each sequence."""


def per_token(
    i: PolicyInputs, objective: Objective, inv_normalizer: float, prepare: Prepare, count: Count
) -> DeviceInputs:
    """Convert the inputs to float32 vectors and spread what belongs to sequences over their tokens.

    A row kernel sees one token. The aggregation weight and the advantage of its sequence are therefore
    given as vectors. They are computed on the device, without synchronisation.
    """
    old_logp = i.old_logp
    assert old_logp is not None  # on policy, the callers pass the current logp
    vectors = {name: native.float_vector(getattr(i, name)) for name in VECTORS}
    mask = None if i.mask is None else i.mask.contiguous()
    counts, agg_weight = None, None
    at_tokens = objective.level == "token"
    if i.cu_seqlens is not None and (at_tokens or inv_normalizer < 0):
        hand_out = at_tokens and i.advantage_level == "sequence"
        counts, agg_weight, advantage = prepare(
            i.cu_seqlens.contiguous(),
            mask,
            old_logp.shape[0],
            seq_mean=at_tokens and bool(objective.record.seq_mean),
            seq_advantage=vectors["advantage"] if hand_out else None,
        )
        if hand_out:
            vectors["advantage"] = advantage
    given: float | torch.Tensor = inv_normalizer
    if inv_normalizer < 0:
        given = count(mask, old_logp, counts if objective.counts_sequences else None)
    return DeviceInputs(vectors, mask, agg_weight, given, counts)


def batch_inv_normalizer(mask: torch.Tensor | None, rows: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Return 1 / the count of this batch, 0 if no token is valid; a `Count` by operations of torch."""
    if counts is not None:
        count = (counts > 0).sum()
    elif mask is not None:
        count = mask.sum()
    else:
        count = torch.full((), rows.shape[0], device=rows.device)
    return torch.where(count > 0, 1.0 / count.clamp(min=1).double(), 0.0).float()
