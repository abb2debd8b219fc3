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
    number,
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
# The numbers that each mode reads in addition to the ratio. Every other number must be None.
READS = {
    "truncate": ("low", "high"),
    "mask": ("low", "high"),
    "switch": ("high",),
    "shrink": ("lam",),
    "subgaussian": ("lam",),
    "tempered": ("power",),
}


class OffPolicyWeights(NamedTuple):
    """Result of `offpolicy_weights`. Detached."""

    weight: torch.Tensor
    """(tokens,), importance weight of each row; 0 for rows that are not kept."""
    ess: torch.Tensor
    """(), effective sample size."""
    kept_mask: torch.Tensor
    """(tokens,) bool, True for kept rows."""


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
    """Return importance weights f(w) of logged rows, their effective sample size, and the mask of kept rows.

    With d = clamp(logp - behavior_logp, +-20) and n valid tokens in a sequence:

        level       w                            mode          f(w)
        token       exp(d)                       ips           w
        sequence    exp(clamp(sum d, +-20))      snips         w / mean(w)
        geometric   exp(sum d / n)               truncate      min(max(w, low), high)
        external    exp(d), one row per sample   mask          w, kept if low <= w <= high
                                                 switch        w if w <= high else 0
                                                 shrink        lam w / (w^2 + lam), <= sqrt(lam) / 2
                                                 subgaussian   w / (1 - lam + lam w), <= 1 / lam
                                                 tempered      w^power
                                                 keep          1; only the rules apply

    Names in other libraries: TIS is "truncate" (level "token" or "sequence"). Token MIS and IcePop are
    "mask" at level "token". Sequence MIS is "mask" at level "sequence" with high=3. Geo-RS is "keep" with
    `KeepRule("ratio", "mean", 0.999, 1.001)`. OPSM is "keep" with `KeepRule("k1", "mean", high=delta,
    negative_only=True)` and the advantages.

    Args:
        logp: (tokens,), float, nats. Log-probability under the trained policy, or under its copy at the
            start of the update. None, allowed with level "external" only: the weight is 1 / propensity.
        behavior_logp: (tokens,), float, nats. Log-probability under the policy that produced the data.
        propensity: (tokens,), float in (0, 1]. Probability under the policy that produced the data. Pass
            either behavior_logp or propensity.
        level: unit of the weight: "token", "sequence", "geometric" or "external", see the table. Weights
            of a sequence are broadcast to its tokens.
        mode: function f of the weight: "ips", "snips", "truncate", "mask", "switch", "shrink",
            "subgaussian", "tempered" or "keep", see the table.
        low, high: absolute bounds on the ratio. "truncate" and "mask" need at least one of them,
            "switch" needs high.
        lam: shrinkage, > 0 for "shrink" (a large value means no shrinkage), in (0, 1] for "subgaussian".
        power: exponent of "tempered", in (0, 4]. The estimate is biased. A power below 1 makes the
            weights more equal.
        normalize: divisor of the weights: "none"; "batch", the mean weight over the units of this call;
            or "group", the mean over the units of the prompt group (needs group_ids). A unit is a kept
            row, or, at the levels "sequence" and "geometric", a sequence with a kept row. None: "none";
            with mode "snips" it is "group" if group_ids is given, and "batch" otherwise. For a batch
            that is split over devices, use "none", all-reduce the mean and divide by it.
        rules: up to 8 `KeepRule`. A kept row passes all of them. Rules over "sum", "mean" or "max" need
            cu_seqlens.
        cu_seqlens: (seqs + 1,), int32 packing offsets. Needed by the levels "sequence" and "geometric",
            by rules over sequences, and by normalize="group" (except at level "external").
        mask: (tokens,), bool. True = counts. None: all rows count.
        group_ids: (seqs,), int. Prompt of each sequence (of each row at level "external").
        advantage: (tokens,), float. Used only by rules with negative_only.

    Returns:
        weight: (tokens,), float32 (float64 if an input is float64); 0 for rows that are not kept.
            Detached.
        ess: 0-dim. (sum w)^2 / sum w^2 over the units; 0 without a unit.
        kept_mask: (tokens,), bool. The mask without the rows that mode "mask" or a rule dropped. Count
            only these rows in the denominator of the loss: counting a dropped row biases the mean.
            Rows that "switch" sets to 0 stay kept, because there the direct model covers them.

    Numerics:
        Sums over sequences are float64. The native exp has a relative error <= 1e-6, so for a row exactly
        at a bound the decision may differ from the float64 reference. A NaN row is kept, so that it
        stays visible. It makes its sequence NaN at the sequence levels, and the batch or group NaN with
        normalize. Results are bitwise repeatable for any number of threads. Zero rows give ess 0.

    Gradients and memory:
        No gradients. Two (tokens,) outputs. One pass, and a second one with normalize.

    Examples:
        >>> logp, logged = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0])
        >>> tokfuse.offpolicy_weights(logp, logged, mode="truncate", high=2.0).weight
        tensor([1., 2.])

    Raises:
        ValueError: wrong shape or dtype, an unknown name, a missing bound, an option that would be ignored.

    Source:
        TIS, MIS, geometric filter, k1/k2/k3 rejection, batch normalisation: verl rollout
        correction, exact; the defaults of TRL and OpenRLHF differ only in bounds. OPSM: DeepSeek-V3.2 as
        in TRL, exact. SNIPS, switch, shrinkage, sub-Gaussian: zr-obp `estimators.py`, exact.
        tempered: analogue of the tilted target of policy-guided diffusion.
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
            low=number(low),
            high=number(high),
            lam=number(lam),
            power=number(power),
            normalize=normalize,
            rules=tuple(rules),
            cu_seqlens=plain(cu_seqlens),
            mask=plain(mask),
            group_ids=plain(group_ids, torch.int64),
            advantage=plain(advantage, dtype),
        )
    )


def _resolve(mode: str, normalize: str | None, group_ids: object) -> tuple[str, str]:
    """Return (mode, normalize), with the alias "snips" and the default of normalize replaced."""
    check_choice(OP, "mode", mode, (*WEIGHT_MODES, "snips"))
    if normalize is not None:
        check_choice(OP, "normalize", normalize, NORMALIZE)
    if mode != "snips":
        return mode, normalize or "none"
    if normalize == "none":
        want = "'batch' or 'group' with mode 'snips'"
        raise refuse(OP, "normalize", want, repr(normalize), "Use mode 'ips' for weights without normalisation.")
    return "ips", normalize or ("batch" if group_ids is None else "group")


def _check_numbers(mode: str, **numbers: float | None) -> None:
    reads = READS.get(mode, ())
    unused = {name: value for name, value in numbers.items() if name not in reads}
    check_unused(OP, f"mode {mode!r}", **unused)
    given = {name: value for name, value in numbers.items() if value is not None}
    if reads and not given:
        raise refuse(OP, " or ".join(reads), f"given with mode {mode!r}", None, "Pass a number.")
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
        raise refuse(OP, "behavior_logp or propensity", want, actual, "Pass one of the two.")
    name = "behavior_logp" if propensity is None else "propensity"
    behavior = check_vector(OP, name, behavior_logp if propensity is None else propensity)
    if logp is None:
        if level != "external":
            want = f"given with level {level!r}"
            raise refuse(OP, "logp", want, None, "Pass it, or use level 'external' for weights 1 / propensity.")
    else:
        check_vector(OP, "logp", logp, Rows(behavior.shape[0], name, behavior.device))
    if propensity is not None:
        behavior = behavior.detach().to(working_dtype(behavior)).log()
    return logp, behavior


def _check_rules(mode: str, rules: tuple[KeepRule, ...], advantage: torch.Tensor | None, rows: Rows) -> None:
    if not (isinstance(rules, tuple | list) and all(isinstance(rule, KeepRule) for rule in rules)):
        raise TypeError(f"{OP}: rules must be a tuple of KeepRule; got {rules!r}. Pass () for no rules.")
    if len(rules) > MAX_RULES:
        raise refuse(OP, "rules", f"at most {MAX_RULES}", len(rules), "Call twice and combine the masks with &.")
    if mode == "keep" and not rules:
        raise refuse(OP, "rules", "given with mode 'keep'", "none", "Pass a rule, or every weight would be 1.")
    if any(rule.negative_only for rule in rules):
        if advantage is None:
            want = "given with a negative_only rule"
            raise refuse(OP, "advantage", want, None, "Pass one value per token.")
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
            raise refuse(OP, "cu_seqlens", want, None, "Pass the packing offsets (seqs + 1,) int32.")
    if normalize != "group":
        check_unused(OP, f"normalize {normalize!r}", group_ids=group_ids)
    elif group_ids is None:
        raise refuse(OP, "group_ids", "given with normalize 'group'", None, "Pass the prompt index of every sequence.")
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
    "(Tensor? logp, Tensor behavior_logp, *, str level, str mode, float? low, float? high, float? lam,"
    " float? power, str normalize, int[] rules, float[] bounds, Tensor? cu_seqlens, Tensor? mask,"
    " Tensor? group_ids, Tensor? advantage) -> (Tensor, Tensor, Tensor)",
    lambda logp, behavior_logp, **_: (
        torch.empty_like(behavior_logp),
        behavior_logp.new_empty(()),
        torch.empty_like(behavior_logp, dtype=torch.bool),
    ),
    _flat,
    _rich,
)
# A dict by name, because torch.compile can trace a lookup in a module's dict, but not a record of the registry.
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
