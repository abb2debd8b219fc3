"""Case `policy_step_hidden`: the loss side of one update from hidden states and the lm_head weight.

It computes PPO-clip with token mean, and the gradients with respect to the hidden states and the weight.
Variants: the share of rows with a non-zero advantage ("rows=1", "rows=0.25"), and a frozen weight
("rows=1,frozen"). Peers get the same inputs and may skip the zero rows.

The limit is the matrix products that the variant needs: logits for all rows, then dh and (unless frozen)
dW for the rows with gradient. `limit_gemm3` is always the three full products.
"""

import torch

from tokfuse.bench import exact, ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Factory, Problem, generator, make_batch, make_head, on_device, sample_target

OP = "policy_step_hidden"
SHAPES = ("512x576x49152", "256x2048x151936")
QUICK_SHAPES = ("64x64x8192",)
DTYPES = ("float32",)
CASES = (("step", "rows=1"), ("step", "rows=0.25"), ("step", "rows=1,frozen"))


class _Inputs:
    """Hidden states, weight, and a batch with the chosen share of rows with gradient."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        share, _, frozen = config.variant.removeprefix("rows=").partition(",")
        self.frozen = frozen == "frozen"
        self.hidden, self.weight = make_head(config, gen)
        logits = self.hidden.float() @ self.weight.float().T
        target = sample_target(logits, gen)
        logp = exact.token_stats(logits, target)["logp"]
        self.batch = make_batch(target, logp, gen, float(share))
        self.grad_rows = int((self.batch.advantage != 0).sum())


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    on_device(data, config.device)
    backward_products = 1 if data.frozen else 2
    per_row = 2 * config.hidden * config.vocab
    flops = per_row * (config.tokens + backward_products * data.grad_rows)
    head_bytes = (config.tokens + config.vocab) * config.hidden * config.item_bytes
    limits: dict[str, Factory] = {
        "limit_gemm": lambda: probes.gemm_probe(data.hidden, data.weight, data.grad_rows, not data.frozen, True)
    }
    if data.frozen or data.grad_rows < config.tokens:
        limits["limit_gemm3"] = lambda: probes.gemm_probe(data.hidden, data.weight, config.tokens, True, True)
    return Problem(
        config,
        ours={"tokfuse": lambda: _ours(data)},
        peers={name: _peer_factory(name, config, data) for name in peer_names},
        limits=limits,
        exact=lambda: _answer(data),
        bounds=("gemm",),
        bytes_moved=2 * head_bytes,
        bytes_formula=f"2 (T + V) H {config.item_bytes}: inputs, gradients",
        flops=flops,
        flops_formula=f"2 H V (T + {backward_products} R), R = {data.grad_rows} gradient rows",
    )


def _answer(data: _Inputs) -> Outputs:
    out = exact.policy_step(exact.head_logits(data.hidden, data.weight), data.batch, 0.0)
    grad = out.pop("grad_logits")
    return out | exact.through_head(grad, data.hidden, data.weight, not data.frozen)


def _ours(data: _Inputs) -> Provider:
    op = ours.public("policy_step")
    arguments = ours.policy_arguments(data.batch, 0.0)
    hidden = data.hidden.detach().requires_grad_()
    weight = data.weight.detach().requires_grad_(not data.frozen)

    def run() -> Outputs:
        step = op(hidden=hidden, weight=weight, target=data.batch.target, **arguments)
        return ours.step_outputs(step)

    return ours.provider(run)


def _peer_factory(name: str, config: Config, data: _Inputs) -> Factory:
    def factory() -> Provider:
        peers.check_dtype(name, config.dtype)
        peers.check_device(name, config.device)
        batch = data.batch
        hidden = data.hidden.detach().requires_grad_()
        weight = data.weight.detach().requires_grad_(not data.frozen)
        leaves = (hidden,) if data.frozen else (hidden, weight)
        if name in peers.LIGER:
            loss_fn = peers.liger_loss(name, hidden, weight, batch)

            def step() -> tuple[torch.Tensor, Outputs]:
                return loss_fn(), {}
        else:
            stats_fn = peers.linear_stats_fn(name, everything=False, entropy_grad=False)

            def step() -> tuple[torch.Tensor, Outputs]:
                stats = stats_fn(hidden, weight, batch.target)
                return peers.clip_loss(stats, batch, 0.0), stats

        function = peers.compiled(step) if name.startswith("torch_compile") else step

        def run() -> Outputs:
            loss, stats = function()
            grads = torch.autograd.grad(loss, leaves)
            named = dict(zip(("grad_hidden", "grad_weight"), grads, strict=False))
            return {"loss": loss, **stats, **named}

        return peers.provider(name, run)

    return factory
