"""The cases of a benchmark command line: shapes, peers and threads, in order."""

import argparse
from dataclasses import dataclass
from types import ModuleType

from tokfuse.bench import (
    advantage,
    cross_entropy,
    distill_step,
    growth,
    influence,
    linear_cross_entropy,
    linear_paired_divergence,
    linear_token_stats,
    overhead,
    paired_divergence,
    peers,
    policy_step,
    policy_step_hidden,
    token_stats,
)
from tokfuse.bench.problem import Config

CASES: dict[str, ModuleType] = {
    module.OP: module
    for module in (
        token_stats,
        policy_step,
        policy_step_hidden,
        linear_token_stats,
        cross_entropy,
        linear_cross_entropy,
        paired_divergence,
        distill_step,
        linear_paired_divergence,
        influence,
        advantage,
        overhead,
    )
}
# Ops that are a variant of a case: `bench gae` is `bench advantage --variant gae`.
VARIANT_OPS = {variant: advantage.OP for variant in advantage.VARIANTS}
ALONE = ("all", "growth", "errors", "targets", "numbers", "compare", "predict")
# Names for `--shapes 256xllama3`: hidden size and vocabulary of published model configurations.
MODELS = {
    "smollm2": (576, 49152),  # SmolLM2-135M
    "qwen2.5": (896, 151936),  # Qwen2.5-0.5B
    "llama3": (2048, 128256),  # Llama-3.2-1B
    "gemma2": (2304, 256000),  # gemma-2-2b
}


@dataclass(frozen=True)
class Step:
    """One case of a run: its module, configuration and peers, and its position in a sweep."""

    module: ModuleType
    config: Config
    peers: list[str]
    threads: int | None = None
    sweep: str = ""


def make_plan(options: argparse.Namespace) -> list[Step]:
    """Return every case with its peers, in the order of execution.

    Raises:
        ValueError: unknown op, variant, shape or peer.
    """
    plan = []
    for name in CASES if options.names == ["all"] else options.names:
        op, variant = VARIANT_OPS.get(name, name), options.variant
        if op not in CASES:
            known = ", ".join([*CASES, *VARIANT_OPS, *ALONE])
            raise ValueError(f"bench: OP must be one of {known}; got {name!r}.")
        if name in VARIANT_OPS:
            if variant not in (None, name):
                raise ValueError(f"bench: {name} is a variant itself; got --variant {variant}. Remove --variant.")
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
                    config = Config(op, mode, variant_, dtype, **sizes, seed=options.seed, device=options.device)
                    plan.append(Step(module, config, names))
    return plan


def make_growth_plan(options: argparse.Namespace) -> list[Step]:
    """Return every point of the chosen sweeps.

    Raises:
        ValueError: unknown axis or peer, or an option that the sweep sets itself.
    """
    for name in ("shapes", "dtype", "variant"):
        if getattr(options, name) is not None:
            raise ValueError(f"bench: growth chooses its own cases, so --{name} must not be given.")
    axes = growth.choose(options.axes)
    names = peers.choose(options.peers or growth.PEERS, "float32")
    return [
        Step(CASES[config.op], config, names, threads, sweep.axis)
        for sweep in growth.sweeps(options.seed, options.quick, options.device)
        if sweep.axis in axes
        for config, threads in sweep.points()
    ]


def choose_cases(module: ModuleType, variant: str | None, quick: bool) -> list[tuple[str, str]]:
    """Return (mode, variant) of the cases of an op; with `quick` only the first one.

    Raises:
        ValueError: no case of the op has this variant.
    """
    cases = [case for case in module.CASES if variant in (None, case[1])]
    if not cases:
        known = ", ".join(sorted({name for _, name in module.CASES}))
        raise ValueError(f"bench: --variant of {module.OP} must be one of {known}; got {variant!r}.")
    return cases[:1] if quick else cases


def parse_shape(op: str, text: str, count: int) -> dict[str, int]:
    """Return the sizes by name of "512x49152", "512x576x49152" or "512xsmollm2" (a name of `MODELS`).

    Raises:
        ValueError: the text is neither `count` positive integers joined by "x", nor tokens and a model.
    """
    names = ("tokens", "vocab") if count == 2 else ("tokens", "hidden", "vocab")
    parts = text.strip().split("x", 1)
    if parts[-1] in MODELS and op != advantage.OP:
        hidden, vocab = MODELS[parts[-1]]
        parts = [parts[0], *([str(hidden)] if count == 3 else []), str(vocab)]
    else:
        parts = text.strip().split("x")
    if len(parts) != count or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(
            f"bench: --shapes of {op} must be {'x'.join(names)}; got {text!r}. "
            f"A model name means its sizes: 256x{{{', '.join(MODELS)}}}."
        )
    return dict(zip(names, map(int, parts), strict=True))
