"""Case `influence`: the overhead of gradient norms and sketches in `policy_step` from hidden states.

`tokfuse` is the step without influence. `tokfuse_norms` adds the three norms of each token, computed from
the step's statistics and its gradient of the hidden states. `tokfuse_sketches` is the step with
`influence=InfluenceSpec(rank)`: norms, and one (rank, rank) sketch per sequence. The ratio column is the
overhead. No peer has this op.
"""

from typing import Any

import torch

from tokfuse.bench import exact, ours, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.peers import KNOWN
from tokfuse.bench.problem import (
    Config,
    Factory,
    Problem,
    Unsupported,
    generator,
    make_batch,
    make_head,
    on_device,
    sample_target,
)
from tokfuse.runtime.ops.influence import projections
from tokfuse.runtime.reference import influence as reference

OP = "influence"
SHAPES = ("512x576x49152",)
QUICK_SHAPES = ("64x64x8192",)
DTYPES = ("float32",)
CASES = (("step", "rank=64"),)
OURS = ("tokfuse", "tokfuse_norms", "tokfuse_sketches")


class _Inputs:
    """Hidden states, weight and batch. Every row has a gradient."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        self.rank = int(config.variant.removeprefix("rank="))
        hidden, weight = make_head(config, gen)
        target = sample_target(hidden @ weight.T, gen)
        logp = exact.token_stats(hidden @ weight.T, target)["logp"]
        self.batch = make_batch(target, logp, gen)
        self.hidden, self.weight = hidden.requires_grad_(), weight.requires_grad_()
        length = config.tokens // self.batch.num_seqs
        self.cu_seqlens = torch.arange(0, config.tokens + 1, length, dtype=torch.int32)


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    on_device(data, config.device)
    product = 2 * config.tokens * config.hidden * config.vocab
    extra = 4 * config.tokens * data.rank * (config.hidden + data.rank)
    return Problem(
        config,
        ours={
            "tokfuse": lambda: _step(data),
            "tokfuse_norms": lambda: _norms(data),
            "tokfuse_sketches": lambda: _sketches(data),
        },
        peers={name: _no_peer(name) for name in peer_names},
        limits={
            "limit_gemm": lambda: probes.gemm_probe(
                data.hidden.detach(), data.weight.detach(), config.tokens, True, True
            )
        },
        exact=lambda: _answer(data),
        bounds=("gemm",),
        bytes_moved=2 * (config.tokens + config.vocab) * config.hidden * config.item_bytes,
        bytes_formula=f"2 (T + V) H {config.item_bytes}: inputs, gradients",
        flops=3 * product + extra,
        flops_formula="6 T H V, and 4 T r (H + r) for the sketches",
    )


def _no_peer(name: str) -> Factory:
    def factory() -> Provider:
        raise Unsupported(f"{KNOWN[name].distribution} has no such op")

    return factory


def _answer(data: _Inputs) -> Outputs:
    """Return norms and sketches, computed by definition from the float64 gradients."""
    hidden = data.hidden.detach().double()
    out = exact.policy_step(exact.head_logits(hidden, data.weight.detach()), data.batch, 0.0)
    grad_logits = out.pop("grad_logits")
    out |= exact.through_head(grad_logits, hidden, data.weight.detach())
    pair = projections(data.rank, hidden.shape[1], 0, hidden.device)
    longest = int(data.cu_seqlens.diff().max())
    token_norms = grad_logits.norm(dim=1)
    return out | {
        "grad_token_norms": token_norms,
        "grad_head_norms": token_norms * hidden.norm(dim=1),
        "grad_hidden_norms": out["grad_hidden"].norm(dim=1),
        "grad_sketches": reference.sketch(out["grad_hidden"], hidden, data.cu_seqlens, pair, longest),
    }


def _call(data: _Inputs, **extra: Any) -> Any:
    arguments = ours.policy_arguments(data.batch, 0.0)
    return ours.public("policy_step")(
        hidden=data.hidden, weight=data.weight, target=data.batch.target, **arguments, **extra
    )


def _step(data: _Inputs) -> Provider:
    return ours.provider(lambda: ours.step_outputs(_call(data)))


def _norms(data: _Inputs) -> Provider:
    influence, policy_loss = ours.public("influence"), ours.public("policy_loss")
    arguments = ours.policy_arguments(data.batch, 0.0)

    def run() -> Outputs:
        step = _call(data)
        logp = step.stats.logp.detach().requires_grad_()
        (coefficient,) = torch.autograd.grad(policy_loss(logp, **arguments).loss, logp)
        token_norms = influence.logit_norms(step.stats, coefficient)
        return ours.step_outputs(step) | {
            "grad_token_norms": token_norms,
            "grad_head_norms": influence.head_norms(token_norms, data.hidden),
            "grad_hidden_norms": influence.hidden_norms(step.grad_hidden),
        }

    return ours.provider(run)


def _sketches(data: _Inputs) -> Provider:
    spec = ours.public("influence").InfluenceSpec(rank=data.rank)

    def run() -> Outputs:
        step = _call(data, cu_seqlens=data.cu_seqlens, influence=spec)
        found = step.influence
        return ours.step_outputs(step) | {
            "grad_token_norms": found.token_norms,
            "grad_head_norms": found.head_norms,
            "grad_hidden_norms": found.hidden_norms,
            "grad_sketches": found.sketches,
        }

    return ours.provider(run)
