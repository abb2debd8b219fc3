"""`python -m tokfuse COMMAND`, or `tokfuse COMMAND`: run the module of COMMAND with the remaining arguments."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import tokfuse

# command -> (module with `parser()` and `main(argv) -> int`, imported only for its command; help text)
COMMANDS = {
    "doctor": ("tokfuse.inspection.doctor", "show versions, devices, and the backends that each op can use"),
    "algorithms": ("tokfuse.inspection.methods", "list the methods with their labels and options"),
    "bench": ("tokfuse.bench.cli", "benchmark the ops against other libraries"),
    "report": ("tokfuse.bench.page", "write one page of figures, plots and tables from stored benchmark rows"),
    "profile": ("tokfuse.bench.profile", "profile one benchmark case"),
    "kernels": ("tokfuse.inspection.kernels", "show the resources of the compiled kernels; needs no GPU"),
    "tune": ("tokfuse.inspection.tune", "measure launch records of the Triton kernels on this GPU"),
    "completion": ("tokfuse.__main__", "print a completion script for bash, zsh or tcsh"),
}
WELCOME = """\
tokfuse computes the loss side of LLM reinforcement learning in one read of the logits.

  Check your installation    python -m tokfuse doctor
  Use it in your trainer     from tokfuse.integrations import trl; trl.install()
  Measure it here            python -m tokfuse bench policy_step --quick

`python -m tokfuse --help` lists all commands.
"""
EXIT_CODES = """\
exit codes:
  0    the command did its work
  1    it ran, and a check failed: a benchmark row is an error, a target is missed, a table differs
  2    the command line is wrong; nothing ran
  130  interrupted from the keyboard
  141  the reader of the output, such as `head`, closed it
"""
SHELLS = ("bash", "zsh", "tcsh")


def parser() -> argparse.ArgumentParser:
    """Return the parser of `completion`, like the `parser` of every other command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse completion",
        description="Print a script that completes the commands and options of `tokfuse` in a shell.",
        epilog='example: eval "$(tokfuse completion bash)", in ~/.bashrc',
    )
    out.add_argument("shell", choices=SHELLS)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv` and return its exit status. Without a command, print what to try first."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(WELCOME, end="")
        return 0
    known = _known()
    options, rest = known.parse_known_args(words)
    try:
        if options.command == "completion":
            status = _complete(parser().parse_args(rest).shell)
        else:
            status = int(_module(options.command).main(rest))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:  # a file of the command line that cannot be read or written
        if error.filename is None:
            raise
        what = f"{error.filename}: {error.strerror}. Check the path."
        print(f"python -m tokfuse {options.command}: error: {what}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("tokfuse: interrupted", file=sys.stderr)
        status = 130
    return status


def _module(command: str) -> Any:
    return importlib.import_module(COMMANDS[command][0])


def _known() -> argparse.ArgumentParser:
    """Return the parser of the command names. It imports no command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse",
        description="Each command has its own help with an example: `python -m tokfuse bench --help`.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--version", action="version", version=f"tokfuse {tokfuse.__version__}")
    commands = out.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return out


def _complete(shell: str) -> int:
    """Print a static script, so that completion starts no Python and imports no torch."""
    try:
        import shtab
    except ImportError:
        print("tokfuse: completion needs shtab: pip install 'tokfuse[cli]'", file=sys.stderr)
        return 1
    full = argparse.ArgumentParser(prog="tokfuse")
    commands = full.add_subparsers(dest="command")
    for name, (_, summary) in COMMANDS.items():
        own = parser() if name == "completion" else _module(name).parser()
        actions: list[Any] = own._actions
        for action in actions:
            if action.metavar in ("FILE", "PAGE", "ROWS"):
                action.complete = shtab.FILE
            elif action.metavar == "FOLDER":
                action.complete = shtab.DIRECTORY
        commands.add_parser(name, help=summary, parents=[own], add_help=False)
    print(shtab.complete(full, shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
