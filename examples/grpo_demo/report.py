"""The output of a run: the line per step, the backend table, the curves, the summary."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tokfuse
from tokfuse.bench.measure import Provider, peak_extra_bytes

BACKENDS = ("cpu", "reference")
ROUNDS = 7

# heading, key in the row, format
COLUMNS = (
    ("step", "step", "d"),
    ("reward", "reward", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("KL old->new", "kl", ".5f"),
    ("clipped", "clip_fraction", ".3f"),
    ("grad rows", "grad_rows", ".2f"),
    ("loss ms", "loss_ms", ".0f"),
    ("tokens/s", "tokens_per_s", ".0f"),
    ("step s", "step_s", ".1f"),
    ("peak MiB", "peak_mib", ".0f"),
)


def header() -> str:
    """Return the headings above the lines of `step_line`."""
    return "  ".join(f"{heading:>7}" for heading, _, _ in COLUMNS)


def step_line(row: dict[str, Any]) -> str:
    """Return one step as one line, with "-" for values that the step does not have."""
    cells = []
    for heading, key, form in COLUMNS:
        text = "-" if row[key] is None else format(row[key], form)
        cells.append(f"{text:>{max(7, len(heading))}}")
    return "  ".join(cells) + (f"  {row['note']}" if row["note"] else "")


def compare_backends(batches: list[dict[str, Any]], weight: torch.Tensor, objective: Any) -> list[dict[str, Any]]:
    """Time `policy_step` with every backend on the same saved batches.

    The rounds of the backends are interleaved, so that other load on the machine affects all of them equally. The
    first round is a warm-up.

    Returns:
        one row per backend and batch: median milliseconds, peak extra MiB, loss.
    """
    runs = {
        (backend, index): step_runner(backend, batch, weight, objective)
        for index, batch in enumerate(batches)
        for backend in BACKENDS
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    losses = {key: float(run()["loss"]) for key, run in runs.items()}
    for _ in range(ROUNDS):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            times[key].append((time.perf_counter() - start) * 1e3)
    return [
        {
            "backend": backend,
            "batch": index,
            "tokens": len(batches[index]["target"]),
            "loss_ms": statistics.median(times[backend, index]),
            "peak_extra_mib": peak_extra_mib(run),
            "loss": losses[backend, index],
        }
        for (backend, index), run in runs.items()
    ]


def step_runner(
    backend: str, batch: dict[str, Any], weight: torch.Tensor, objective: Any
) -> Callable[[], dict[str, torch.Tensor]]:
    """Return a function that calls `policy_step` with gradients of hidden states and weight, on one backend."""
    hidden, weight = batch["hidden"].detach().requires_grad_(), weight.detach().requires_grad_()
    inputs = {key: value for key, value in batch.items() if key != "hidden"}

    def run() -> dict[str, torch.Tensor]:
        with tokfuse.backend(backend):
            step = tokfuse.policy_step(hidden=hidden, weight=weight, objective=objective, **inputs)
        return {"loss": step.loss.detach(), "grad_weight": step.grad_weight}

    return run


def peak_extra_mib(run: Callable[[], dict[str, torch.Tensor]]) -> float | None:
    """Return the peak resident memory of one call above its start. None if the system does not report it."""
    peak, _ = peak_extra_bytes(Provider(run))
    return None if peak is None else peak / 2**20


def backend_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `compare_backends` as text, one line per batch, with both backends side by side."""
    by_batch: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_batch.setdefault(row["batch"], {})[row["backend"]] = row
    first, second = BACKENDS
    lines = [
        f"policy_step on {len(by_batch)} saved batches, median of {ROUNDS} interleaved rounds:",
        f"{'':>6} {'':>7} | {'milliseconds':^27} | {'peak extra MiB':^19} | {'loss':^37}",
        f"{'batch':>6} {'tokens':>7} | {first:>7} {second:>10} {'faster':>8} "
        f"| {first:>8} {second:>10} | {first:>12} {second:>12} {'difference':>11}",
    ]
    for index, pair in by_batch.items():
        a, b = pair[first], pair[second]
        lines.append(
            f"{index:>6} {a['tokens']:>7} | {a['loss_ms']:>7.1f} {b['loss_ms']:>10.1f} "
            f"{b['loss_ms'] / a['loss_ms']:>7.1f}x | {mib(a):>8} {mib(b):>10} "
            f"| {a['loss']:>12.7f} {b['loss']:>12.7f} {abs(a['loss'] - b['loss']):>11.1e}"
        )
    worst = max(abs(pair[first]["loss"] - pair[second]["loss"]) for pair in by_batch.values())
    return "\n".join([*lines, f"Largest difference between the two losses: {worst:.1e}"])


def write_backends(batches: list[dict[str, Any]], weight: torch.Tensor, objective: Any, path: Path) -> str:
    """Compare the backends, write the rows to `path`, and return the table as text."""
    try:
        rows = compare_backends(batches, weight, objective)
    except tokfuse.BackendUnavailable as error:
        return f"No comparison of backends: {error}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return backend_table(rows)


def mib(row: dict[str, Any]) -> str:
    """Return the peak memory of a row, or "-" if the system does not report it."""
    return "-" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.0f}"


def moving_mean(values: list[float], width: int) -> list[float]:
    """Return the mean of each value and up to `width - 1` values before it."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def plot_runs(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot reward and entropy over the steps of one or several runs as a PNG, labelled with their names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("reward", "mean reward"), ("entropy", "entropy (nats)"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for color, (name, rows) in enumerate(runs.items()):
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            axis.plot(steps, values, color=f"C{color}", alpha=0.25)
            axis.plot(steps, moving_mean(values, 5), color=f"C{color}", label=name)
        axis.set(xlabel="step (bold: mean of 5 steps)", title=title)
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean reward of the first three steps and of the last fifth, and the duration."""
    rewards = [row["reward"] for row in rows]
    return {
        "steps": len(rewards),
        "minutes": sum(row["step_s"] for row in rows) / 60,
        "first_three": statistics.fmean(rewards[:3]),
        "last_fifth": statistics.fmean(rewards[-max(1, len(rewards) // 5) :]),
    }
