"""What the ops must reach beside their peers, judged from rows of one machine.

    python -m tokfuse bench policy_step --json rows.jsonl
    python -m tokfuse bench targets rows.jsonl

A target is judged for every shape, dtype and variant in the rows, against the faster of a peer's
forms (in the input's dtype, or after .float()). Only rows with status "pass" count.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tokfuse.bench.row import Row


@dataclass(frozen=True)
class Target:
    """`peer` must take at least `times` as long as `ours`."""

    op: str
    mode: str
    variant: str
    ours: str
    peer: str
    times: float


COMPILED, EAGER = "torch_compile", "torch_eager"
BOTH = "entropy=0.01"

TARGETS = (
    Target("policy_step", "step", BOTH, "tokfuse_", COMPILED, 6.0),
    Target("policy_step", "step", BOTH, "tokfuse_", EAGER, 20.0),
    Target("policy_step", "step", BOTH, "tokfuse", COMPILED, 2.5),
    Target("policy_step", "step", BOTH, "tokfuse", EAGER, 8.0),
    Target("token_stats", "forward", "all", "tokfuse", COMPILED, 4.0),
)


def judge(rows: Iterable[Row], targets: Iterable[Target] = TARGETS) -> list[tuple[str, bool]]:
    """(one line, met) per target and case; a target that no row speaks about gives none."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row.status == "pass" and row.median_ms:
            key = (row.op, row.mode, row.variant, row.shape, row.dtype)
            cases.setdefault(key, {})[row.provider] = row  # a later run replaces an earlier one
    verdicts = []
    for target in targets:
        for case, found in cases.items():
            if case[:3] != (target.op, target.mode, target.variant) or target.ours not in found:
                continue
            forms = [found[n] for n in (target.peer, f"{target.peer}_f32") if n in found]
            if not forms:
                continue
            peer = min(forms, key=lambda row: row.median_ms or 0.0)
            times = (peer.median_ms or 0.0) / (found[target.ours].median_ms or 1.0)
            met = times >= target.times
            verdicts.append(
                (
                    f"{'met ' if met else 'MISS'} {' '.join(case):<62} {peer.provider} / "
                    f"{target.ours} = {times:.2f} (at least {target.times:g})",
                    met,
                )
            )
    return verdicts
