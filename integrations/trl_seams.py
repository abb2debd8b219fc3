"""The attributes of TRL's utilities that tokfuse replaces: the per-token head and the logits op.

The docstring of `tokfuse.integrations.trl` lists them and compares the numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from tokfuse.integrations import trl_distillation, zero3
from tokfuse.integrations.hosts import Host, Rebinding, has_kernels, on_kernels, where
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.ops import policy_step  # noqa: F401  (registers the backends that `describe` names)
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats
from tokfuse.runtime.ops.token_stats import token_stats

HOST = Host("trl", (1, 16), (1, 16))  # the head of 1.15 has different outputs
OP = "integrations.trl"
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MEAN_ROWS = 256  # rows of logits computed at a time for the mean with a softcap

_INSTALLED = Rebinding(f"{OP}.uninstall")
_STOCK: dict[str, Any] = {}  # TRL's own attributes, for devices without kernels

PerToken = tuple[torch.Tensor | None, ...]


def install() -> None:
    """Replace the ops of every TRL trainer of this process with tokfuse's. Calling it again has no effect.

    Raises:
        ValueError: TRL is missing, or older than the tested versions.
    """
    HOST.require(f"{OP}.install")
    with _INSTALLED.lock:
        if not _INSTALLED.active:
            _bind(_INSTALLED, Head(token_head))
            trl_distillation.bind(_INSTALLED)


def uninstall() -> None:
    """Restore every attribute of TRL. Without `install`, this has no effect.

    Raises:
        ValueError: other code has patched the same attributes since; nothing is restored then.
    """
    with _INSTALLED.lock:
        _INSTALLED.restore()


def is_installed() -> bool:
    """Return whether `install` is in effect."""
    return _INSTALLED.active


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Context manager: `install` on entry, `uninstall` on exit. If already installed, it has no effect."""
    if _INSTALLED.active:
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()


def describe() -> str:
    """Return what is replaced, and the backend that each op uses for bfloat16."""
    version = HOST.installed or "not installed"
    state = "installed" if _INSTALLED.active else "not active"
    lines = [f"trl {version} (tested: {HOST.tested}), tokfuse {state}"]
    lines.append(f"  per-token head, all trainers: {where('linear_token_stats')}")
    lines.append(f"  logits op, all trainers: {_describe_logits_op()}")
    lines.append(f"  FusedGRPOTrainer: {where('policy_step_hidden')}")
    return "\n".join([*lines, *trl_distillation.describe()])


def _describe_logits_op() -> str:
    if HOST.installed is None:
        return "TRL is not installed"
    if not hasattr(_utils(), "_fused_logprob_entropy"):
        return "TRL's own torch code (without triton, TRL has no attribute to replace)"
    return where("token_stats")


def _utils() -> ModuleType:
    import trl.trainer.utils

    module: ModuleType = trl.trainer.utils
    return module


def _stock(name: str) -> Any:
    """Return TRL's own attribute."""
    return _STOCK[name] if name in _STOCK else getattr(_utils(), name)


class Head:
    """Replacement of TRL's autograd function, of which TRL uses only `apply`."""

    def __init__(self, apply: Callable[..., PerToken]) -> None:
        self.apply = apply


class Carry(torch.autograd.Function):
    """Return `logp` unchanged, but connected to `loss`.

    DDP searches the outputs of a forward for unused parameters, and the loss is not one of these outputs.
    """

    @staticmethod
    def forward(ctx: Any, logp: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return logp.view_as(logp)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad.new_zeros(())


def _bind(into: Rebinding, head: Head) -> None:
    utils = _utils()
    for name in ("_ChunkedLogProbFunction", "_use_triton", "_fused_logprob_entropy", "_supports_trl_loss_kernel"):
        if hasattr(utils, name):
            _STOCK.setdefault(name, getattr(utils, name))
    into.set(utils, "_ChunkedLogProbFunction", head)
    into.set(utils, "_use_triton", _labelled_rows_only)
    if hasattr(utils, "_fused_logprob_entropy"):
        into.set(utils, "_fused_logprob_entropy", logits_op)
        into.set(utils, "_supports_trl_loss_kernel", supports_logits)


@contextlib.contextmanager
def rebound(head: Head) -> Iterator[None]:
    """Context manager: TRL's attributes on tokfuse with this head; restored on exit."""
    binding = Rebinding(OP)
    try:
        _bind(binding, head)
        yield
    finally:
        binding.restore()


# ------------------------------------------------------------------------------------------- head


def _labelled_rows_only(device: torch.device) -> bool:
    """Answer TRL's question whether to score only rows with a label, instead of every position."""
    if has_kernels("linear_token_stats", device.type, torch.bfloat16):
        return True
    own: bool = _stock("_use_triton")(device)
    return own


def token_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OUTPUTS,
    *,
    kept: dict[str, torch.Tensor] | None = None,
) -> PerToken:
    """Return what TRL's `ChunkedLogProbFunction.apply` returns: one (N,) tensor for each name in `OUTPUTS`.

    Args:
        hidden: (N, H), converted to the autocast dtype under autocast, like weight and bias.
        weight: (V, H).
        bias: (V,) or None.
        targets: (N,), int64.
        temperature: divisor of the logits.
        chunk_size: TRL's width of a vocabulary tile. Ignored, because `linear_token_stats` has a memory budget.
        final_logit_softcapping: cap of the tanh soft-cap, or None.
        logit_scale: factor of the logits before the cap.
        outputs: names of the required outputs; the others are None. log_probs are always returned.
        kept: kept_ids, kept_offsets and mask of `linear_token_stats`. None, as TRL calls it: the whole vocabulary.

    Gradients: log_probs and entropy, as in TRL.
    """
    for name in outputs:
        if name not in OUTPUTS:
            raise refuse(OP, "outputs", f"among {', '.join(OUTPUTS)}", repr(name), "This TRL is not supported yet.")
    if not on_kernels("TRL", "linear_token_stats", hidden):
        given = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
        own: PerToken = _stock("_ChunkedLogProbFunction").apply(*given)
        return own
    scored = operands(hidden, weight, bias)
    options: dict[str, Any] = {"temperature": temperature, "softcap": final_logit_softcapping}
    options["logit_scale"] = logit_scale
    stats = linear_token_stats(scored[0], scored[1], targets, bias=scored[2], **(options | (kept or {})))
    return per_token(stats, scored, outputs, **options)


def per_token(
    stats: TokenStats,
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    outputs: tuple[str, ...],
    **options: Any,
) -> PerToken:
    """Return the requested `OUTPUTS`, None for the others; log_probs always.

    Args:
        stats: statistics of the rows.
        scored: hidden, weight and bias.
        outputs: names.
        options: temperature, softcap and logit_scale.
    """
    found: dict[str, Callable[[], torch.Tensor]] = {
        "log_probs": lambda: stats.logp,
        "entropy": lambda: stats.entropy,
        "log_sum_sq_probs": lambda: stats.sum_sq.log(),
        "mean_logits": lambda: _mean_logits(*scored, **options),
        "is_top1": lambda: stats.top1.bool(),
    }
    wanted = ("log_probs", *outputs)
    return tuple(make() if name in wanted else None for name, make in found.items())


def operands(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the tensors in TRL's compute dtype; detached if gradients are disabled.

    Under DeepSpeed ZeRO-3, TRL has gathered the head for this call; its data then stays for the backward.
    """
    weight, bias = zero3.gathered(weight, bias)  # type: ignore[assignment]
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    tensors = [x if x is None else x.to(dtype) for x in (hidden, weight, bias)]
    if not torch.is_grad_enabled():
        tensors = [x if x is None else x.detach() for x in tensors]
    assert tensors[0] is not None and tensors[1] is not None
    return tensors[0], tensors[1], tensors[2]


@torch.no_grad()
def _mean_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return the mean over the vocabulary, (N,). Without a softcap it is linear and needs no logits."""
    h, scale = hidden.float(), logit_scale / temperature
    if softcap is None:
        mean = h @ weight.mean(0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) * scale
    out = h.new_empty(h.shape[0])
    w, b = weight.float(), None if bias is None else bias.float()
    for start in range(0, h.shape[0], MEAN_ROWS):
        z = torch.nn.functional.linear(h[start : start + MEAN_ROWS], w, b) * (logit_scale / softcap)
        out[start : start + MEAN_ROWS] = z.tanh_().mean(1) * (softcap / temperature)
    return out


# -------------------------------------------------------------------------------------- logits op


def supports_logits(
    logits: torch.Tensor, index: torch.Tensor | None = None, row_mask: torch.Tensor | None = None
) -> bool:
    """Answer TRL's question whether its fused op supports these tensors. If not, TRL uses its torch code."""
    if not has_kernels("token_stats", logits.device.type, torch.bfloat16):
        own: bool = _stock("_supports_trl_loss_kernel")(logits, index, row_mask)
        return own
    if logits.shape[-1] == 0:
        return False
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if index is not None and (index.shape != logits.shape[:-1] or index.is_floating_point()):
        return False  # TRL can also gather several tokens per position
    return row_mask is None or (index is not None and row_mask.shape == index.shape)


def logits_op(
    logits: torch.Tensor, index: torch.Tensor, temperature: float = 1.0, row_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probabilities, entropies), float32, with the shape of `index`; 0 where row_mask is 0.

    Args:
        logits: (..., V).
        index: (...), integer, the token of each row.
        temperature: divisor of the logits.
        row_mask: (...), 0 skips the row. None: no row is skipped.
    """
    if not on_kernels("TRL", "token_stats", logits):
        own: tuple[torch.Tensor, torch.Tensor] = _stock("_fused_logprob_entropy")(
            logits, index, temperature=temperature, row_mask=row_mask
        )
        return own
    stats = token_stats(
        logits.reshape(-1, logits.shape[-1]),
        index.reshape(-1).long(),
        temperature=temperature,
        mask=None if row_mask is None else row_mask.reshape(-1) != 0,
    )
    return stats.logp.view(index.shape), stats.entropy.view(index.shape)
