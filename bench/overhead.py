"""Case `overhead`: one call with one token and a vocabulary of 8, so that only the call overhead is timed.

Variants: `token_stats` without and with gradient, `policy_loss`, and `range`, the cost of a range of
runtime/core/ranges.py without a profiler. `limit_native` is the native call with the same arguments,
repeated inside one public call. `torch_eager` is the cheapest torch op on the same logits, one
log_softmax. Caches are warm. Times are per call.
"""

from collections.abc import Callable
from typing import Any

import torch

from tokfuse.bench import ours, peers
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Factory, Problem, Unsupported, generator, make_batch, make_logits
from tokfuse.runtime.core import native
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.ops import policy_loss, token_stats

OP = "overhead"
SHAPES = ("1x8",)
QUICK_SHAPES = ("1x8",)
DTYPES = ("float32",)
VARIANTS = ("token_stats", "token_stats,grad", "policy_loss", "range")
CASES = tuple(("call", variant) for variant in VARIANTS)

CALLS = 300
NATIVE_CALLS = 5000  # the public call around them adds less than one percent
NATIVE_NAME = {"token_stats": "token_stats_fwd", "policy_loss": "policy_loss"}


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    if config.device != "cpu":
        raise Unsupported("this case measures calls on the CPU only: pass --device cpu")
    if config.variant == "range":
        return _range(config, peer_names)
    call = _call(config)
    native_name = NATIVE_NAME[config.variant.partition(",")[0]]
    return Problem(
        config,
        ours={"tokfuse": lambda: ours.provider(_repeat(call()), calls=CALLS)},
        peers={name: _peer_factory(name, config) for name in peer_names},
        limits={"limit_native": lambda: _native_provider(native_name, call())},
        bounds=("native",),
        cold=False,
        bounds_peers=False,
    )


def _range(config: Config, peer_names: list[str]) -> Problem:
    """Return the provider of an empty function in a range without a profiler. `limit_native` is the function only."""

    def nothing() -> None:
        return None

    inside = ranged("overhead")(nothing)
    return Problem(
        config,
        ours={"tokfuse": lambda: Provider(_repeat(inside), backend="python", calls=CALLS)},
        peers={name: _peer_factory(name, config) for name in peer_names},
        limits={"limit_native": lambda: Provider(_repeat(nothing), backend="python", calls=CALLS)},
        bounds=("native",),
        cold=False,
        bounds_peers=False,
    )


def _call(config: Config) -> Callable[[], Callable[[], Any]]:
    """Return a factory of the call, so that a missing op is detected when the provider is created."""
    gen = generator(config)
    logits = make_logits(config, gen)
    target = torch.zeros(config.tokens, dtype=torch.int64)
    logp = torch.log_softmax(logits.float(), -1).gather(-1, target[:, None]).squeeze(-1)
    batch = make_batch(target, logp, gen)

    def make() -> Callable[[], Any]:
        if config.variant == "policy_loss":
            loss = ours.public("policy_loss")
            arguments = ours.policy_arguments(batch, 0.0)
            return lambda: loss(logp, **arguments)
        stats = ours.public("token_stats")
        given = logits.requires_grad_() if config.variant.endswith("grad") else logits
        return lambda: stats(given, target)

    return make


def _repeat(call: Callable[[], Any]) -> Callable[[], Outputs]:
    def run() -> Outputs:
        for _ in range(CALLS):
            call()
        return {}

    return run


def _native_provider(name: str, call: Callable[[], Any]) -> Provider:
    """Repeat the native function inside one public call, while its arguments are alive."""
    module: Any = native.module()
    bare = getattr(module, name, None)
    if bare is None:
        raise Unsupported(native.why_unusable() or f"the native module has no {name}")
    seen = 0

    def many(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        for _ in range(NATIVE_CALLS):
            result = bare(*args)
        return result

    def run() -> Outputs:
        # Use the general path, which calls the kernel directly. The whole-call functions would hide it.
        kept = {op: op.eager_cpu for op in (token_stats, policy_loss)}
        setattr(module, name, many)
        try:
            for op in kept:
                op.eager_cpu = lambda main: None
            call()
        finally:
            setattr(module, name, bare)
            for op, eager_cpu in kept.items():
                op.eager_cpu = eager_cpu
        return {}

    run()
    if seen == 0:
        raise Unsupported(f"the op did not call the native {name}")
    return Provider(run, backend="cpu", calls=NATIVE_CALLS)


def _peer_factory(name: str, config: Config) -> Factory:
    def factory() -> Provider:
        if name != "torch_eager":
            raise Unsupported("this case has only the peer torch_eager")
        logits = make_logits(config, generator(config))

        def run() -> Outputs:
            for _ in range(CALLS):
                torch.log_softmax(logits, -1)
            return {}

        note = "one log_softmax only"
        return peers.provider(name, run, calls=CALLS, note=note)

    return factory
