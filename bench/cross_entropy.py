"""Case `cross_entropy`: the mean cross entropy of given logits and its gradient, with and without label smoothing."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tokfuse.bench import ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import (
    Config,
    Factory,
    Problem,
    Unsupported,
    generator,
    make_logits,
    on_device,
    sample_target,
)

OP = "cross_entropy"
SHAPES = ("512x49152", "256x151936")
QUICK_SHAPES = ("64x8192",)
DTYPES = ("float32", "bfloat16")
SMOOTHING = {"smoothing=0": 0.0, "smoothing=0.1": 0.1}
CASES = tuple(("forward+backward", variant) for variant in SMOOTHING)
PEERS = ("torch_eager", "torch_compile", "torch_eager_f32", "torch_compile_f32")
FLOPS = 33  # max, subtract, exp (12), three sums; subtract, exp (12), p (c + g x), + k


class _Inputs:
    """Logits and targets."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        self.logits = make_logits(config, gen)
        self.target = sample_target(self.logits, gen)


def truth(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss and the gradient of the logits, in float64."""
    tokens, vocab = logits.shape
    log_p = logits.double().log_softmax(-1)
    q = torch.full_like(log_p, smoothing / vocab)
    q[torch.arange(tokens, device=q.device), target] += 1.0 - smoothing
    return -(q * log_p).sum() / tokens, (log_p.exp() - q) / tokens


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    on_device(data, config.device)
    smoothing = SMOOTHING[config.variant]
    size = config.tokens * config.vocab

    def answer() -> Outputs:
        loss, grad = truth(data.logits, data.target, smoothing)
        return {"loss": loss, "grad_logits": grad}

    def ours_call() -> Provider:
        op = ours.public(OP)
        return ours.provider(_both(data, lambda z: op(z, data.target, label_smoothing=smoothing)))

    return Problem(
        config,
        ours={"tokfuse": ours_call},
        peers={name: _peer_factory(name, config, data, smoothing) for name in peer_names},
        limits={
            "limit_read": lambda: probes.read_probe(data.logits),
            "limit_copy": lambda: probes.copy_probe(data.logits),
            "limit_exp": lambda: probes.exp_probe(size, config.device),
        },
        exact=answer,
        bounds=("read+copy", "exp+exp"),
        bytes_moved=3 * size * config.item_bytes,
        bytes_formula=f"3 T V {config.item_bytes}: read; read and write",
        flops=FLOPS * size,
        flops_formula=f"{FLOPS} T V, an exp counted as 12",
    )


def _both(data: _Inputs, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Outputs]:
    leaf = data.logits.detach().requires_grad_()

    def both() -> Outputs:
        loss = loss_of(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        return {"loss": loss.detach(), "grad_logits": grad}

    return both


def _peer_factory(name: str, config: Config, data: _Inputs, smoothing: float) -> Factory:
    def factory() -> Provider:
        peers.check_dtype(name, config.dtype)
        if name not in PEERS:
            raise Unsupported("the peers are F.cross_entropy, eager and compiled: torch_eager, torch_compile, ..._f32")
        wide = name.endswith("_f32")

        def loss_of(z: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(z.float() if wide else z, data.target, label_smoothing=smoothing)

        return peers.provider(name, _both(data, peers.compiled(loss_of) if "compile" in name else loss_of))

    return factory
