"""Did the runs learn? Mean reward of the first three steps and of the last fifth, one line per run.

    python examples/summarize_runs.py runs/long-1 runs/long-2 runs/long-3 --plot curves.png

Reads `metrics.jsonl` of each run folder that `examples/train_grpo.py` wrote.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grpo_demo.report import plot_runs, summarize
from grpo_demo.run_folder import RunFolder


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Summarize runs of examples/train_grpo.py.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--plot", type=Path, help="write the curves of all runs to this PNG")
    options = parser.parse_args(argv)

    rows = {str(run): RunFolder(run).rows() for run in options.runs}
    empty = [run for run, found in rows.items() if not found]
    if empty:
        raise SystemExit(f"summarize_runs: no rows in {', '.join(empty)}. Name run folders.")
    print("run\tsteps\tminutes\tfirst three steps\tlast fifth\tgain")
    gains = []
    for run, found in rows.items():
        s = summarize(found)
        gains.append(s["last_fifth"] - s["first_three"])
        print(
            f"{run}\t{s['steps']}\t{s['minutes']:.1f}\t{s['first_three']:.3f}"
            f"\t{s['last_fifth']:.3f}\t{gains[-1]:+.3f}"
        )
    print(f"smallest gain {min(gains):+.3f}, mean gain {statistics.fmean(gains):+.3f}")
    if options.plot:
        plot_runs(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
