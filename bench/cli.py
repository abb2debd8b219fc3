"""Run benchmarks from the command line: `python -m tokfuse bench OP...`.

OMP_WAIT_POLICY=passive python -m tokfuse bench
OMP_WAIT_POLICY=passive python -m tokfuse bench all --quick
OMP_WAIT_POLICY=passive python -m tokfuse bench policy_step token_stats --json rows.jsonl --md
python -m tokfuse bench gae
python -m tokfuse bench growth --axes tokens,rows --md
python -m tokfuse bench errors
python -m tokfuse bench targets rows.jsonl
python -m tokfuse bench numbers rows.jsonl
"""

import argparse
import contextlib
import dataclasses
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from tokfuse.bench import (
    compare,
    errors,
    growth,
    liger_csv,
    machine,
    numbers,
    ours,
    peers,
    pictures,
    plot,
    predict,
    report,
    runner,
    targets,
    verdict,
)
from tokfuse.bench.plan import ALONE, CASES, MODELS, VARIANT_OPS, Step, make_growth_plan, make_plan
from tokfuse.bench.problem import Problem
from tokfuse.bench.row import Row, check_one_machine
from tokfuse.inspection import progress, tables
from tokfuse.runtime.core import dispatch

ROUNDS, QUICK_ROUNDS = 15, 3
BUDGET_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark of the command line. Return 1 if a row of tokfuse is an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command_line = parser()
    options = command_line.parse_args(argv)
    if options.list:
        print(_listing())
        return 0
    if not options.names:
        print("tokfuse bench: no op is named, so `bench all --quick` runs. `--list` lists the ops.", file=sys.stderr)
        argv = ["all", "--quick", *argv]
        options = command_line.parse_args(argv)
    command, *files = options.names
    if options.threads:
        torch.set_num_threads(options.threads)
    if command == "targets":
        return _judge(command_line, files)
    if command == "compare":
        return _compare(command_line, files, options.tolerance)
    if command == "numbers":
        return _print_numbers(command_line, files, options.write, options.pictures)
    _check_options(command_line, options, command, files)
    if command == "predict":
        return _predict(options.json)
    machine.warn_about_waiting()
    forced = dispatch.backend(options.backend[0]) if len(options.backend) == 1 else contextlib.nullcontext()
    if command == "errors":
        with forced:
            return errors.main(options)
    try:
        plan = make_growth_plan(options) if command == "growth" else make_plan(options)
    except ValueError as error:
        command_line.error(str(error))
    facts = machine.facts(recorded_command(argv), options.device)
    try:
        _check_file(options.json, facts)
    except ValueError as error:
        command_line.error(str(error))
    with forced:
        rows = _run(plan, options, facts)
    if options.md:
        print(growth.tables(rows) if command == "growth" else report.markdown(rows))
    if options.png:
        plot.draw(rows, Path(options.png))
    return int(any(row.role == "ours" and row.status == "error" for row in rows))


def _check_options(
    command_line: argparse.ArgumentParser, options: argparse.Namespace, command: str, files: list[str]
) -> None:
    """Raise an error for options that the command does not support, before anything is measured."""
    for name in ("write", "pictures"):
        if getattr(options, name):
            command_line.error(f"--{name} is an option of numbers only")
    if command in ALONE and files:
        command_line.error(f"{command} takes no further names; got {' '.join(files)}")
    if options.axes is not None and command != "growth":
        command_line.error("--axes is an option of growth only")
    if command == "errors" and len(options.backend) > 1:
        command_line.error(f"--backend must name one backend for errors; got {','.join(options.backend)}")
    if command in ("errors", "predict"):
        for name in ("csv", "png"):
            if getattr(options, name) is not None:
                command_line.error(f"--{name} writes measured rows; {command} measures none")
    for name in ("json", "csv", "png"):
        file = getattr(options, name)
        if file is not None and (Path(file).is_dir() or not Path(file).resolve().parent.is_dir()):
            command_line.error(f"--{name} must be a file in an existing folder; got {file!r}")
    if options.png:
        plot.check_available(command_line.error, "--png")
    if options.device == "cpu":
        if torch.cuda.is_available():
            hint = "tokfuse bench: measuring the CPU. Pass --device cuda to measure the GPU."
            print(hint, file=sys.stderr)
    elif command in ("errors", "predict"):
        command_line.error(f"--device selects the device of measured rows; {command} measures none")
    elif not torch.cuda.is_available():
        command_line.error("--device cuda needs a CUDA device and a CUDA build of torch; torch finds no CUDA device")


FILE_OPTIONS = ("--json", "--csv", "--png")


def recorded_command(argv: Sequence[str]) -> str:
    """Return the command line as rows store it: without the options that name output files."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] not in FILE_OPTIONS:
            kept.append(word)
        skip = not skip and word in FILE_OPTIONS
    return "python -m tokfuse bench " + shlex.join(kept)


def _judge(command_line: argparse.ArgumentParser, files: list[str]) -> int:
    """Print the verdicts for the rows of some files. Return 1 if a target is missed or no row has a target."""
    if not files:
        command_line.error("targets: pass the files that --json wrote")
    rows = _read_rows(command_line, files)[0]
    return verdict.show(targets.judge(rows), "no row belongs to a target", width=62)


def _read_rows(command_line: argparse.ArgumentParser, files: list[str]) -> tuple[list[Row], list[dict[str, Any]]]:
    try:
        return numbers.read(files)
    except ValueError as error:
        command_line.error(str(error))


def _print_numbers(
    command_line: argparse.ArgumentParser, files: list[str], pages: list[str], folder: str | None
) -> int:
    """Print the tables of the documentation, or write them into `pages`. Write the pictures into `folder`."""
    if not files:
        command_line.error("numbers: pass the files that --json wrote")
    rows, study = _read_rows(command_line, files)
    texts = {"headline": numbers.headline(rows), "numbers": numbers.section(rows, study)}
    if not pages and folder is None:
        print(texts["numbers"])
        return 0
    if folder is not None:
        plot.check_available(command_line.error, "--pictures")
    try:
        for page in pages:
            numbers.write(Path(page), texts)
    except (OSError, ValueError) as error:
        command_line.error(str(error))
    if folder is not None:
        pictures.write(rows, Path(folder))
    return 0


def _compare(command_line: argparse.ArgumentParser, files: list[str], tolerance: float) -> int:
    """Print how the shares of the limit changed between two files. Return 1 if a share decreased too much."""
    if len(files) != 2:
        command_line.error("compare: pass two files, the older file first")
    try:
        verdicts = compare.compare(*(compare.read(Path(file)) for file in files), tolerance)
    except ValueError as error:
        command_line.error(str(error))
    return verdict.show(verdicts, "no case is in both files", width=76)


def _predict(path: str | None) -> int:
    """Print the predicted rows. With `--json`, also overwrite that file with them."""
    rows = list(predict.rows())
    tables.show("\n".join([report.HEADER, *map(report.line, rows)]), report.table(rows, "Predicted, nothing ran"))
    if path is not None:
        Path(path).write_text("".join(f"{row.to_json()}\n" for row in rows), encoding="utf-8")
    return 0


def _check_file(path: str | None, facts: dict[str, Any]) -> None:
    """Check that rows of this machine are not appended to rows of another machine.

    Raises:
        ValueError: the file contains rows of another machine.
    """
    if path is None or not Path(path).exists():
        return
    old, _ = numbers.read([path])
    if old:
        check_one_machine([*old, dataclasses.replace(old[0], status="pass", **facts)], path)


def _run(plan: list[Step], options: argparse.Namespace, facts: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    as_tables = tables.is_rich()  # one table per case, instead of one line per row
    if not options.md and not as_tables:
        print(report.HEADER, flush=True)
    with (
        _open(options.json) as sink,
        _open(options.csv) as table,
        progress.bar(len(plan), "case", options.quiet) as shown,
    ):

        def emit(row: Row) -> None:
            rows.append(row)
            if sink is not None:
                print(row.to_json(), file=sink, flush=True)
            if table is not None:
                liger_csv.append(row, table)
            if not options.md and not as_tables:
                shown.clear()
                print(report.line(row), flush=True)

        for step in plan:
            done = len(rows)
            with _threads(step.threads) as threads:
                settings = runner.Settings(
                    rounds,
                    {**facts, "threads": threads, "sweep": step.sweep},
                    options.budget,
                    compare=not options.no_errors,
                    energy=not options.no_energy,
                    on_step=shown.set_postfix_str,
                )
                runner.run_case(step.config, partial(_build, step, options.backend), settings, emit)
            if not options.md and as_tables:
                shown.clear()
                tables.show("", report.table(rows[done:]))
            shown.update()
    return rows


def _build(step: Step, backends: Sequence[str]) -> Problem:
    """Return the problem of a step. If there are several backends, they are providers of the same rounds."""
    problem: Problem = step.module.build(step.config, step.peers)
    return ours.on_each_backend(problem, backends) if len(backends) > 1 else problem


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """Set torch's number of threads, which tokfuse uses too, for one case."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _open(path: str | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
    else:
        with open(path, "a", encoding="utf-8") as sink:
            yield sink


def _backends(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in dispatch.ORDER:
            raise argparse.ArgumentTypeError(f"must name some of {', '.join(dispatch.ORDER)}; got {name!r}")
    return names


def _count(text: str) -> int:
    """Return a number of rounds or threads."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1; got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0; got {text!r}")
    return seconds


def _dtypes(text: str) -> str:
    known = ("float32", "bfloat16", "float16")
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"must name some of {', '.join(known)}; got {name!r}")
    return text


def _listing() -> str:
    lines = ["ops:"]
    for op, module in CASES.items():
        summary = (module.__doc__ or "").splitlines()[0]
        lines.append(f"  {op:<28}{summary}")
        lines.append(f"  {'':<28}shapes {', '.join(module.SHAPES)}; {', '.join(module.DTYPES)}")
    lines += ["  growth                      time over tokens, vocabulary, hidden size, threads, rows with gradient"]
    lines += ["  errors                      errors of every output and gradient relative to float64"]
    lines += ["  targets                     compare the rows of --json files with the performance targets"]
    lines += ["  numbers                     tables and pictures of the documentation from the rows of --json files"]
    lines += ["  compare                     shares of the limit in two files, the older file first"]
    lines += ["  predict                     predicted times of the Triton kernels on GPUs; nothing runs"]
    lines += ["models (--shapes 256xNAME):"]
    lines += [f"  {name:<28}hidden {h}, vocabulary {v}" for name, (h, v) in MODELS.items()]
    lines += ["peers:"]
    lines += [f"  {peer.name:<28}{peer.summary}" for peer in peers.KNOWN.values()]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse bench",
        description="Time the ops, other libraries and the limits of this machine.",
        epilog="example: python -m tokfuse bench policy_step --json rows.jsonl",
    )
    out.add_argument(
        "names",
        nargs="*",
        metavar="OP",
        help=f"some of {', '.join([*CASES, *VARIANT_OPS])}; or one of {', '.join(ALONE)}; "
        "after targets, numbers and compare: files that --json wrote",
    )
    out.add_argument("--list", action="store_true", help="list ops, models and peers, then exit")
    out.add_argument("--peers", help="peers to measure: names joined by commas, all, or none")
    out.add_argument(
        "--quick", action="store_true", help="small shapes, first variant, 3 rounds: only checks that it works"
    )
    out.add_argument(
        "--shapes",
        help="512x49152,... (tokens x vocab, or tokens x hidden x vocab), or 256xMODEL with one of "
        + ", ".join(MODELS),
    )
    out.add_argument("--dtype", type=_dtypes, help="float32,bfloat16,float16")
    out.add_argument(
        "--backend",
        type=_backends,
        default=(),
        metavar="NAMES",
        help=f"force a tokfuse backend, or measure several in the same rounds: {','.join(dispatch.ORDER)}",
    )
    out.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    out.add_argument("--variant", help="only this variant of the op's cases")
    out.add_argument("--axes", help=f"axes of growth: some of {','.join(growth.AXES)}")
    out.add_argument("--rounds", type=_count, help=f"interleaved rounds (default {ROUNDS})")
    out.add_argument(
        "--budget",
        type=_seconds,
        default=BUDGET_S,
        help=f"seconds of rounds per case; at least 3 rounds run (default {BUDGET_S:g})",
    )
    out.add_argument("--no-errors", action="store_true", help="skip the slow comparison with float64")
    out.add_argument("--no-energy", action="store_true", help="on a GPU, skip the energy reading (1 s per provider)")
    out.add_argument("--threads", type=_count, help="torch threads (default: torch's own)")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--json", metavar="FILE", help="append each row as a JSON line when it is measured")
    out.add_argument("--csv", metavar="FILE", help="append rows as CSV in Liger's columns")
    out.add_argument("--png", metavar="FILE", help="write a plot of the rows at the end")
    out.add_argument("--quiet", action="store_true", help="no progress bar")
    out.add_argument(
        "--tolerance",
        type=float,
        default=compare.TOLERANCE,
        help=f"largest decrease of a share of the limit for compare (default {compare.TOLERANCE:g})",
    )
    out.add_argument(
        "--write", metavar="PAGE", action="append", default=[], help="write the tables of numbers into this page"
    )
    out.add_argument("--pictures", metavar="FOLDER", help="write the pictures of numbers into this folder")
    out.add_argument("--md", action="store_true", help="print Markdown tables at the end")
    return out
