"""Peers that do the same work: plain torch, torch.compile, and optional libraries.

None of the libraries is a dependency. Each one is imported only if it is chosen, and it is reported as
unsupported if it is not installed. `make peers` installs them from `peers.txt` into a separate
environment and measures the step from hidden states. verl's requirements conflict with TRL's, so verl
has another environment:

    make peers
    make peers PEERS=verl

If a peer computes fewer outputs than tokfuse, the note of its row lists the missing outputs. Its other
outputs are compared with float64, as for tokfuse.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from tokfuse.bench.machine import version_of
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import CLIP, Batch, Unsupported

StatsFn = Callable[[torch.Tensor, torch.Tensor], Outputs]
PairFn = Callable[[], tuple[torch.Tensor, torch.Tensor]]
LinearStatsFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Outputs]


@dataclass(frozen=True)
class Peer:
    """A name for `--peers`, the distribution and module that it needs, and a line of help.

    `needs_cuda`: its kernels run only on a GPU.
    """

    name: str
    distribution: str
    module: str
    summary: str
    needs_cuda: bool = False


KNOWN = {
    peer.name: peer
    for peer in (
        Peer("torch_eager", "torch", "torch", "log_softmax, gather and entropy in the input's dtype"),
        Peer("torch_compile", "torch", "torch", "torch.compile of torch_eager"),
        Peer("torch_eager_f32", "torch", "torch", "torch_eager after logits.float()"),
        Peer("torch_compile_f32", "torch", "torch", "torch.compile of torch_eager_f32"),
        Peer("cross_entropy", "torch", "torch", "F.cross_entropy: log-prob only"),
        Peer("torch_linear_cross_entropy", "torch", "torch", "F.linear_cross_entropy in chunks (hidden); torch 2.13"),
        Peer(
            "trl",
            "trl",
            "trl",
            "ChunkedLogProbFunction, ChunkedDivergenceFunction (hidden), selective_log_softmax_and_entropy (logits)",
        ),
        Peer(
            "liger",
            "liger-kernel",
            "liger_kernel",
            "LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss (compiled=False)",
        ),
        Peer(
            "liger_compile",
            "liger-kernel",
            "liger_kernel",
            "LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss (compiled=True)",
        ),
        Peer("liger_grpo", "liger-kernel", "liger_kernel", "triton_grpo_loss (logits)", True),
        Peer(
            "liger_flce",
            "liger-kernel",
            "liger_kernel",
            "LigerFusedLinearCrossEntropyFunction (hidden): log-prob only",
            True,
        ),
        Peer(
            "liger_flsce",
            "liger-kernel",
            "liger_kernel",
            "LigerFusedLinearScaledCrossEntropyFunction (hidden); torch chunks without sm_90",
        ),
        Peer("verl", "verl", "verl", "FusedLinearForPPO (hidden), logprobs_from_logits (logits)"),
        Peer(
            "cut_cross_entropy", "cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy(impl='torch_compile')"
        ),
        Peer(
            "cut_cross_entropy_triton",
            "cut-cross-entropy",
            "cut_cross_entropy",
            "linear_cross_entropy(impl='cce')",
            True,
        ),
        Peer("verl_triton", "verl", "verl", "linear_cross_entropy (hidden)", True),
        Peer("flash_attn", "flash-attn", "flash_attn", "cross_entropy_loss (logits): log-prob only", True),
        Peer("quack", "quack-kernels", "quack", "cross_entropy (logits): log-prob only", True),
    )
}

LIGER = ("liger", "liger_compile")
DEFAULT = ("torch_eager", "torch_compile", "torch_eager_f32", "torch_compile_f32", "cross_entropy")


def choose(text: str | None, dtype: str) -> list[str]:
    """Return the peers of a `--peers` argument, in the order of `KNOWN`.

    None means the default peers (the `_f32` peers only if the dtype is not float32), "all" means all peers,
    and "none" means no peers.

    Raises:
        ValueError: unknown name; the message lists the known names.
    """
    if text is None:
        return [n for n in DEFAULT if dtype != "float32" or not n.endswith("_f32")]
    if text in ("all", "none"):
        return list(KNOWN) if text == "all" else []
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in KNOWN:
            raise ValueError(
                f"bench: --peers must name known peers ({', '.join(KNOWN)}, all, none); "
                f"got {name!r}. `python -m tokfuse bench --list` describes them."
            )
    return [name for name in KNOWN if name in wanted]


def provider(name: str, run: Callable[[], Outputs], note: str = "", calls: int = 1) -> Provider:
    """Return a peer's call, with the backend and version for its row."""
    peer = KNOWN[name]
    version = version_of(peer.distribution)
    return Provider(run, backend=peer.module, version=version, note=note, calls=calls)


def load(name: str, module: str) -> ModuleType:
    """Import a peer's module, or raise `Unsupported` with the reason."""
    peer = KNOWN[name]
    if importlib.util.find_spec(peer.module) is None:
        raise Unsupported("not installed: `make peers` installs it in a separate environment")
    try:
        return importlib.import_module(module)
    except Exception as error:  # the import of a library may raise any exception
        raise Unsupported(f"does not import: {type(error).__name__}: {error}") from error


def check_dtype(name: str, dtype: str) -> None:
    """Raise `Unsupported` for a `_f32` peer with float32 inputs, because the plain peer measures the same."""
    if name.endswith("_f32") and dtype == "float32":
        raise Unsupported("the input is already float32: the same as without _f32")


def check_device(name: str, device: str) -> None:
    """Raise `Unsupported` for a CUDA kernel with CPU tensors. A missing installation is reported first."""
    peer = KNOWN[name]
    if peer.needs_cuda and device != "cuda":
        load(name, peer.module)
        raise Unsupported("needs CUDA tensors; the tensors are on the CPU")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply torch.compile for one static shape. A graph break or a silent fallback raises an error."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def eager_stats(
    logits: torch.Tensor, target: torch.Tensor, everything: bool = True, upcast: bool = False, entropy_grad: bool = True
) -> Outputs:
    """Compute the statistics as in common torch code: one log_softmax and the values that follow from it."""
    if upcast:
        logits = logits.float()
    log_p = torch.log_softmax(logits, -1)
    logp = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    frozen = log_p if entropy_grad else log_p.detach()
    p = frozen.exp()
    out = {"logp": logp, "entropy": -(p * frozen).sum(-1)}
    if everything:
        picked = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        out["lse"] = (picked - logp).detach()
        out["sum_sq"] = (p * p).sum(-1).detach()
        out["top1"] = logits.argmax(-1) == target
    return out


def clip_loss(stats: Outputs, batch: Batch, entropy_coef: float) -> torch.Tensor:
    """Compute PPO-clip with token mean, and an entropy bonus if its coefficient is not 0."""
    ratio = torch.exp(stats["logp"].float() - batch.old_logp)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
    if entropy_coef:
        gain = gain + entropy_coef * stats["entropy"].float()
    return -gain.sum() / batch.num_tokens


def token_stats_fn(name: str, num_seqs: int, everything: bool, entropy_grad: bool = True) -> StatsFn:
    """Return the peer's function for per-token statistics from logits (tokens, vocab)."""
    if name in ("torch_eager", "torch_eager_f32", "torch_compile", "torch_compile_f32"):
        upcast = name.endswith("_f32")

        def plain(logits: torch.Tensor, target: torch.Tensor) -> Outputs:
            return eager_stats(logits, target, everything, upcast, entropy_grad)

        return plain
    if name == "cross_entropy":
        return lambda z, y: {"logp": -F.cross_entropy(z, y, reduction="none")}
    if name == "trl":
        utils = load(name, "trl.trainer.utils")

        def trl(logits: torch.Tensor, target: torch.Tensor) -> Outputs:
            # the peer loops over sequences, in the layout (seqs, length, vocab)
            logp, entropy = utils.selective_log_softmax_and_entropy(
                logits.view(num_seqs, -1, logits.shape[-1]),
                target.view(num_seqs, -1),
                entropy_requires_grad=entropy_grad,
            )
            return {"logp": logp.reshape(-1), "entropy": entropy.reshape(-1)}

        return trl
    if name == "verl":
        functional = load(name, "verl.utils.torch_functional")

        def verl(logits: torch.Tensor, target: torch.Tensor) -> Outputs:
            source = logits if entropy_grad else logits.detach()
            return {
                "logp": functional.logprobs_from_logits(logits, target),
                "entropy": functional.entropy_from_logits(source),
            }

        return verl
    if name == "flash_attn":
        flash = load(name, "flash_attn.ops.triton.cross_entropy").cross_entropy_loss
        return lambda z, y: {"logp": -flash(z, y)[0]}
    if name == "quack":
        quack = load(name, "quack.cross_entropy").cross_entropy
        return lambda z, y: {"logp": -quack(z, y, reduction="none")}
    if name == "liger_grpo":
        raise Unsupported("returns a loss, not per-token statistics: see policy_step")
    raise Unsupported("has no op that starts from logits")


def linear_stats_fn(name: str, everything: bool, entropy_grad: bool = True) -> LinearStatsFn:
    """Return the peer's function for per-token statistics from hidden states (tokens, hidden) and weight."""
    if name == "trl":
        function = load(name, "trl.kernels").ChunkedLogProbFunction
        chunk = load(name, "trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
        wanted = ("entropy", "log_sum_sq_probs", "is_top1") if everything else ("entropy",)

        def trl(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Outputs:
            out = function.apply(hidden, weight, None, target, 1.0, chunk, None, 1.0, wanted)
            stats = {"logp": out[0], "entropy": out[1]}
            if everything:
                stats |= {"sum_sq": out[2].detach().exp(), "top1": out[4]}
            return stats

        return trl
    if name == "verl":
        fused = load(name, "verl.utils.experimental.torch_functional").FusedLinearForPPO()

        def verl(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Outputs:
            logp, entropy = fused(hidden, weight, target)
            return {"logp": logp, "entropy": entropy}

        return verl
    if name == "cut_cross_entropy":
        cce = load(name, "cut_cross_entropy").linear_cross_entropy
        return lambda h, w, y: {"logp": -cce(h, w, y, reduction="none", impl="torch_compile")}
    if name == "cut_cross_entropy_triton":
        cce = load(name, "cut_cross_entropy").linear_cross_entropy
        return lambda h, w, y: {"logp": -cce(h, w, y, reduction="none", impl="cce")}
    if name == "verl_triton":
        fused = load(name, "verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

        def verl_triton(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Outputs:
            logp, entropy = fused(hidden, weight, target, 1.0, "none")
            return {"logp": logp, "entropy": entropy}

        return verl_triton
    if name == "liger_flce":
        flce = load(name, "liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
        arguments = (None, None, -100, 0.0, 0.0, "none")
        return lambda h, w, y: {"logp": -flce.apply(h, w, y, *arguments)[0]}
    if name == "liger_flsce":
        flsce = load(name, "liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

        def scaled(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Outputs:
            nll, entropy = flsce.apply(hidden, weight, target, return_entropy=True)
            return {"logp": -nll, "entropy": entropy}

        return scaled
    if name in ("liger_grpo", "flash_attn", "quack"):
        raise Unsupported("starts from logits: see policy_step and token_stats")
    if name in LIGER:
        raise Unsupported("returns a loss, not per-token statistics: see policy_step_hidden")
    inner = token_stats_fn(name, 1, everything, entropy_grad)
    if name.endswith("_f32"):
        return lambda h, w, y: inner(h.float() @ w.float().T, y)
    return lambda h, w, y: inner(h @ w.T, y)


def liger_grpo(logits: torch.Tensor, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return a call of Liger's Triton GRPO loss with token mean.

    It needs one more position than tokens, as a model returns. It does not run in place, because the
    benchmark uses the logits again.
    """
    loss_fn = load("liger_grpo", "liger_kernel.transformers.grpo_loss").triton_grpo_loss
    target, old_logp = batch.padded(batch.target), batch.padded(batch.old_logp)
    mask, advantage = torch.ones_like(target), batch.padded(batch.advantage)[:, 0]
    room = torch.zeros_like(batch.padded(logits.detach())[:, :1])

    def run() -> torch.Tensor:
        longer = torch.cat([batch.padded(logits), room], 1)
        loss = loss_fn(
            longer,
            old_logp,
            None,
            target,
            advantage,
            mask,
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=False,
            loss_type="bnpo",
            reduce=True,
        )[0]
        assert isinstance(loss, torch.Tensor)
        return loss

    return run


def liger_loss(name: str, hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return a call of Liger's chunked GRPO loss with token mean, on (seqs, length, hidden).

    It uses Liger's default chunk, one sequence. `name` decides whether the loss of a chunk is compiled.
    """
    loss_fn = load(name, "liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=name == "liger_compile",
        use_ref_model=False,
        loss_type="bnpo",
        epsilon_low=CLIP,
        epsilon_high=CLIP,
    )
    target, old_logp = batch.padded(batch.target), batch.padded(batch.old_logp)
    mask, advantage = torch.ones_like(target), batch.padded(batch.advantage)[:, 0]

    def run() -> torch.Tensor:
        loss, _ = loss_fn(batch.padded(hidden), weight, target, mask, advantage, old_per_token_logps=old_logp)
        assert isinstance(loss, torch.Tensor)
        return loss

    return run
