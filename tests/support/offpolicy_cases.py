"""Compute offpolicy_weights row by row in Python floats, as the expected values of the tests."""

import math

SEQUENCE_LEVELS = ("sequence", "geometric")


def clamp(x):
    return max(-20.0, min(20.0, x))


def transformed(w, mode, low=None, high=None, lam=None, power=None):
    if mode == "truncate":
        w = w if low is None else max(w, low)
        return w if high is None else min(w, high)
    if mode == "switch":
        return w if w <= high else 0.0
    if mode == "shrink":
        return lam * w / (w * w + lam)
    if mode == "subgaussian":
        return w / (1 - lam + lam * w)
    if mode == "tempered":
        return w**power
    return 1.0 if mode == "keep" else w


def statistic(rule, d, row, places):
    """Return the value that the rule tests for one row; `places` are the valid rows of its sequence."""
    if rule.statistic == "ratio":
        reduced = {
            "token": lambda: d[row],
            "sum": lambda: sum(d[i] for i in places),
            "mean": lambda: sum(d[i] for i in places) / len(places),
            "max": lambda: max(d[i] for i in places),
        }[rule.over]()
        return math.exp(clamp(reduced))
    per_row = {"k1": lambda x: -x, "k2": lambda x: 0.5 * x * x, "k3": lambda x: math.exp(x) - 1 - x}[rule.statistic]
    values = [per_row(d[i]) for i in places]
    if rule.over == "token":
        return per_row(d[row])
    return {"sum": sum, "max": max, "mean": lambda v: sum(v) / len(v)}[rule.over](values)


def expected(
    d,
    *,
    level="token",
    mode="ips",
    cu=None,
    mask=None,
    rules=(),
    normalize="none",
    group_ids=None,
    advantage=None,
    near=1e-5,
    **numbers,
):
    """Return (weight, ess, kept), or None if a statistic is within `near` of a bound."""
    d = [clamp(x) for x in d]
    cu = list(range(len(d) + 1)) if cu is None else cu
    mask = [True] * len(d) if mask is None else mask
    weight, kept, units = [0.0] * len(d), [False] * len(d), []
    for s in range(len(cu) - 1):
        places = [i for i in range(cu[s], cu[s + 1]) if mask[i]]
        counted = False
        for i in places:
            log_w = d[i]
            if level in SEQUENCE_LEVELS:
                log_w = clamp(sum(d[j] for j in places))
                if level == "geometric":
                    log_w = sum(d[j] for j in places) / len(places)
            w = math.exp(log_w)
            tests = [(w, numbers.get("low"), numbers.get("high"), False)] if mode == "mask" else []
            tests += [(statistic(r, d, i, places), r.low, r.high, r.negative_only) for r in rules]
            kept[i] = True
            for value, low, high, negative_only in tests:
                for bound in (low, high):
                    if bound is not None and abs(value - bound) <= near * (1 + abs(bound)):
                        return None
                inside = (low is None or value >= low) and (high is None or value <= high)
                kept[i] &= inside or (negative_only and advantage[i] >= 0)
            if mode == "switch" and abs(w - numbers["high"]) <= near:
                return None
            if kept[i]:
                weight[i] = transformed(w, mode, **numbers)
                if level not in SEQUENCE_LEVELS or not counted:
                    units.append((i, s))
                    counted = True
    if normalize != "none":
        seq_of = [s for s in range(len(cu) - 1) for _ in range(cu[s], cu[s + 1])]
        name = (lambda s: 0) if normalize == "batch" else (lambda s: group_ids[s])
        means = {}
        for key in {name(s) for _, s in units}:
            values = [weight[i] for i, s in units if name(s) == key]
            means[key] = sum(values) / len(values)
        for i in range(len(d)):
            mean = means.get(name(seq_of[i]), 0.0)
            weight[i] = weight[i] / mean if kept[i] and mean else 0.0
    total = sum(weight[i] for i, _ in units)
    square = sum(weight[i] ** 2 for i, _ in units)
    return weight, (total * total / square if square else 0.0), kept
