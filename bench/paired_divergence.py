"""Case `paired_divergence`: the divergence of two tensors of logits, forward and forward+backward.

Variants: the Jensen-Shannon divergence ("jsd") and KL(Q || P) ("kl_forward"). Peers compute the same with
log_softmax and, for the JSD, the log of the mixture, like TRL's GKD trainer. The gradient is the gradient
of a weighted sum over the tokens, with respect to the logits of P.
"""

import math

import torch

from tokfuse.bench import exact, ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Factory, Problem, Unsupported, generator, make_logits

OP = "paired_divergence"
SHAPES = ("512x49152", "256x151936")
QUICK_SHAPES = ("64x8192",)
DTYPES = ("float32", "bfloat16")
CASES = (("forward", "jsd"), ("forward+backward", "jsd"), ("forward", "kl_forward"), ("forward+backward", "kl_forward"))
BETA = 0.5

# FLOPs per input and logit: max, subtract, exp (12), sum. Per pair: two logarithms (12 each), 8 more.
FORWARD_FLOPS = 2 * 15 + 32
# FLOPs per pair: two exps and a logarithm (12 each), 8 more.
BACKWARD_FLOPS = 44
PLAIN = ("torch_eager", "torch_eager_f32", "torch_compile", "torch_compile_f32")


class _Inputs:
    """The logits of P and Q, and the incoming gradient of each token."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        self.p, self.q = make_logits(config, gen), make_logits(config, gen)
        self.by_token = torch.randn(config.tokens, generator=gen, device=gen.device) / config.tokens


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    size = config.tokens * config.vocab
    backward = config.mode == "forward+backward"
    streams, flops = (5, FORWARD_FLOPS + BACKWARD_FLOPS) if backward else (2, FORWARD_FLOPS)
    return Problem(
        config,
        ours={"tokfuse": lambda: _ours(config, data)},
        peers={name: _peer_factory(name, config, data) for name in peer_names},
        limits={
            "limit_read": lambda: probes.read_probe(data.p),
            "limit_copy": lambda: probes.copy_probe(data.p),
            "limit_exp": lambda: probes.exp_probe(size, config.device),
        },
        exact=lambda: _answer(config, data),
        bounds=("read+read+read+copy", "exp+exp+exp+exp") if backward else ("read+read", "exp+exp"),
        bytes_moved=streams * size * config.item_bytes,
        bytes_formula=f"{streams} T V {config.item_bytes}: two reads" + ("; two reads and a write" if backward else ""),
        flops=flops * size,
        flops_formula=f"{flops} T V, an exp or a logarithm counted as 12",
    )


def _answer(config: Config, data: _Inputs) -> Outputs:
    """Return the float64 answer in closed form, computed over blocks of rows."""
    out = {"divergence": torch.empty(config.tokens, dtype=torch.float64, device=data.p.device)}
    if config.mode == "forward+backward":
        out["grad_logits"] = torch.empty(data.p.shape, dtype=torch.float64, device=data.p.device)
    for first in range(0, config.tokens, exact.BLOCK_ROWS):
        rows = slice(first, first + exact.BLOCK_ROWS)
        log_p, log_q = (torch.log_softmax(x[rows].double(), -1) for x in (data.p, data.q))
        value, grad = exact.divergence(log_p, log_q, config.variant, BETA)
        out["divergence"][rows] = value
        if "grad_logits" in out:
            out["grad_logits"][rows] = data.by_token[rows, None].double() * grad
    return out


def _with_gradient(config: Config, data: _Inputs, divergence: peers.StatsFn, leaf: torch.Tensor) -> Outputs:
    """Return the outputs of one call of the case by name."""
    if config.mode == "forward":
        with torch.no_grad():
            return divergence(leaf, data.q)
    out = divergence(leaf, data.q)
    (grad,) = torch.autograd.grad(out["divergence"], leaf, data.by_token.to(out["divergence"].dtype))
    return {**out, "grad_logits": grad}


def _ours(config: Config, data: _Inputs) -> Provider:
    op = ours.public("paired_divergence")
    leaf = data.p.detach().requires_grad_()

    def divergence(p: torch.Tensor, q: torch.Tensor) -> Outputs:
        return {"divergence": op(p, q, kind=config.variant)}

    return ours.provider(lambda: _with_gradient(config, data, divergence, leaf))


def _peer_factory(name: str, config: Config, data: _Inputs) -> Factory:
    def factory() -> Provider:
        peers.check_dtype(name, config.dtype)
        if name not in PLAIN:
            raise Unsupported("has no divergence of two tensors of logits")
        leaf = data.p.detach().requires_grad_()

        def divergence(p: torch.Tensor, q: torch.Tensor) -> Outputs:
            if name.endswith("_f32"):
                p, q = p.float(), q.float()
            return {"divergence": plain(p, q, config.variant)}

        function = peers.compiled(divergence) if name.startswith("torch_compile") else divergence
        return peers.provider(name, lambda: _with_gradient(config, data, function, leaf))

    return factory


def plain(logits_p: torch.Tensor, logits_q: torch.Tensor, kind: str) -> torch.Tensor:
    """Compute the divergence as in common torch code."""
    log_p, log_q = torch.log_softmax(logits_p, -1), torch.log_softmax(logits_q, -1)
    if kind == "kl_forward":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "kl_reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(BETA), log_p + math.log(1 - BETA)]), 0)
    from_q = (log_q.exp() * (log_q - log_m)).sum(-1)
    return BETA * from_q + (1 - BETA) * (log_p.exp() * (log_p - log_m)).sum(-1)
