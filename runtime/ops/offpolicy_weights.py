"""`tokfuse.offpolicy_weights`: importance weights between two policies, and which rows to keep."""

import math
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cpu_packed, cuda_packed, triton_packed
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import (
    BOOL,
    INTS,
    Rows,
    Runs,
    check_choice,
    check_cu_seqlens,
    check_number,
    check_optional,
    check_unused,
    check_vector,
    plain,
    working_dtype,
)
from tokfuse.runtime.core.codes import NORMALIZE, RULE_OVER, RULE_STATISTICS, WEIGHT_LEVELS, WEIGHT_MODES
from tokfuse.runtime.core.dispatch import backend_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.graph_ops import GraphForm, traceable
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.policy.keep_rule import KeepRule, check_order
from tokfuse.runtime.reference.offpolicy_weights import offpolicy_weights as reference

OP = "offpolicy_weights"
MAX_RULES = 8
# What each mode reads beside the ratio; every other number must be left out.
READS = {
    "truncate": ("low", "high"),
    "mask": ("low", "high"),
    "switch": ("high",),
    "shrink": ("lam",),
    "subgaussian": ("lam",),
    "tempered": ("power",),
}


class OffPolicyWeights(NamedTuple):
    """Result of `offpolicy_weights`, detached."""

    weight: torch.Tensor
    ess: torch.Tensor
    kept_mask: torch.Tensor


@ranged("offpolicy_weights.fwd")
def offpolicy_weights(
    logp: torch.Tensor | None,
    behavior_logp: torch.Tensor | None = None,
    *,
    propensity: torch.Tensor | None = None,
    level: str = "token",
    mode: str = "ips",
    low: float | None = None,
    high: float | None = None,
    lam: float | None = None,
    power: float | None = None,
    normalize: str | None = None,
    rules: tuple[KeepRule, ...] = (),
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    advantage: torch.Tensor | None = None,
) -> OffPolicyWeights:
    """Importance weights f(w) of logged rows, their effective sample size, and which rows to keep.

    With d = clamp(logp - behavior_logp, +-20), n the valid tokens of a sequence:

        level       w                            mode          f(w)
        token       exp(d)                       ips           w
        sequence    exp(clamp(sum d, +-20))      snips         w / mean(w)
        geometric   exp(sum d / n)               truncate      min(max(w, low), high)
        external    exp(d), one row a sample     mask          w, kept if low <= w <= high
                                                 switch        w if w <= high else 0
                                                 shrink        lam w / (w^2 + lam), <= sqrt(lam) / 2
                                                 subgaussian   w / (1 - lam + lam w), <= 1 / lam
                                                 tempered      w^power
                                                 keep          1: only the rules act

    Names in use elsewhere: TIS is "truncate" (token or sequence), token MIS / IcePop is "mask" at
    level token, sequence MIS is "mask" at level sequence with high=3, Geo-RS is "keep" with
    `KeepRule("ratio", "mean", 0.999, 1.001)`, OPSM is "keep" with `KeepRule("k1", "mean",
    high=delta, negative_only=True)` and the advantages.

    Args:
        logp: (tokens,), float, nats. Log-probability under the policy being trained (or its
            start-of-update copy). None with level "external": numerator 1, inv_normalizer propensity.
        behavior_logp: (tokens,), float, nats. Under the policy that produced the data.
        propensity: (tokens,), float in (0, 1]. Its probability instead of its logarithm. Exactly
            one of the two.
        level: unit of the weight, see the table; sequence weights are broadcast to their tokens.
        mode: see the table.
        low, high: absolute bounds on the ratio. "truncate" and "mask" need at least one, "switch"
            needs high.
        lam: shrinkage, > 0 for "shrink" (large: no shrinkage), in (0, 1] for "subgaussian".
        power: exponent of "tempered", in (0, 4]. Biased; below 1 it flattens the weights.
        normalize: divide by the mean weight over the units of this call ("batch") or of the prompt
            group ("group", needs group_ids); "none". A unit is a kept row, or for the sequence
            levels a sequence with a kept row. None: "none"; for "snips" "group" where group_ids are
            given, else "batch". Batches split over devices: leave "none", all-reduce, divide.
        rules: up to 8 `KeepRule`; a row must pass all. "sum", "mean", "max" need cu_seqlens.
        cu_seqlens: (seqs + 1,), int32. Needed by the sequence levels, sequence rules, and by groups
            (except level "external").
        mask: (tokens,), bool. True = counts. None: all count.
        group_ids: (seqs,), int. Prompt of each sequence (of each row for "external").
        advantage: (tokens,), float. Only for rules with negative_only.

    Returns:
        weight: (tokens,), float32 (float64 if an input is float64); 0 where not kept. Detached.
        ess: 0-dim. (sum w)^2 / sum w^2 over the units; 0 when there is none.
        kept_mask: (tokens,), bool. mask, minus rows that "mask" or a rule dropped. The denominator
            of the loss counts these rows: a dropped one that still counts biases the mean.
            Rows that "switch" sets to 0 stay kept: there the direct model covers them.

    Numerics:
        Sequence sums in float64, the native exp within 1e-6 relative; rows exactly at a bound may
        fall on either side of the float64 reference. A NaN row is kept, so that it shows, and
        poisons its sequence at sequence levels, the batch or group when normalised. Bitwise
        repeatable, whatever the number of threads. No rows: ess 0.

    Gradients and memory:
        No gradients. Two (tokens,) outputs; one pass, plus one when normalised.

    Examples:
        >>> logp, logged = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0])
        >>> tokfuse.offpolicy_weights(logp, logged, mode="truncate", high=2.0).weight
        tensor([1., 2.])

    Raises:
        ValueError: shapes, dtypes, unknown names, missing bounds, an option that would be ignored.

    Source:
        TIS, MIS, geometric filter, k1/k2/k3 rejection, batch normalisation: verl rollout
        correction; TRL and OpenRLHF defaults differ only in bounds: exact. OPSM: DeepSeek-V3.2 as
        in TRL: exact. SNIPS, switch, shrinkage, sub-Gaussian: zr-obp `estimators.py`: exact.
        tempered: analogue of policy-guided diffusion's tilted target.
    """
    mode, normalize = _resolve(mode, normalize, group_ids)
    check_choice(OP, "level", level, WEIGHT_LEVELS)
    _check_numbers(mode, low=low, high=high, lam=lam, power=power)
    target, behavior = _policies(logp, behavior_logp, propensity, level)
    num_rows, device = behavior.shape[0], behavior.device
    rows = Rows(num_rows, "the log-probabilities", device)
    check_optional(OP, "mask", mask, rows, BOOL)
    _check_rules(mode, rules, advantage, rows)
    _check_layout(level, rules, normalize, cu_seqlens, group_ids, num_rows, device)
    dtype = working_dtype(target, behavior)
    run = _RUNS[backend_of(OP, device.type, dtype)]
    return OffPolicyWeights(
        *run(
            plain(target, dtype),
            plain(behavior, dtype),
            level=level,
            mode=mode,
            low=low,
            high=high,
            lam=lam,
            power=power,
            normalize=normalize,
            rules=tuple(rules),
            cu_seqlens=plain(cu_seqlens),
            mask=plain(mask),
            group_ids=plain(group_ids, torch.int64),
            advantage=plain(advantage, dtype),
        )
    )


def _resolve(mode: str, normalize: str | None, group_ids: object) -> tuple[str, str]:
    """Mode without the "snips" alias, and a definite normalisation."""
    check_choice(OP, "mode", mode, (*WEIGHT_MODES, "snips"))
    if normalize is not None:
        check_choice(OP, "normalize", normalize, NORMALIZE)
    if mode != "snips":
        return mode, normalize or "none"
    if normalize == "none":
        want = "'batch' or 'group' with mode 'snips'"
        raise refuse(OP, "normalize", want, repr(normalize), "Without it, snips is 'ips'.")
    return "ips", normalize or ("batch" if group_ids is None else "group")


def _check_numbers(mode: str, **numbers: float | None) -> None:
    reads = READS.get(mode, ())
    unused = {name: value for name, value in numbers.items() if name not in reads}
    check_unused(OP, f"mode {mode!r}", **unused)
    given = {name: value for name, value in numbers.items() if value is not None}
    if reads and not given:
        raise refuse(OP, " or ".join(reads), f"given with mode {mode!r}", None, "See the table.")
    for name, value in given.items():
        top = {"power": 4.0}.get(name, math.inf)
        if mode == "subgaussian":
            top = 1.0
        check_number(OP, name, value, 0.0, top, open_low=name != "low")
    check_order(OP, numbers["low"], numbers["high"])


def _policies(
    logp: torch.Tensor | None, behavior_logp: torch.Tensor | None, propensity: torch.Tensor | None, level: str
) -> tuple[torch.Tensor | None, torch.Tensor]:
    if (behavior_logp is None) == (propensity is None):
        actual = "none" if propensity is None else "both"
        want = "given, exactly one of them"
        raise refuse(OP, "behavior_logp or propensity", want, actual, "Pass one.")
    name = "behavior_logp" if propensity is None else "propensity"
    behavior = check_vector(OP, name, behavior_logp if propensity is None else propensity)
    if logp is None:
        if level != "external":
            want = f"given with level {level!r}"
            raise refuse(OP, "logp", want, None, "Only level 'external' weighs by 1 / propensity.")
    else:
        check_vector(OP, "logp", logp, Rows(behavior.shape[0], name, behavior.device))
    if propensity is not None:
        behavior = behavior.detach().to(working_dtype(behavior)).log()
    return logp, behavior


def _check_rules(mode: str, rules: tuple[KeepRule, ...], advantage: torch.Tensor | None, rows: Rows) -> None:
    if not (isinstance(rules, tuple | list) and all(isinstance(rule, KeepRule) for rule in rules)):
        raise TypeError(f"{OP}: rules must be a tuple of KeepRule; got {rules!r}. Leave it out for none.")
    if len(rules) > MAX_RULES:
        raise refuse(OP, "rules", f"at most {MAX_RULES}", len(rules), "Intersect the masks.")
    if mode == "keep" and not rules:
        raise refuse(OP, "rules", "given with mode 'keep'", "none", "Every weight would be 1.")
    if any(rule.negative_only for rule in rules):
        if advantage is None:
            want = "given with a negative_only rule"
            raise refuse(OP, "advantage", want, None, "Pass one per token.")
        check_vector(OP, "advantage", advantage, rows)
    else:
        check_unused(OP, "rules without negative_only", advantage=advantage)


def _check_layout(
    level: str,
    rules: tuple[KeepRule, ...],
    normalize: str,
    cu_seqlens: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    num_rows: int,
    device: torch.device,
) -> None:
    if level == "external":
        check_unused(OP, "level 'external'", cu_seqlens=cu_seqlens)
    num_seqs = num_rows
    if cu_seqlens is not None:
        num_seqs = check_cu_seqlens(OP, cu_seqlens, num_rows, device)
    else:
        whole = any(rule.over != "token" for rule in rules) or level in ("sequence", "geometric")
        if whole or (normalize == "group" and level != "external"):
            user = f"level {level!r}" if not whole or not rules else "a sequence level or rule"
            want = f"given with {user}"
            raise refuse(OP, "cu_seqlens", want, None, "Pass the borders of the sequences.")
    if normalize != "group":
        check_unused(OP, f"normalize {normalize!r}", group_ids=group_ids)
    elif group_ids is None:
        raise refuse(OP, "group_ids", "given with normalize 'group'", None, "Pass prompt indices.")
    else:
        partner = "the rows" if level == "external" else "cu_seqlens"
        check_vector(OP, "group_ids", group_ids, Rows(num_seqs, partner, device), INTS)


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    rules = options["rules"]
    codes = [
        (RULE_STATISTICS.index(r.statistic) * len(RULE_OVER) + RULE_OVER.index(r.over)) * 2 + r.negative_only
        for r in rules
    ]
    bounds = []
    for rule in rules:
        bounds.append(-math.inf if rule.low is None else rule.low)
        bounds.append(math.inf if rule.high is None else rule.high)
    return options | {"rules": codes, "bounds": bounds}


def _rich(options: dict[str, Any]) -> dict[str, Any]:
    bounds, rules = options.pop("bounds"), []
    for i, code in enumerate(options["rules"]):
        statistic, over = divmod(code // 2, len(RULE_OVER))
        low, high = (None if math.isinf(x) else x for x in bounds[2 * i : 2 * i + 2])
        rules.append(KeepRule(RULE_STATISTICS[statistic], RULE_OVER[over], low, high, bool(code % 2)))
    return options | {"rules": tuple(rules)}


_FORM = GraphForm(
    "(Tensor? logp, Tensor behavior, *, str level, str mode, float? low, float? high, float? lam,"
    " float? power, str normalize, int[] rules, float[] bounds, Tensor? cu_seqlens, Tensor? mask,"
    " Tensor? group_ids, Tensor? advantage) -> (Tensor, Tensor, Tensor)",
    lambda logp, behavior, **_: (
        torch.empty_like(behavior),
        behavior.new_empty(()),
        torch.empty_like(behavior, dtype=torch.bool),
    ),
    _flat,
    _rich,
)
# By name, because torch.compile can follow a module's table but not a record of the registry.
_RUNS: Runs = {
    "cuda": traceable(OP, "cuda", cuda_packed.offpolicy_weights, _FORM),
    "triton": traceable(OP, "triton", triton_packed.offpolicy_weights, _FORM),
    "cpu": traceable(OP, "cpu", cpu_packed.offpolicy_weights, _FORM),
    "reference": reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32}))
register_triton(OP, _RUNS["triton"], frozenset({torch.float32, torch.float64}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32}))
register_reference(OP, _RUNS["reference"])
