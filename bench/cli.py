"""`python -m tokfuse bench OP...`: rows for some ops or all, the table of errors, or the targets.

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
    plot,
    predict,
    report,
    runner,
    targets,
)
from tokfuse.bench.plan import ALONE, CASES, MODELS, VARIANT_OPS, Step, make_growth_plan, make_plan
from tokfuse.bench.problem import Problem
from tokfuse.bench.row import Row, check_one_machine
from tokfuse.runtime.core import dispatch

ROUNDS, QUICK_ROUNDS = 15, 3
BUDGET_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark of the command line; returns 1 when a row of ours is an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        print(_listing())
        return 0
    if not options.names:
        print("tokfuse bench: no op is named: `bench all --quick` runs; `--list` shows the ops", file=sys.stderr)
        argv = ["all", "--quick", *argv]
        options = parser.parse_args(argv)
    command, *files = options.names
    if options.threads:
        torch.set_num_threads(options.threads)
    if command == "targets":
        return _judge(parser, files)
    if command == "compare":
        return _compare(parser, files, options.tolerance)
    if command == "numbers":
        return _print_numbers(parser, files, options.write)
    _check_options(parser, options, command, files)
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
        parser.error(str(error))
    facts = machine.facts(recorded_command(argv), options.device)
    try:
        _check_file(options.json, facts)
    except ValueError as error:
        parser.error(str(error))
    with forced:
        rows = _run(plan, options, facts)
    if options.md:
        print(growth.tables(rows) if command == "growth" else report.markdown(rows))
    if options.png:
        plot.draw(rows, Path(options.png))
    return int(any(row.role == "ours" and row.status == "error" for row in rows))


def _check_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, command: str, files: list[str]
) -> None:
    """Refuse what a command would not honour, before anything is measured."""
    if options.write is not None:
        parser.error("--write is for numbers")
    if command in ALONE and files:
        parser.error(f"{command} stands alone; got {' '.join(files)} behind it")
    if options.axes is not None and command != "growth":
        parser.error("--axes is for growth")
    if command == "errors" and len(options.backend) > 1:
        parser.error(f"--backend of errors is one backend; got {','.join(options.backend)}")
    if command in ("errors", "predict"):
        for name in ("csv", "png"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} is for measured rows; {command} has none")
    if options.png:
        plot.check_available(parser.error)
    if options.device == "cpu":
        if torch.cuda.is_available():
            hint = "tokfuse bench: measuring the CPU; --device cuda measures the GPU"
            print(hint, file=sys.stderr)
    elif command in ("errors", "predict"):
        parser.error(f"--device is for measured rows; {command} has none")
    elif not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device and a CUDA build of torch; there is none")


FILE_OPTIONS = ("--json", "--csv", "--png")


def recorded_command(argv: Sequence[str]) -> str:
    """The command line as rows keep it: without where the rows go, which is nobody's business."""
    kept, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] not in FILE_OPTIONS:
            kept.append(word)
        skip = not skip and word in FILE_OPTIONS
    return "python -m tokfuse bench " + shlex.join(kept)


def _judge(parser: argparse.ArgumentParser, files: list[str]) -> int:
    """Print the verdicts over rows read from files; 1 when one is missed or there is none."""
    if not files:
        parser.error("targets: name the files that --json wrote")
    rows = _read_rows(parser, files)[0]
    verdicts = targets.judge(rows)
    print("\n".join(line for line, _ in verdicts) or "no row speaks about a target")
    return int(not verdicts or not all(met for _, met in verdicts))


def _read_rows(parser: argparse.ArgumentParser, files: list[str]) -> tuple[list[Row], list[dict[str, Any]]]:
    try:
        return numbers.read(files)
    except ValueError as error:
        parser.error(str(error))


def _print_numbers(parser: argparse.ArgumentParser, files: list[str], page: str | None) -> int:
    """Print the README's tables, or put them into `page`."""
    if not files:
        parser.error("numbers: name the files that --json wrote")
    text = numbers.section(*_read_rows(parser, files))
    if page is None:
        print(text)
        return 0
    try:
        numbers.write(Path(page), text)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _compare(parser: argparse.ArgumentParser, files: list[str], tolerance: float) -> int:
    """Print how shares of the limit changed from one file to another; 1 when one fell too far."""
    if len(files) != 2:
        parser.error("compare: name two files, the earlier first")
    try:
        verdicts = compare.compare(*(compare.read(Path(file)) for file in files), tolerance)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(line for line, _ in verdicts) or "no case is in both files")
    return int(not verdicts or not all(kept for _, kept in verdicts))


def _predict(path: str | None) -> int:
    """Print the predicted rows, and write them where `--json` says, in place of what is there."""
    rows = list(predict.rows())
    print("\n".join([report.HEADER, *map(report.line, rows)]))
    if path is not None:
        Path(path).write_text("".join(f"{row.to_json()}\n" for row in rows), encoding="utf-8")
    return 0


def _check_file(path: str | None, facts: dict[str, Any]) -> None:
    """Refuse to append rows of this machine to those of another.

    Raises:
        ValueError: the file holds rows of another machine.
    """
    if path is None or not Path(path).exists():
        return
    old, _ = numbers.read([path])
    if old:
        check_one_machine([*old, dataclasses.replace(old[0], status="pass", **facts)], path)


def _run(plan: list[Step], options: argparse.Namespace, facts: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if not options.md:
        print(report.HEADER, flush=True)
    with _open(options.json) as sink, _open(options.csv) as table, _progress(len(plan), options.quiet) as bar:

        def emit(row: Row) -> None:
            rows.append(row)
            if sink is not None:
                print(row.to_json(), file=sink, flush=True)
            if table is not None:
                liger_csv.append(row, table)
            if not options.md:
                bar.clear()
                print(report.line(row), flush=True)

        for step in plan:
            with _threads(step.threads) as threads:
                settings = runner.Settings(
                    rounds,
                    {**facts, "threads": threads, "sweep": step.sweep},
                    options.budget,
                    compare=not options.no_errors,
                    energy=not options.no_energy,
                    on_step=bar.set_postfix_str,
                )
                runner.run_case(step.config, partial(_build, step, options.backend), settings, emit)
            bar.update()
    return rows


def _build(step: Step, backends: Sequence[str]) -> Problem:
    """The problem of a step; several backends are providers of the same rounds."""
    problem: Problem = step.module.build(step.config, step.peers)
    return ours.on_each_backend(problem, backends) if len(backends) > 1 else problem


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """Torch's threads, and with them ours, for one case."""
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


class _NoBar:
    """Stands in for tqdm when it is not installed."""

    def update(self) -> None: ...

    def clear(self) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Any]:
    """A bar on stderr; silent when asked to be, or when stderr is not a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _NoBar()
        return
    disable = quiet or not sys.stderr.isatty()
    with tqdm(total=total, file=sys.stderr, disable=disable, unit="case") as bar:
        yield bar


def _backends(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in dispatch.ORDER:
            raise argparse.ArgumentTypeError(f"must name some of {', '.join(dispatch.ORDER)}; got {name!r}")
    return names


def _listing() -> str:
    lines = ["ops:"]
    for op, module in CASES.items():
        summary = (module.__doc__ or "").splitlines()[0]
        lines.append(f"  {op:<20}{summary}")
        lines.append(f"  {'':<20}shapes {', '.join(module.SHAPES)}; {', '.join(module.DTYPES)}")
    lines += ["  growth              tables over tokens, vocabulary, hidden, threads, gradient rows"]
    lines += ["  errors              every output and gradient against float64"]
    lines += ["  targets             judge the rows of --json files against the targets"]
    lines += ["  numbers             the README's tables from the rows of --json files"]
    lines += ["  compare             shares of the limit in two files, the earlier first"]
    lines += ["  predict             what the Triton kernels should take on GPUs; nothing runs"]
    lines += ["models (--shapes 256xNAME):"]
    lines += [f"  {name:<20}hidden {h}, vocabulary {v}" for name, (h, v) in MODELS.items()]
    lines += ["peers:"]
    lines += [f"  {peer.name:<20}{peer.summary}" for peer in peers.KNOWN.values()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokfuse bench", description="Time the ops beside their peers and the limits of this machine."
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="OP",
        help=f"some of {', '.join([*CASES, *VARIANT_OPS])}; or one of {', '.join(ALONE)}; "
        "behind targets, numbers and compare, files that --json wrote",
    )
    parser.add_argument("--list", action="store_true", help="describe ops and peers, and stop")
    parser.add_argument("--peers", help="names joined by commas, all, or none")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, first variant, 3 rounds: shows that it works"
    )
    parser.add_argument(
        "--shapes",
        help="512x49152,... (tokens x vocab, or tokens x hidden x vocab), or 256xMODEL with one of "
        + ", ".join(MODELS),
    )
    parser.add_argument("--dtype", help="float32,bfloat16,float16")
    parser.add_argument(
        "--backend",
        type=_backends,
        default=(),
        metavar="NAMES",
        help=f"force a backend of ours, or measure several side by side: some of {','.join(dispatch.ORDER)}",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variant", help="only this variant of the op's cases")
    parser.add_argument("--axes", help=f"for growth, some of {','.join(growth.AXES)}")
    parser.add_argument("--rounds", type=int, help=f"interleaved rounds (default {ROUNDS})")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        help=f"seconds of rounds per case; at least 3 rounds are made (default {BUDGET_S:g})",
    )
    parser.add_argument("--no-errors", action="store_true", help="skip float64, which is slow at large shapes")
    parser.add_argument("--no-energy", action="store_true", help="on a GPU, skip the second per provider that reads it")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="append rows as JSON lines, as they come")
    parser.add_argument("--csv", metavar="FILE", help="append rows as CSV in Liger's columns")
    parser.add_argument("--png", metavar="FILE", help="draw the rows at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=compare.TOLERANCE,
        help=f"for compare, how far a share of the limit may fall (default {compare.TOLERANCE:g})",
    )
    parser.add_argument("--write", metavar="FILE", help="for numbers, put them into this file")
    parser.add_argument("--md", action="store_true", help="print Markdown tables at the end")
    return parser
