"""`python -m tokfuse bench OP...`: rows for some ops or all, the table of errors, or the targets.

OMP_WAIT_POLICY=passive python -m tokfuse bench policy_step token_stats --json rows.jsonl --md
OMP_WAIT_POLICY=passive python -m tokfuse bench all --quick
python -m tokfuse bench gae
python -m tokfuse bench growth --axes tokens,rows --md
python -m tokfuse bench errors
python -m tokfuse bench targets rows.jsonl
python -m tokfuse bench numbers rows.jsonl
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import torch

from tokfuse.bench import (
    advantage,
    errors,
    growth,
    influence,
    linear_token_stats,
    machine,
    numbers,
    overhead,
    peers,
    policy_step,
    policy_step_hidden,
    report,
    runner,
    targets,
    token_stats,
)
from tokfuse.bench.problem import Config
from tokfuse.bench.row import Row

CASES: dict[str, ModuleType] = {
    module.OP: module
    for module in (
        token_stats, policy_step, policy_step_hidden, linear_token_stats, influence, advantage,
        overhead,
    )
}  # fmt: skip
# `bench gae` is `bench advantage --variant gae`: an op that is one variant of a case.
VARIANT_OPS = {variant: advantage.OP for variant in advantage.VARIANTS}
ALONE = ("all", "growth", "errors", "targets", "numbers")
ROUNDS, QUICK_ROUNDS = 15, 3
BUDGET_S = 120.0


@dataclass(frozen=True)
class Step:
    """One case of a run: its module, its configuration, its peers, and where it is in a sweep."""

    module: ModuleType
    config: Config
    peers: list[str]
    threads: int | None = None
    sweep: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark of the command line; returns 1 when a row of ours is an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        print(_listing())
        return 0
    command, *files = options.names or [""]
    if command == "":
        parser.error("name an op; `--list` shows them")
    if options.threads:
        torch.set_num_threads(options.threads)
    if command == "targets":
        return _judge(parser, files)
    if command == "numbers":
        return _print_numbers(parser, files, options.write)
    if options.write is not None:
        parser.error("--write is for numbers")
    if command in ALONE and files:
        parser.error(f"{command} stands alone; got {' '.join(files)} behind it")
    if options.axes is not None and command != "growth":
        parser.error("--axes is for growth")
    machine.warn_about_waiting()
    if command == "errors":
        return errors.main(options)
    try:
        plan = make_growth_plan(options) if command == "growth" else make_plan(options)
    except ValueError as error:
        parser.error(str(error))
    rows = _run(plan, options, machine.facts(recorded_command(argv)))
    if options.md:
        print(growth.tables(rows) if command == "growth" else report.markdown(rows))
    return int(any(row.role == "ours" and row.status == "error" for row in rows))


def recorded_command(argv: Sequence[str]) -> str:
    """The command line as rows keep it: without where the rows go, which is nobody's business."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--json" and not word.startswith("--json="):
            kept.append(word)
        skip = word == "--json"
    return "python -m tokfuse bench " + shlex.join(kept)


def make_plan(options: argparse.Namespace) -> list[Step]:
    """Every case with its peers, in the order they will run.

    Raises:
        ValueError: an op, variant, shape or peer that is not known.
    """
    plan = []
    for name in CASES if options.names == ["all"] else options.names:
        op, variant = VARIANT_OPS.get(name, name), options.variant
        if op not in CASES:
            known = ", ".join([*CASES, *VARIANT_OPS, *ALONE])
            raise ValueError(f"bench: OP must be one of {known}; got {name!r}.")
        if name in VARIANT_OPS:
            if variant not in (None, name):
                raise ValueError(f"bench: {name} is a variant itself; got --variant {variant}.")
            variant = name
        module = CASES[op]
        quick = module.QUICK_SHAPES if options.quick else module.SHAPES
        shapes = options.shapes.split(",") if options.shapes else quick
        dtypes = options.dtype.split(",") if options.dtype else module.DTYPES
        for shape in shapes:
            sizes = parse_shape(op, shape, module.SHAPES[0].count("x") + 1)
            for dtype in dtypes:
                names = peers.choose(options.peers, dtype)
                for mode, variant_ in choose_cases(module, variant, options.quick):
                    config = Config(op, mode, variant_, dtype, **sizes, seed=options.seed)
                    plan.append(Step(module, config, names))
    return plan


def make_growth_plan(options: argparse.Namespace) -> list[Step]:
    """Every point of the wanted sweeps.

    Raises:
        ValueError: an axis or peer that is not known, or an option that a sweep sets itself.
    """
    for name in ("shapes", "dtype", "variant"):
        if getattr(options, name) is not None:
            raise ValueError(f"bench: growth sets the shapes itself; --{name} cannot be honoured.")
    axes = growth.choose(options.axes)
    names = peers.choose(options.peers or growth.PEERS, "float32")
    return [
        Step(CASES[config.op], config, names, threads, sweep.axis)
        for sweep in growth.sweeps(options.seed, options.quick)
        if sweep.axis in axes
        for config, threads in sweep.points()
    ]


def choose_cases(module: ModuleType, variant: str | None, quick: bool) -> list[tuple[str, str]]:
    """(mode, variant) of the cases of an op to run; `quick` is the first one of those asked for.

    Raises:
        ValueError: no case of the op has this variant.
    """
    cases = [case for case in module.CASES if variant in (None, case[1])]
    if not cases:
        known = ", ".join(sorted({name for _, name in module.CASES}))
        raise ValueError(
            f"bench: --variant of {module.OP} must be one of {known}; got {variant!r}."
        )
    return cases[:1] if quick else cases


def parse_shape(op: str, text: str, count: int) -> dict[str, int]:
    """ "512x49152" or "512x576x49152" as sizes by name.

    Raises:
        ValueError: not `count` positive integers joined by "x".
    """
    names = ("tokens", "vocab") if count == 2 else ("tokens", "hidden", "vocab")
    parts = text.strip().split("x")
    if len(parts) != count or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"bench: --shapes of {op} must be {'x'.join(names)}; got {text!r}.")
    return dict(zip(names, map(int, parts), strict=True))


def _judge(parser: argparse.ArgumentParser, files: list[str]) -> int:
    """Print the verdicts over rows read from files; 1 when one is missed or there is none."""
    if not files:
        parser.error("targets: name the files that --json wrote")
    rows, _ = numbers.read(files)
    verdicts = targets.judge(rows)
    print("\n".join(line for line, _ in verdicts) or "no row speaks about a target")
    return int(not verdicts or not all(met for _, met in verdicts))


def _print_numbers(parser: argparse.ArgumentParser, files: list[str], page: str | None) -> int:
    """Print the README's tables, or put them into `page`."""
    if not files:
        parser.error("numbers: name the files that --json wrote")
    text = numbers.section(*numbers.read(files))
    if page is None:
        print(text)
        return 0
    try:
        numbers.write(Path(page), text)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _run(plan: list[Step], options: argparse.Namespace, facts: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if not options.md:
        print(report.HEADER, flush=True)
    with _open(options.json) as sink, _progress(len(plan)) as bar:

        def emit(row: Row) -> None:
            rows.append(row)
            if sink is not None:
                print(row.to_json(), file=sink, flush=True)
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
                    on_step=bar.set_postfix_str,
                )
                build = partial(step.module.build, step.config, step.peers)
                runner.run_case(step.config, build, settings, emit)
            bar.update()
    return rows


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
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr; silent when stderr is not a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _NoBar()
        return
    disable = not sys.stderr.isatty()
    with tqdm(total=total, file=sys.stderr, disable=disable, unit="case") as bar:
        yield bar


def _listing() -> str:
    lines = ["ops:"]
    for op, module in CASES.items():
        summary = (module.__doc__ or "").splitlines()[0]
        lines.append(f"  {op:<20}{summary}")
        lines.append(f"  {'':<20}shapes {', '.join(module.SHAPES)}; {', '.join(module.DTYPES)}")
    lines += [
        "  growth              tables over tokens, vocabulary, hidden, threads, gradient rows"
    ]
    lines += ["  errors              every output and gradient against float64"]
    lines += ["  targets             judge the rows of --json files against the targets"]
    lines += ["  numbers             the README's tables from the rows of --json files", "peers:"]
    lines += [f"  {peer.name:<20}{peer.summary}" for peer in peers.KNOWN.values()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokfuse bench",
        description="Time the ops beside their peers and the limits of this machine.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="OP",
        help=f"some of {', '.join([*CASES, *VARIANT_OPS])}; or one of {', '.join(ALONE)}; "
        "behind targets and numbers, files that --json wrote",
    )
    parser.add_argument("--list", action="store_true", help="describe ops and peers, and stop")
    parser.add_argument("--peers", help="names joined by commas, all, or none")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes, first variant, 3 rounds: shows that it works",
    )
    parser.add_argument(
        "--shapes", help="512x49152,... (tokens x vocab, or tokens x hidden x vocab)"
    )
    parser.add_argument("--dtype", help="float32,bfloat16,float16")
    parser.add_argument("--variant", help="only this variant of the op's cases")
    parser.add_argument("--axes", help=f"for growth, some of {','.join(growth.AXES)}")
    parser.add_argument("--rounds", type=int, help=f"interleaved rounds (default {ROUNDS})")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        help=f"seconds of rounds per case; at least 3 rounds are made (default {BUDGET_S:g})",
    )
    parser.add_argument(
        "--no-errors", action="store_true", help="skip float64, which is slow at large shapes"
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="append rows as JSON lines, as they come")
    parser.add_argument("--write", metavar="FILE", help="for numbers, put them into this file")
    parser.add_argument("--md", action="store_true", help="print Markdown tables at the end")
    return parser  # fmt: skip
