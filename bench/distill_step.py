"""Case `distill_step`: the divergence of a student from a teacher and its gradients, from hidden states.

Full-vocabulary distillation over two heads: the mean divergence, its gradients by the student's
hidden states and weight, and the statistics that come with it. Variants: the divergence, and the
teacher's hidden size relative to the student's ("jsd,teacher=2x").

The limit is the bare matrix products: logits of both sides, then dh and dW of the student. Plain
torch has the logits of both sides at once; TRL's ChunkedDivergenceFunction computes the logits of
both sides again for the gradients, and once more for the Jensen-Shannon divergence. Liger's chunked
loss differentiates chunks of 1024 tokens by autograd and returns the mean divergence only.
"""

from collections.abc import Callable

import torch

from tokfuse.bench import exact, ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.paired_divergence import BETA, plain
from tokfuse.bench.problem import Config, Factory, Problem, Unsupported, generator, make_head, on_device

OP = "distill_step"
SHAPES = ("512x576x49152", "256x896x151936", "256x2048x151936")
QUICK_SHAPES = ("64x64x8192",)
DTYPES = ("float32",)
CASES = (
    ("step", "jsd"),
    ("step", "kl_reverse"),
    ("step", "kl_forward"),
    ("step", "jsd,teacher=2x"),
    ("step", "kl_reverse,teacher=2x"),
)
PEERS = ("torch_eager", "torch_compile", "trl", *peers.LIGER)
# The beta of TRL's and Liger's divergence.
PEER_BETA = {"kl_forward": 0.0, "jsd": BETA, "kl_reverse": 1.0}


class Inputs:
    """Hidden states and weight of both sides."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        self.kind, _, wide = config.variant.partition(",")
        self.hidden, self.weight = make_head(config, gen)
        columns = config.hidden * (2 if wide else 1)
        # Near the student: a teacher of independent logits would be 20 nats away.
        near = self.hidden.float() + 0.3 * torch.randn(self.hidden.shape, generator=gen, device=gen.device)
        self.teacher_hidden = near.repeat(1, columns // config.hidden).to(config.torch_dtype)
        weight = self.weight.float().repeat(1, columns // config.hidden) * (config.hidden / columns)
        noise = torch.randn(weight.shape, generator=gen, device=gen.device) * float(weight.std())
        self.teacher_weight = (weight + 0.3 * noise).to(config.torch_dtype)


def build(config: Config, peer_names: list[str]) -> Problem:
    """The problem of one configuration."""
    return problem(config, peer_names, _ours)


def problem(config: Config, peer_names: list[str], own: Callable[[Inputs], Provider]) -> Problem:
    """The problem of one configuration for one of our two ops over two heads."""
    data = Inputs(config)
    on_device(data, config.device)
    columns = data.teacher_hidden.shape[1]
    student, teacher = (config.tokens + config.vocab) * config.hidden, (config.tokens + config.vocab) * columns
    return Problem(
        config,
        ours={"tokfuse": lambda: own(data)},
        peers={name: _peer_factory(name, config, data) for name in peer_names},
        limits={"limit_gemm": lambda: _products(data)},
        exact=lambda: _answer(config, data),
        bounds=("gemm",),
        bytes_moved=(2 * student + teacher) * config.item_bytes,
        bytes_formula=f"(T + V) (2 H + H_teacher) {config.item_bytes}: inputs, gradients",
        flops=2 * config.tokens * config.vocab * (3 * config.hidden + columns),
        flops_formula="2 T V (3 H + H_teacher): 4 matrix products",
    )


def _products(data: Inputs) -> Provider:
    """The bare products of both sides."""
    rows = data.hidden.shape[0]
    student = probes.gemm_probe(data.hidden, data.weight, rows, True, True)
    teacher = probes.gemm_probe(data.teacher_hidden, data.teacher_weight, rows, False, False)

    def run() -> Outputs:
        teacher.run()
        return student.run()

    return Provider(run)


def _answer(config: Config, data: Inputs) -> Outputs:
    """In closed form and float64, over blocks of rows."""
    weight, teacher = data.weight.double(), data.teacher_weight.double()
    found: dict[str, list[torch.Tensor]] = {"divergence": [], "entropy": [], "grad_hidden": []}
    grad_weight = torch.zeros_like(weight)
    for first in range(0, config.tokens, exact.BLOCK_ROWS):
        rows = slice(first, first + exact.BLOCK_ROWS)
        h = data.hidden[rows].double()
        log_p, log_q = torch.log_softmax(h @ weight.T, -1), data.teacher_hidden[rows].double() @ teacher.T
        value, grad = exact.divergence(log_p, torch.log_softmax(log_q, -1), data.kind, BETA)
        grad /= config.tokens
        found["divergence"].append(value)
        found["entropy"].append(-(log_p.exp() * log_p).sum(-1))
        found["grad_hidden"].append(grad @ weight)
        grad_weight += grad.T @ h
    out = {name: torch.cat(parts) for name, parts in found.items()}
    return out | {"loss": out["divergence"].mean(), "grad_weight": grad_weight}


def leaves(data: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's hidden states and weight, which require grad."""
    return data.hidden.detach().requires_grad_(), data.weight.detach().requires_grad_()


def _ours(data: Inputs) -> Provider:
    op = ours.public("distill_step")
    hidden, weight = leaves(data)

    def run() -> Outputs:
        step = op(
            hidden=hidden,
            weight=weight,
            teacher_hidden=data.teacher_hidden,
            teacher_weight=data.teacher_weight,
            kind=data.kind,
            normalizer="batch",
        )
        stats = {"divergence": step.divergence, "entropy": step.stats.entropy}
        return {"loss": step.loss, **stats, "grad_hidden": step.grad_hidden, "grad_weight": step.grad_weight}

    return ours.provider(run)


def _peer_factory(name: str, config: Config, data: Inputs) -> Factory:
    def factory() -> Provider:
        if name not in PEERS:
            raise Unsupported("has no divergence of two heads")
        peers.check_device(name, config.device)
        hidden, weight = leaves(data)
        if name in peers.LIGER:
            loss_of = _liger(name, data, hidden, weight)

            def loss_alone() -> Outputs:
                loss = loss_of()
                grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
                return {"loss": loss, "grad_hidden": grad_hidden, "grad_weight": grad_weight}

            return peers.provider(name, loss_alone)
        step = _trl(name, data, hidden, weight) if name == "trl" else _plain(data, hidden, weight)
        function = peers.compiled(step) if name == "torch_compile" else step

        def run() -> Outputs:
            divergence, entropy = function()
            loss = divergence.mean()
            grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
            stats = {"divergence": divergence, "entropy": entropy}
            return {"loss": loss, **stats, "grad_hidden": grad_hidden, "grad_weight": grad_weight}

        return peers.provider(name, run)

    return factory


def _plain(data: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> peers.PairFn:
    """The usual torch code."""

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        logits = hidden @ weight.T
        with torch.no_grad():
            teacher = data.teacher_hidden @ data.teacher_weight.T
            log_p = torch.log_softmax(logits, -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        return plain(logits, teacher, data.kind), entropy

    return step


def _trl(name: str, data: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> peers.PairFn:
    function = peers.load(name, "trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    beta = PEER_BETA[data.kind]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out: tuple[torch.Tensor, torch.Tensor] = function.apply(
            hidden, weight, None, data.teacher_hidden, data.teacher_weight, None, beta
        )
        return out

    return step


def _liger(name: str, data: Inputs, hidden: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    loss_of = peers.load(name, "liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEER_BETA[data.kind], compiled=name == "liger_compile"
    )
    labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)  # none of them is ignored

    def step() -> torch.Tensor:
        loss: torch.Tensor = loss_of(hidden, weight, data.teacher_hidden, data.teacher_weight, labels)
        return loss

    return step
