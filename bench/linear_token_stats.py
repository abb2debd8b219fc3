"""Case `linear_token_stats`: the same statistics from hidden states and the lm_head weight.

forward: without gradients. forward+backward: gradients of a weighted sum of logp and entropy with
respect to the hidden states and the weight.
"""

import torch

from tokfuse.bench import exact, ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Factory, Problem, generator, make_head, on_device, sample_target

OP = "linear_token_stats"
SHAPES = ("512x576x49152", "256x2048x151936")
QUICK_SHAPES = ("64x64x8192",)
DTYPES = ("float32",)
CASES = (("forward", "all"), ("forward+backward", "logp,entropy"))


class _Inputs:
    """Hidden states, weight, targets, and the incoming gradients of logp and entropy."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        self.hidden, self.weight = make_head(config, gen)
        self.target = sample_target(self.hidden.float() @ self.weight.float().T, gen)
        self.by_logp = torch.randn(config.tokens, generator=gen, device=gen.device) / config.tokens
        self.by_entropy = torch.randn(config.tokens, generator=gen, device=gen.device) / config.tokens


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    on_device(data, config.device)
    backward = config.mode == "forward+backward"
    gemms = 3 if backward else 1
    product = 2 * config.tokens * config.hidden * config.vocab
    head_bytes = (config.tokens + config.vocab) * config.hidden * config.item_bytes

    def answer() -> Outputs:
        logits = exact.head_logits(data.hidden, data.weight)
        out = exact.token_stats(logits, data.target)
        if backward:
            grad = exact.grad_logits(logits, data.target, data.by_logp, data.by_entropy)
            out |= exact.through_head(grad, data.hidden, data.weight)
        return out

    return Problem(
        config,
        ours={"tokfuse": lambda: _ours(config, data)},
        peers={name: _peer_factory(name, config, data) for name in peer_names},
        limits={"limit_gemm": lambda: probes.gemm_probe(data.hidden, data.weight, config.tokens, True, backward)},
        exact=answer,
        bounds=("gemm",),
        bytes_moved=head_bytes * (2 if backward else 1),
        bytes_formula="(T + V) H " + str(config.item_bytes) + (" x 2: inputs, gradients" if backward else ": inputs"),
        flops=gemms * product,
        flops_formula=f"{2 * gemms} T H V: {gemms} matrix product" + ("s" if backward else ""),
    )


def _ours(config: Config, data: _Inputs) -> Provider:
    op = ours.public("linear_token_stats")
    if config.mode == "forward":

        def forward() -> Outputs:
            return ours.stats_outputs(op(data.hidden, data.weight, data.target))

        return ours.provider(forward)
    hidden, weight = data.hidden.detach().requires_grad_(), data.weight.detach().requires_grad_()

    def both() -> Outputs:
        stats = op(hidden, weight, data.target)
        grads = torch.autograd.grad((stats.logp, stats.entropy), (hidden, weight), (data.by_logp, data.by_entropy))
        return {**ours.stats_outputs(stats), "grad_hidden": grads[0], "grad_weight": grads[1]}

    return ours.provider(both)


def _peer_factory(name: str, config: Config, data: _Inputs) -> Factory:
    def factory() -> Provider:
        peers.check_dtype(name, config.dtype)
        peers.check_device(name, config.device)
        function = peers.linear_stats_fn(name, everything=config.variant == "all")
        if name.startswith("torch_compile"):
            function = peers.compiled(function)
        if config.mode == "forward":

            def forward() -> Outputs:
                with torch.no_grad():
                    return function(data.hidden, data.weight, data.target)

            return peers.provider(name, forward)
        hidden = data.hidden.detach().requires_grad_()
        weight = data.weight.detach().requires_grad_()

        def both() -> Outputs:
            stats = function(hidden, weight, data.target)
            names = [n for n in ("logp", "entropy") if n in stats]
            incoming = {"logp": data.by_logp, "entropy": data.by_entropy}
            grads = torch.autograd.grad(
                [stats[n] for n in names], (hidden, weight), [incoming[n].to(stats[n].dtype) for n in names]
            )
            # without the entropy this is the gradient of another function and cannot be compared
            if "entropy" in stats:
                stats = {**stats, "grad_hidden": grads[0], "grad_weight": grads[1]}
            return stats

        return peers.provider(name, both)

    return factory
