"""Case `token_stats`: per-token statistics of given logits, forward and forward+backward.

forward: all five statistics without gradients. With variant "all" the peers compute the same five. With
variant "logp,entropy" the peers compute only these two; tokfuse has no cheaper form for two.
forward+backward: gradient of a weighted sum of logp and entropy.
Variant "ids=100": `tokfuse_ids` also returns the log-probs of 100 ids per token, and its gradient includes theirs.
`tokfuse` is the call without ids, so the ratio of the two is the cost of the ids.
"""

import torch

from tokfuse.bench import exact, ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Factory, Problem, generator, make_logits, on_device, sample_target

OP = "token_stats"
SHAPES = ("512x49152", "256x151936")
QUICK_SHAPES = ("64x8192",)
DTYPES = ("float32", "bfloat16")
IDS = 100
CASES = (
    ("forward", "all"),
    ("forward", "logp,entropy"),
    ("forward+backward", "logp,entropy"),
    ("forward", f"ids={IDS}"),
    ("forward+backward", f"ids={IDS}"),
)

# max, subtract, exp (12), sum e, sum (z-m)e, sum e^2
FORWARD_FLOPS = 19
# subtract, exp (12), p (c + g x)
BACKWARD_FLOPS = 16


class _Inputs:
    """Logits, target, ids, and the incoming gradients of logp, entropy and the log-probs of the ids."""

    def __init__(self, config: Config) -> None:
        gen = generator(config)
        self.logits = make_logits(config, gen)
        self.target = sample_target(self.logits, gen)
        self.by_logp = torch.randn(config.tokens, generator=gen, device=gen.device) / config.tokens
        self.by_entropy = torch.randn(config.tokens, generator=gen, device=gen.device) / config.tokens
        self.ids: torch.Tensor | None = None
        if config.variant == f"ids={IDS}":
            shape = (config.tokens, IDS)
            self.ids = torch.randint(config.vocab, shape, generator=gen, device=gen.device)
            self.by_ids = torch.randn(shape, generator=gen, device=gen.device) / config.tokens


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    on_device(data, config.device)
    size = config.tokens * config.vocab
    backward = config.mode == "forward+backward"
    passes, flops = (3, FORWARD_FLOPS + BACKWARD_FLOPS) if backward else (1, FORWARD_FLOPS)

    def answer() -> Outputs:
        out = exact.token_stats(data.logits, data.target)
        if data.ids is not None:
            out["logp_at"] = data.logits.double().gather(1, data.ids) - out["lse"].unsqueeze(1)
        if backward:
            out["grad_logits"] = exact.grad_logits(data.logits, data.target, data.by_logp, data.by_entropy)
        return out

    providers = {"tokfuse": lambda: _ours(config, data)}
    if data.ids is not None:
        providers["tokfuse_ids"] = lambda: _with_ids(config, data)
    return Problem(
        config,
        ours=providers,
        # None with ids: the base is `tokfuse`.
        peers={name: _peer_factory(name, config, data) for name in peer_names if data.ids is None},
        limits={
            "limit_read": lambda: probes.read_probe(data.logits),
            "limit_copy": lambda: probes.copy_probe(data.logits),
            "limit_exp": lambda: probes.exp_probe(size, config.device),
        },
        exact=answer,
        bounds=("read+copy", "exp+exp") if backward else ("read", "exp"),
        bytes_moved=passes * size * config.item_bytes,
        bytes_formula=f"{passes} T V {config.item_bytes}: " + ("read; read and write" if backward else "one read"),
        flops=flops * size,
        flops_formula=f"{flops} T V, an exp counted as 12",
    )


def _ours(config: Config, data: _Inputs) -> Provider:
    op = ours.public("token_stats")
    if config.mode == "forward":

        def forward() -> Outputs:
            return ours.stats_outputs(op(data.logits, data.target))

        return ours.provider(forward)
    leaf = data.logits.detach().requires_grad_()

    def both() -> Outputs:
        stats = op(leaf, data.target)
        (grad,) = torch.autograd.grad((stats.logp, stats.entropy), leaf, (data.by_logp, data.by_entropy))
        return {**ours.stats_outputs(stats), "grad_logits": grad}

    return ours.provider(both)


def _with_ids(config: Config, data: _Inputs) -> Provider:
    op = ours.public("token_stats")
    if config.mode == "forward":

        def forward() -> Outputs:
            out = op(data.logits, data.target, ids=data.ids)
            return {**ours.stats_outputs(out), "logp_at": out.logp_at}

        return ours.provider(forward)
    leaf = data.logits.detach().requires_grad_()

    def both() -> Outputs:
        out = op(leaf, data.target, ids=data.ids)
        outputs, incoming = (out.logp, out.entropy, out.logp_at), (data.by_logp, data.by_entropy, data.by_ids)
        torch.autograd.grad(outputs, leaf, incoming)  # not compared: `tokfuse` differentiates another loss
        return {**ours.stats_outputs(out), "logp_at": out.logp_at}

    return ours.provider(both)


def _peer_factory(name: str, config: Config, data: _Inputs) -> Factory:
    def factory() -> Provider:
        peers.check_dtype(name, config.dtype)
        peers.check_device(name, config.device)
        function = peers.token_stats_fn(name, 1, everything=config.variant == "all")
        if name.startswith("torch_compile"):
            function = peers.compiled(function)
        if config.mode == "forward":

            def forward() -> Outputs:
                with torch.no_grad():
                    return function(data.logits, data.target)

            return peers.provider(name, forward)
        leaf = data.logits.detach().requires_grad_()

        def both() -> Outputs:
            stats = function(leaf, data.target)
            names = [n for n in ("logp", "entropy") if n in stats]
            incoming = {"logp": data.by_logp, "entropy": data.by_entropy}
            (grad,) = torch.autograd.grad(
                [stats[n] for n in names], leaf, [incoming[n].to(stats[n].dtype) for n in names]
            )
            # without the entropy this is the gradient of another function and cannot be compared
            return {**stats, "grad_logits": grad} if "entropy" in stats else stats

        return peers.provider(name, both)

    return factory
