"""`python -m tokfuse COMMAND`: hands the rest of the line to the module that owns COMMAND."""

import argparse
import importlib
import sys
from collections.abc import Sequence

# command -> (module with `main(argv) -> int`, loaded only when asked for; one line of help)
COMMANDS = {
    "doctor": ("tokfuse.inspection.doctor", "versions, devices, and what each op can run on here"),
    "kernels": ("tokfuse.inspection.kernels", "what the Triton kernels compile to, without a GPU"),
    "tune": ("tokfuse.inspection.tune", "measure launch records of the Triton kernels on this GPU"),
    "algorithms": ("tokfuse.algorithms.listing", "the methods by name, with labels and options"),
    "bench": ("tokfuse.bench.cli", "time the ops beside their peers"),
    "profile": ("tokfuse.bench.profile", "where the time of one benchmark case goes"),
    "report": ("tokfuse.bench.page", "one page of tables and plots from saved rows"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokfuse")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    options, rest = parser.parse_known_args(argv)
    module = importlib.import_module(COMMANDS[options.command][0])
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
