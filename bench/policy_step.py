"""Case `policy_step`: the loss side of one update from given logits.

It computes the statistics, the PPO-clip objective with token mean, and the gradient with respect to the
logits. Variants: the gradient includes the entropy bonus ("entropy=0.01"), or the entropy is only a
metric ("entropy=0"). `tokfuse_` writes the gradient into the logits in place. The logits are restored
outside the timed region.
"""

import torch
import torch.nn.functional as F

from tokfuse.bench import exact, ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import (
    Config,
    Factory,
    Problem,
    Unsupported,
    generator,
    make_batch,
    make_logits,
    on_device,
    sample_target,
)

OP = "policy_step"
SHAPES = ("512x49152", "256x151936")
QUICK_SHAPES = ("64x8192",)
DTYPES = ("float32", "bfloat16")
CASES = (("step", "entropy=0.01"), ("step", "entropy=0"))
OURS = ("tokfuse_", "tokfuse")

# FLOPs per logit: statistics 19, gradient 16, see token_stats. The objective needs only FLOPs per token.
FLOPS = 35


class _Inputs:
    """Logits, and a batch whose old log-probabilities are close to the exact ones."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        self.entropy_coef = float(config.variant.removeprefix("entropy="))
        self.logits = make_logits(config, gen)
        target = sample_target(self.logits, gen)
        stats = exact.token_stats(self.logits, target)
        self.batch = make_batch(target, stats["logp"], gen)


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    on_device(data, config.device)
    size = config.tokens * config.vocab
    return Problem(
        config,
        ours={"tokfuse_": lambda: _ours_in_place(data), "tokfuse": lambda: _ours(data)},
        peers={name: _peer_factory(name, config, data) for name in peer_names},
        limits={
            "limit_read": lambda: probes.read_probe(data.logits),
            "limit_copy": lambda: probes.copy_probe(data.logits),
            "limit_exp": lambda: probes.exp_probe(size, config.device),
        },
        exact=lambda: exact.policy_step(data.logits, data.batch, data.entropy_coef),
        bounds=("copy", "exp"),
        bytes_moved=2 * size * config.item_bytes,
        bytes_formula=f"2 T V {config.item_bytes}: one read, one write",
        flops=FLOPS * size,
        flops_formula=f"{FLOPS} T V, an exp counted as 12",
    )


def _ours(data: _Inputs) -> Provider:
    op = ours.public("policy_step")
    arguments = ours.policy_arguments(data.batch, data.entropy_coef)

    def run() -> Outputs:
        step = op(logits=data.logits, target=data.batch.target, **arguments)
        return ours.step_outputs(step)

    return ours.provider(run)


def _ours_in_place(data: _Inputs) -> Provider:
    op = ours.public("policy_step_")
    arguments = ours.policy_arguments(data.batch, data.entropy_coef)
    work = data.logits.clone()

    def restore() -> None:
        work.copy_(data.logits)

    def run() -> Outputs:
        return ours.step_outputs(op(work, target=data.batch.target, **arguments))

    return ours.provider(run, restore)


def _peer_factory(name: str, config: Config, data: _Inputs) -> Factory:
    def factory() -> Provider:
        peers.check_dtype(name, config.dtype)
        peers.check_device(name, config.device)
        leaf = data.logits.detach().requires_grad_()
        batch = data.batch
        if name == "cross_entropy":

            def cross_entropy() -> Outputs:
                torch.autograd.grad(F.cross_entropy(leaf, batch.target), leaf)
                return {}

            note = "forward and backward of another loss: no entropy, no ratio"
            return peers.provider(name, cross_entropy, note=note)
        if name == "liger_grpo":
            if data.entropy_coef:
                raise Unsupported("has no entropy bonus")
            loss_fn = peers.liger_grpo(leaf, batch)

            def grpo() -> Outputs:
                loss = loss_fn()
                (grad,) = torch.autograd.grad(loss, leaf)
                return {"loss": loss, "grad_logits": grad}

            return peers.provider(name, grpo, note="the time includes the copy to one more position")
        stats_fn = peers.token_stats_fn(name, batch.num_seqs, everything=False, entropy_grad=data.entropy_coef != 0)

        def step(logits: torch.Tensor) -> tuple[torch.Tensor, Outputs]:
            stats = stats_fn(logits, batch.target)
            return peers.clip_loss(stats, batch, data.entropy_coef), stats

        function = peers.compiled(step) if name.startswith("torch_compile") else step

        def run() -> Outputs:
            loss, stats = function(leaf)
            (grad,) = torch.autograd.grad(loss, leaf)
            return {"loss": loss, **stats, "grad_logits": grad}

        return peers.provider(name, run)

    return factory
