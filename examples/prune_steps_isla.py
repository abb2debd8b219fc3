"""ISLA's step pruning on real traces: keep the steps that help while the model is uncertain, and learn from them.

SmolLM2 solves sums line by line. The accuracy after every line is measured by sampling continuations, and the
uncertainty of a line is its mean token entropy. A step is kept if it raises the accuracy enough while the model was
uncertain. For each kept step, the alternative from the same prefix with the lowest accuracy is the rejected side of a
pair, and the policy takes DPO steps on those pairs.

    python examples/prune_steps_isla.py        # a few minutes on two cores
    python examples/prune_steps_isla.py --steps 8 --seed 1

The example shows which part of the traces is kept, and the gain in accuracy of the kept and of the pruned steps. The
paper's formulas are not public: the measures and thresholds are ours.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo_demo.chains import Sum, Writer, decompose, main, optimizer_of, sums, train_pairs

from tokfuse import algorithms


@dataclass(frozen=True)
class Settings:
    """Settings of a run. The thresholds have no published value."""

    questions: int = 4  # per step
    terms: int = 3
    completions: int = 8  # per prefix
    candidates: int = 2  # other first lines whose accuracy is measured
    min_accuracy_gain: float = 0.1
    min_uncertainty: float = 0.05
    lr: float = 5e-6


@dataclass(frozen=True)
class Trace:
    """A chain that the model wrote, and its measures."""

    question: Sum
    lines: list[str]
    accuracy: torch.Tensor  # (lines + 1,), before the first line and after each
    uncertainty: torch.Tensor  # (lines,), nats


def measure(writer: Writer, question: Sum, completions: int) -> Trace:
    """Return a sampled chain with the accuracy after each line and the entropy of each line."""
    lines = writer.branches(question, [], 1)[0]
    rates = [writer.rate(question, lines[:i], completions) for i in range(len(lines) + 1)]
    prompts = [decompose(question, lines[:i]) for i in range(len(lines))]
    uncertainty = torch.zeros(0)
    if lines:
        responses = writer.encode(prompts, [f"{line}\n" for line in lines])
        with torch.no_grad():
            entropy = writer.stats(responses).entropy
        uncertainty = torch.stack([row.mean() for row in entropy.split([len(row) for row in responses.tokens])])
    return Trace(question, lines, torch.tensor(rates, dtype=torch.float64), uncertainty)


def pair_at(writer: Writer, trace: Trace, i: int, settings: Settings) -> tuple[str, str, str] | None:
    """Return (prompt, kept line, worse line) of step i. None if no sampled line is worse."""
    prefix = trace.lines[:i]
    chains = writer.branches(trace.question, prefix, settings.completions)
    others = sorted({chain[0] for chain in chains if chain} - {trace.lines[i]})[: settings.candidates]
    rates = [writer.rate(trace.question, [*prefix, line], settings.completions) for line in others]
    method = algorithms.make("isla", min_accuracy_gain=0.0, min_uncertainty=0.0)
    worst = method.pair(float(trace.accuracy[i + 1]), torch.tensor(rates, dtype=torch.float64))
    if worst is None:
        return None
    return decompose(trace.question, prefix), f"{trace.lines[i]}\n", f"{others[worst]}\n"


def run(writer: Writer, steps: int, seed: int, settings: Settings | None = None) -> None:
    """Print what is kept in each step, and the accuracy of the policy on new questions."""
    s = settings or Settings()
    method = algorithms.make("isla", min_accuracy_gain=s.min_accuracy_gain, min_uncertainty=s.min_uncertainty)
    loss, optimizer = algorithms.make("dpo"), optimizer_of(writer.model, s.lr)
    gains: dict[bool, list[float]] = {True: [], False: []}
    print("step  accuracy  lines  kept  pairs  loss")
    for step in range(steps):
        traces = [measure(writer, q, s.completions) for q in sums(seed, step * s.questions, s.questions, s.terms)]
        pairs = []
        for trace in traces:
            keep = method.select(trace.accuracy, trace.uncertainty)
            for i, (kept, gain) in enumerate(zip(keep.tolist(), trace.accuracy.diff().tolist(), strict=True)):
                gains[kept].append(gain)
                found = pair_at(writer, trace, i, s) if kept else None
                pairs += [found] if found else []
        value = train_pairs(writer, loss, optimizer, pairs).loss.item() if pairs else float("nan")
        accuracy = sum(float(trace.accuracy[0]) for trace in traces) / len(traces)
        lines = sum(len(trace.lines) for trace in traces)
        kept_lines = sum(int(method.select(t.accuracy, t.uncertainty).sum()) for t in traces)
        print(f"{step:4}  {accuracy:8.3f}  {lines:5}  {kept_lines:4}  {len(pairs):5}  {value:.3f}", flush=True)
    for kept, changes in gains.items():
        if changes:
            mean = sum(changes) / len(changes)
            print(f"{'kept' if kept else 'pruned'} steps: {len(changes)}, mean change of the accuracy {mean:+.3f}")


if __name__ == "__main__":
    sys.exit(main(run, steps=4))
