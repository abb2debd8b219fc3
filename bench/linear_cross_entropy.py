"""Case `linear_cross_entropy`: the mean cross entropy from hidden states and the lm_head, and its gradients."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tokfuse.bench import exact, ours, peers, probes
from tokfuse.bench.cross_entropy import SMOOTHING, truth
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Factory, Problem, Unsupported, generator, make_head, on_device, sample_target

OP = "linear_cross_entropy"
SHAPES = ("512x576x49152", "256x2048x151936")
QUICK_SHAPES = ("64x64x8192",)
DTYPES = ("float32",)
CASES = tuple(("forward+backward", variant) for variant in SMOOTHING)
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Inputs:
    """Hidden states, weight and targets."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        self.hidden, self.weight = make_head(config, gen)
        self.target = sample_target(self.hidden.float() @ self.weight.float().T, gen)


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    on_device(data, config.device)
    smoothing = SMOOTHING[config.variant]
    head_bytes = (config.tokens + config.vocab) * config.hidden * config.item_bytes

    def answer() -> Outputs:
        loss, grad = truth(exact.head_logits(data.hidden, data.weight), data.target, smoothing)
        return {"loss": loss, **exact.through_head(grad, data.hidden, data.weight)}

    def ours_call() -> Provider:
        op = ours.public(OP)
        return ours.provider(_both(data, lambda h, w: op(h, w, data.target, label_smoothing=smoothing)))

    return Problem(
        config,
        ours={"tokfuse": ours_call},
        peers={name: _peer_factory(name, config, data, smoothing) for name in peer_names},
        limits={"limit_gemm": lambda: probes.gemm_probe(data.hidden, data.weight, config.tokens, True, True)},
        exact=answer,
        bounds=("gemm",),
        bytes_moved=head_bytes * 2,
        bytes_formula=f"(T + V) H {config.item_bytes} x 2: inputs, gradients",
        flops=6 * config.tokens * config.hidden * config.vocab,
        flops_formula="6 T H V: 3 matrix products",
    )


def _both(data: _Inputs, loss_of: Loss) -> Callable[[], Outputs]:
    hidden, weight = data.hidden.detach().requires_grad_(), data.weight.detach().requires_grad_()

    def both() -> Outputs:
        loss = loss_of(hidden, weight)
        grads = torch.autograd.grad(loss, (hidden, weight))
        return {"loss": loss.detach(), "grad_hidden": grads[0], "grad_weight": grads[1]}

    return both


def _peer_factory(name: str, config: Config, data: _Inputs, smoothing: float) -> Factory:
    def factory() -> Provider:
        peers.check_dtype(name, config.dtype)
        if name == "torch_linear_cross_entropy":
            return peers.provider(name, _both(data, _chunked(data, smoothing)))
        if name not in ("torch_eager", "torch_compile"):
            raise Unsupported("the peers are torch_eager, torch_compile and torch_linear_cross_entropy")

        def loss_of(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(F.linear(h, w), data.target, label_smoothing=smoothing)

        return peers.provider(name, _both(data, peers.compiled(loss_of) if name == "torch_compile" else loss_of))

    return factory


def _chunked(data: _Inputs, smoothing: float) -> Loss:
    """Return torch's function with its default chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported("torch.nn.functional.linear_cross_entropy needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss_of(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear_cross_entropy(h, w, data.target, label_smoothing=smoothing, options=options)

    return loss_of
