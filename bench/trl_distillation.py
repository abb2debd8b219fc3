"""Measure the losses of TRL's distillation trainers with and without tokfuse: time and peak memory, in one process.

    OMP_WAIT_POLICY=passive python -m tokfuse.bench.trl_distillation --md
    python -m tokfuse.bench.trl_distillation --quick

A call is the loss and its backward, as the trainer runs them after the two transformers. Cases:
DistillationTrainer from hidden states and heads, with the forward KL (beta 0), the Jensen-Shannon divergence (0.5) and
the reverse KL (1); GKDTrainer from logits (0.5). The sequences have different lengths, and a quarter of the positions
is padding. TRL and tokfuse alternate. Every time is the minimum over the rounds: wall time, and CPU time, which other
load affects least. Peak memory is above what is allocated before the call.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokfuse.bench import machine
from tokfuse.bench.measure import ColdCache, Outputs, Provider, interleave, peak_extra_bytes
from tokfuse.runtime.core.native import release_workspace

CASES = (("distillation", 0.0), ("distillation", 0.5), ("distillation", 1.0), ("gkd", 0.5))
TOLERANCE = 1e-4  # of losses and gradients, relative to the largest


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case. Return 1 if a loss or a gradient differs from TRL's."""
    parser = argparse.ArgumentParser(prog="python -m tokfuse.bench.trl_distillation")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence, with padding")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size of the student")
    parser.add_argument("--teacher-hidden", type=int, default=1152)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, three rounds")
    parser.add_argument("--json", type=Path, help="append one row per case and arm")
    parser.add_argument("--md", action="store_true", help="print a Markdown table at the end")
    options = parser.parse_args(argv)
    if options.quick:
        options.length, options.hidden, options.teacher_hidden, options.vocab, options.rounds = 16, 32, 64, 2048, 3
    machine.warn_about_waiting()
    facts = machine.facts("python -m tokfuse.bench.trl_distillation") | {"trl": machine.version_of("trl")}
    rows: list[dict[str, Any]] = []
    same = True
    for trainer, beta in CASES:
        arms = _arms(trainer, beta, _Inputs(options))
        same &= _equal(f"{trainer}, beta {beta}", arms)
        rows += _measured(trainer, beta, arms, options, facts)
    if options.json is not None:
        with options.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if options.md:
        print(markdown(rows))
    return int(not same)


# ------------------------------------------------------------------------------------------ cases


class _Inputs:
    """Hidden states and heads of a student and of a teacher near it; the mask of the completions."""

    def __init__(self, options: argparse.Namespace) -> None:
        gen = torch.Generator().manual_seed(0)
        batch, length, wide = options.sequences, options.length, options.teacher_hidden
        self.hidden = torch.randn(batch, length, options.hidden, generator=gen)
        self.weight = torch.randn(options.vocab, options.hidden, generator=gen) / options.hidden**0.5 * 2
        mixing = torch.randn(options.hidden, wide, generator=gen) / options.hidden**0.5
        self.teacher_hidden = self.hidden @ mixing
        self.teacher_weight = self.weight @ mixing * (options.hidden / wide)
        self.teacher_weight += 0.02 * torch.randn(options.vocab, wide, generator=gen)
        lengths = torch.linspace(length / 2, length, batch).round()
        self.mask = (torch.arange(length) < lengths[:, None]).long()


def _arms(trainer: str, beta: float, data: _Inputs) -> dict[str, Callable[[], Outputs]]:
    """Return the call of TRL and that of tokfuse, both looked up where the trainer looks."""
    import trl.trainer.distillation_trainer as stable
    from trl.experimental.gkd import GKDTrainer

    from tokfuse.integrations import trl

    if trainer == "distillation":
        prepare: Any = _from_heads
        found = {"trl": stable._chunked_divergence_loss}
        with trl.installed():
            found["tokfuse"] = stable._chunked_divergence_loss
    else:
        prepare = _from_logits
        found = {"trl": GKDTrainer.generalized_jsd_loss}
        with trl.installed():
            found["tokfuse"] = GKDTrainer.generalized_jsd_loss
    return {name: prepare(function, beta, data) for name, function in found.items()}


def _from_heads(function: Callable[..., Any], beta: float, data: _Inputs) -> Callable[[], Outputs]:
    hidden, weight = (x.detach().requires_grad_() for x in (data.hidden, data.weight))

    def run() -> Outputs:
        heads = (hidden, data.teacher_hidden, weight, data.teacher_weight)
        loss = function(*heads, data.mask, beta, num_items_in_batch=data.mask.sum())[0]
        grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
        return {"loss": loss.detach(), "grad_hidden": grad_hidden, "grad_weight": grad_weight}

    return run


def _from_logits(function: Callable[..., Any], beta: float, data: _Inputs) -> Callable[[], Outputs]:
    logits = (data.hidden @ data.weight.T).requires_grad_()
    teacher = data.teacher_hidden @ data.teacher_weight.T
    labels = torch.where(data.mask != 0, 0, -100)

    def run() -> Outputs:
        loss = function(logits, teacher, labels, beta=beta, num_items_in_batch=data.mask.sum())
        return {"loss": loss.detach(), "grad_logits": torch.autograd.grad(loss, logits)[0]}

    return run


def _equal(case: str, arms: dict[str, Callable[[], Outputs]]) -> bool:
    stock, ours = arms["trl"](), arms["tokfuse"]()
    for name, x in stock.items():
        far = float((ours[name] - x).abs().max())
        if far > TOLERANCE * float(x.abs().max()):
            print(f"trl_distillation: {name} of {case} is {far:.3g} from TRL's")
            return False
    return True


# ---------------------------------------------------------------------------------------- results


def _measured(
    trainer: str,
    beta: float,
    arms: dict[str, Callable[[], Outputs]],
    options: argparse.Namespace,
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    # Free tokfuse's workspace before the peak is measured, so that the peak includes it.
    providers = {name: Provider(run, release=release_workspace) for name, run in arms.items()}
    cpu: dict[str, list[float]] = {}
    wall, failed = interleave(providers, options.rounds, ColdCache(), cpu_times=cpu)
    if failed:
        raise SystemExit(f"trl_distillation: {failed}")
    shape = {name: getattr(options, name) for name in ("sequences", "length", "hidden", "teacher_hidden", "vocab")}
    rows = []
    for name, provider in providers.items():
        peak, how = peak_extra_bytes(provider)
        row = {"trainer": trainer, "beta": beta, "arm": name, **shape, "rounds": options.rounds}
        row |= {"wall_ms": min(wall[name]), "cpu_ms": min(cpu[name]), "peak_bytes": peak, "peak_source": how}
        rows.append(row | facts | {"load_average": os.getloadavg()[0]})
        mib = "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"
        print(f"{trainer} beta {beta} {name:<8} {row['wall_ms']:.0f} ms, CPU {row['cpu_ms']:.0f} ms, {mib}", flush=True)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per case: times and peaks of TRL and of tokfuse, and their ratios."""
    first = rows[0]
    lines = [
        f"TRL {first['trl']}, {first['sequences']} x {first['length']} tokens, hidden size {first['hidden']} and "
        f"{first['teacher_hidden']}, vocabulary {first['vocab']}, float32, {first['cpu_model']}, "
        f"threads: {first['threads']}, torch {first['torch']}, "
        f"load average {max(row['load_average'] for row in rows):.1f}",
        "",
        "| trainer | beta | TRL: time, peak | tokfuse: time, peak | speedup (CPU time) | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        cells = [f"{row['wall_ms']:.0f} ms, {(row['peak_bytes'] or 0) / 2**20:.0f} MiB" for row in (stock, ours)]
        wall, cpu = (stock[name] / ours[name] for name in ("wall_ms", "cpu_ms"))
        memory = "unknown" if not stock["peak_bytes"] else f"{(ours['peak_bytes'] or 0) / stock['peak_bytes']:.2f}x"
        lines.append(
            f"| {stock['trainer']} | {stock['beta']} | {cells[0]} | {cells[1]} | {wall:.2f}x ({cpu:.2f}x) | {memory} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
