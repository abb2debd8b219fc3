"""`python -m tokfuse COMMAND`: run the module of COMMAND with the remaining arguments."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# command -> (module with `main(argv) -> int`, imported only for its command; help text)
COMMANDS = {
    "doctor": ("tokfuse.inspection.doctor", "show versions, devices, and the backends that each op can use"),
    "kernels": ("tokfuse.inspection.kernels", "show the resources of the compiled kernels; needs no GPU"),
    "tune": ("tokfuse.inspection.tune", "measure launch records of the Triton kernels on this GPU"),
    "algorithms": ("tokfuse.algorithms.listing", "list the methods with their labels and options"),
    "bench": ("tokfuse.bench.cli", "benchmark the ops against other libraries"),
    "profile": ("tokfuse.bench.profile", "profile one benchmark case"),
    "report": ("tokfuse.bench.page", "write one page of tables and plots from stored benchmark rows"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv` and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokfuse")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    options, rest = parser.parse_known_args(argv)
    module = importlib.import_module(COMMANDS[options.command][0])
    try:
        status = int(module.main(rest))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    return status


if __name__ == "__main__":
    sys.exit(main())
