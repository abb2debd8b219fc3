"""The ops of tokfuse as providers, with the backend that ran the call."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

import tokfuse
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import CLIP, Batch, Factory, Problem, Unsupported
from tokfuse.runtime.backends import triton_backend
from tokfuse.runtime.core import dispatch
from tokfuse.runtime.core.errors import BackendUnavailable
from tokfuse.runtime.core.native import release_workspace

T = TypeVar("T")
STATS = ("logp", "entropy", "lse", "sum_sq", "top1")


def public(name: str) -> Any:
    """Return a public name of tokfuse, or raise `Unsupported` if this version does not have it."""
    try:
        return getattr(tokfuse, name)
    except (AttributeError, ModuleNotFoundError) as error:
        raise Unsupported(f"tokfuse.{name} is not in this version") from error


def provider(run: Callable[[], Outputs], before: Callable[[], None] | None = None, calls: int = 1) -> Provider:
    """Wrap a call, and find its backend by forcing each backend in turn, fastest first.

    A forced backend runs the call or raises an error, so the first backend that runs is the one that
    dispatch would choose. The timed calls are not forced. The pure-torch reference and Triton's interpreter
    are marked as a fallback. The note of a reference call contains the reason of the last faster backend.
    """
    prepare = before or (lambda: None)
    forced = dispatch.forced_backend()
    reasons = []
    for name in dispatch.ORDER if forced is None else (forced,):
        prepare()
        try:
            with dispatch.backend(name):
                run()
        except BackendUnavailable as error:
            reasons.append(f"{name}: {error}")
            continue
        interpreted = name == "triton" and triton_backend.interpreting()
        fallback = interpreted or name == "reference"
        note = f"ran on the pure-torch reference; {reasons[-1]}" if fallback and reasons else ""
        note = "ran in Triton's interpreter, so its time is not meaningful" if interpreted else note
        return Provider(
            run, prepare, release_workspace, name, tokfuse.__version__, note[:300], calls=calls, fallback=fallback
        )
    raise Unsupported("; ".join(reasons)[:600])


def on_each_backend(problem: Problem, backends: Sequence[str]) -> Problem:
    """Replace each tokfuse provider by one provider per backend, named `<backend>:<provider>`."""
    problem.ours = {
        f"{backend}:{name}": partial(_forced, backend, factory)
        for backend in backends
        for name, factory in problem.ours.items()
    }
    return problem


def _forced(backend: str, factory: Factory) -> Provider:
    """Return the provider of `factory` with all its calls forced to one backend."""
    with dispatch.backend(backend):
        made = factory()
    return dataclasses.replace(made, run=_inside(backend, made.run), before=_inside(backend, made.before))


def _inside(backend: str, call: Callable[[], T]) -> Callable[[], T]:
    def run() -> T:
        with dispatch.backend(backend):
            return call()

    return run


def stats_outputs(stats: Any) -> Outputs:
    """Return the statistics of a `TokenStats` by name."""
    return {name: getattr(stats, name) for name in STATS}


def step_outputs(step: Any) -> Outputs:
    """Return the loss, statistics and gradients of a `PolicyStep` by name."""
    out = {"loss": step.loss, **stats_outputs(step.stats)}
    for name in ("grad_logits", "grad_hidden", "grad_weight"):
        value = getattr(step, name, None)
        if isinstance(value, torch.Tensor):
            out[name] = value
    return out


def objective(entropy_coef: float) -> Any:
    """Return PPO-clip at token level with token mean, and an entropy bonus if the coefficient is not 0."""
    return public("Objective")(
        shape=public("PPOClip")(low=CLIP, high=CLIP), entropy_coef=entropy_coef, aggregation="token_mean"
    )


def policy_arguments(batch: Batch, entropy_coef: float) -> dict[str, Any]:
    """Return the keyword arguments that every policy op shares."""
    return {
        "old_logp": batch.old_logp,
        "advantage": batch.advantage,
        "objective": objective(entropy_coef),
        "normalizer": float(batch.num_tokens),
    }
