"""Show whether runs have learned: mean reward of the first three steps and of the last fifth, one line per run.

    python examples/summarize_runs.py runs/long-1 runs/long-2 runs/long-3 --plot curves.png
    python examples/summarize_runs.py runs/grpo-1 runs/grpo-2 runs/nft-1 runs/nft-2 --compare

Reads `metrics.jsonl` of each run folder that `examples/train_grpo.py` wrote. `--compare` splits the name of a folder at
its last "-" into method and seed, and prints a Markdown table of the methods. The plot then has one curve per method,
the mean over its seeds.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grpo_demo.report import plot_runs, summarize
from grpo_demo.run_folder import RunFolder

Runs = dict[str, list[dict[str, Any]]]


def by_method(rows: Runs) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the runs of each method."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for run, own in rows.items():
        found.setdefault(Path(run).name.rpartition("-")[0], []).append(own)
    return found


def comparison(rows: Runs) -> str:
    """Return a Markdown table of the methods: means over seeds; for rewards also the lowest and highest seed."""
    lines = [
        "| method | seeds | reward, mean of run | reward, last fifth | entropy, last fifth "
        "| tokens in the backward | loss side ms/step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def spread(values: list[float]) -> str:
        return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    for method, runs in by_method(rows).items():
        ends = [own[-max(1, len(own) // 5) :] for own in runs]
        everything = [row for own in runs for row in own]
        share = sum(row["grad_rows"] * row["tokens"] for row in everything)
        share /= sum(row["tokens"] for row in everything)
        entropy = statistics.fmean(row["entropy"] for end in ends for row in end)
        milliseconds = statistics.median(row["loss_ms"] for row in everything)
        lines.append(
            f"| {method} | {len(runs)} "
            f"| {spread([statistics.fmean(r['reward'] for r in own) for own in runs])} "
            f"| {spread([statistics.fmean(r['reward'] for r in end) for end in ends])} "
            f"| {entropy:.2f} | {share:.0%} | {milliseconds:.0f} |"
        )
    return "\n".join(lines)


def means(rows: Runs) -> Runs:
    """Return one row per method and step, with reward and entropy averaged over its seeds."""
    return {
        method: [
            {"step": step, **{key: statistics.fmean(own[step][key] for own in runs) for key in ("reward", "entropy")}}
            for step in range(min(map(len, runs)))
        ]
        for method, runs in by_method(rows).items()
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Summarize runs of examples/train_grpo.py.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--compare", action="store_true", help="print a table of methods instead of runs")
    parser.add_argument("--plot", type=Path, help="write the curves of all runs to this PNG")
    options = parser.parse_args(argv)

    rows = {str(run): RunFolder(run).rows() for run in options.runs}
    empty = [run for run, found in rows.items() if not found]
    if empty:
        raise SystemExit(f"summarize_runs: no rows in {', '.join(empty)}. Pass folders of runs.")
    if options.compare:
        print(comparison(rows))
        if options.plot:
            plot_runs(means(rows), options.plot)
        return 0
    print("run\tsteps\tminutes\tfirst three steps\tlast fifth\tgain")
    gains = []
    for run, found in rows.items():
        s = summarize(found)
        gains.append(s["last_fifth"] - s["first_three"])
        print(
            f"{run}\t{s['steps']}\t{s['minutes']:.1f}\t{s['first_three']:.3f}\t{s['last_fifth']:.3f}\t{gains[-1]:+.3f}"
        )
    print(f"smallest gain {min(gains):+.3f}, mean gain {statistics.fmean(gains):+.3f}")
    if options.plot:
        plot_runs(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
