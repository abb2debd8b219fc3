"""Performance targets of the ops, checked with rows of one machine.

    python -m tokfuse bench policy_step --json rows.jsonl
    python -m tokfuse bench targets rows.jsonl

A `Target` is the smallest speedup over a peer. A `Ceiling` is the largest time relative to a base. A
`Floor` is the smallest share of the machine's limit. A `Budget` is the largest memory beyond the results.
Each is checked for every shape and dtype in the rows. A `Target` uses the faster variant of a peer (in the
input's dtype, or after .float()). Only rows with status "pass" are used.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tokfuse.bench.row import Row
from tokfuse.bench.verdict import Verdict


@dataclass(frozen=True)
class Target:
    """`peer` must take at least `times` as long as `ours`."""

    op: str
    mode: str
    variant: str
    ours: str
    peer: str
    times: float


@dataclass(frozen=True)
class Ceiling:
    """`ours` may take at most `times` as long as the first provider of `base` that was measured."""

    op: str
    mode: str
    variant: str
    ours: str
    base: tuple[str, ...]
    times: float


@dataclass(frozen=True)
class Floor:
    """`ours` must reach this share of its limit."""

    op: str
    mode: str
    variant: str
    ours: str
    share: float


@dataclass(frozen=True)
class Budget:
    """`ours` may use at most this many bytes in addition to its results."""

    op: str
    mode: str
    variant: str
    ours: str
    workspace_bytes: int


Goal = Target | Ceiling | Floor | Budget
COMPILED, EAGER = "torch_compile", "torch_eager"
BOTH = "entropy=0.01"

HIDDEN = ("policy_step_hidden", "step")
HIDDEN_PEERS = (EAGER, COMPILED, "trl", "liger", "liger_compile", "verl", "cut_cross_entropy")
GEMMS = ("limit_gemm3", "limit_gemm")  # the three full products, for variants that need fewer

TARGETS: tuple[Goal, ...] = (
    Target("policy_step", "step", BOTH, "tokfuse_", COMPILED, 6.0),
    Target("policy_step", "step", BOTH, "tokfuse_", EAGER, 20.0),
    Target("policy_step", "step", BOTH, "tokfuse", COMPILED, 2.5),
    Target("policy_step", "step", BOTH, "tokfuse", EAGER, 8.0),
    Target("token_stats", "forward", "all", "tokfuse", COMPILED, 4.0),
    *(Target(*HIDDEN, "rows=1", "tokfuse", peer, 1.0) for peer in HIDDEN_PEERS),
    *(
        Target("advantage", "forward", variant, "tokfuse", EAGER, 10.0)
        for variant in ("gae", "vtrace", "group_advantage", "whiten", "offpolicy_weights", "segment_moments")
    ),
    Ceiling(*HIDDEN, "rows=1", "tokfuse", GEMMS, 1.08),
    Ceiling(*HIDDEN, "rows=0.25", "tokfuse", GEMMS, 0.6),
    Ceiling(*HIDDEN, "rows=1,frozen", "tokfuse", GEMMS, 0.72),
    Ceiling("influence", "step", "rank=64", "tokfuse_norms", ("tokfuse",), 1.02),
    Ceiling("influence", "step", "rank=64", "tokfuse_sketches", ("tokfuse",), 1.05),
    *(
        Ceiling("token_stats", mode, "ids=100", "tokfuse_ids", ("tokfuse",), 1.05)
        for mode in ("forward", "forward+backward")
    ),
    Floor("token_stats", "forward", "all", "tokfuse", 0.7),
    Floor("policy_step", "step", BOTH, "tokfuse_", 0.7),
    *(Budget(*HIDDEN, variant, "tokfuse", 64 << 20) for variant in ("rows=1", "rows=0.25", "rows=1,frozen")),
)


def judge(rows: Iterable[Row], targets: Iterable[Goal] = TARGETS) -> list[Verdict]:
    """Return one verdict per target and case. A target without rows gives none."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row.status == "pass" and row.median_ms and not row.sweep:
            key = (row.op, row.mode, row.variant, row.shape, row.dtype)
            cases.setdefault(key, {})[row.provider] = row  # a later run replaces an earlier one
    verdicts = []
    for target in targets:
        for case, found in cases.items():
            if case[:3] != (target.op, target.mode, target.variant) or target.ours not in found:
                continue
            verdict = _verdict(target, found)
            if verdict is not None:
                text, met = verdict
                verdicts.append(Verdict("met" if met else "MISS", " ".join(case), text, met))
    return verdicts


def _verdict(target: Goal, found: dict[str, Row]) -> tuple[str, bool] | None:
    """Return the reached and the required value as text, and whether the target is met; None without rows."""
    ours = found[target.ours]
    if isinstance(target, Floor):
        if ours.limit_share is None:
            return None
        text = f"{target.ours} reaches {ours.limit_share:.2f} of {ours.limit}"
        return f"{text} (at least {target.share:g})", ours.limit_share >= target.share
    if isinstance(target, Budget):
        used = ours.workspace_bytes
        if used is None:
            return None
        asked = f"(at most {target.workspace_bytes / 2**20:g})"
        return (f"{target.ours} uses {used / 2**20:.1f} MiB beyond its results {asked}", used <= target.workspace_bytes)
    if isinstance(target, Ceiling):
        base = next((found[name] for name in target.base if name in found), None)
        if base is None:
            return None
        times = (ours.median_ms or 0.0) / (base.median_ms or 1.0)
        text = f"{target.ours} / {base.provider} = {times:.3f} (at most {target.times:g})"
        return text, times <= target.times
    forms = [found[name] for name in (target.peer, f"{target.peer}_f32") if name in found]
    if not forms:
        return None
    peer = min(forms, key=lambda row: row.median_ms or 0.0)
    times = (peer.median_ms or 0.0) / (ours.median_ms or 1.0)
    text = f"{peer.provider} / {target.ours} = {times:.2f} (at least {target.times:g})"
    return text, times >= target.times
