"""How logits become a distribution, and what can be refused of them without reading a value."""

import math
from typing import NamedTuple

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse


class LogitOptions(NamedTuple):
    """How logits become a distribution: softmax((softcap(logit_scale z) - bias_scale b) / T)."""

    temperature: float | torch.Tensor
    softcap: float | None
    logit_scale: float
    mask: torch.Tensor | None
    bias_logits: torch.Tensor | None = None
    bias_scale: float = 1.0

    def features(self) -> frozenset[str]:
        """Names of the optional behaviours this call uses."""
        if self.bias_logits is None and self.softcap is None:
            return _NO_FEATURES
        names = {"softcap"} if self.softcap is not None else set()
        return frozenset(names | ({"bias_logits"} if self.bias_logits is not None else set()))


_NO_FEATURES: frozenset[str] = frozenset()


def check_logits(op: str, logits: torch.Tensor, target: torch.Tensor, o: LogitOptions) -> None:
    """Everything about the logits that can be refused without reading values."""
    checks.check_matrix(op, "logits", logits, "(tokens, vocab)")
    tokens, vocab = logits.shape
    if vocab < 1:
        raise refuse(
            op, "logits", "at least one column wide", f"shape {tuple(logits.shape)}", "Pass the whole vocabulary."
        )
    rows = checks.Rows(tokens, "the rows of logits", logits.device)
    checks.check_vector(op, "target", target, rows, checks.INT64)
    check_options(op, tokens, logits.device, o)
    if o.bias_logits is not None:
        bias = checks.require_tensor(op, "bias_logits", o.bias_logits)
        if bias.shape != logits.shape or bias.dtype != logits.dtype:
            raise refuse(
                op,
                "bias_logits",
                f"{tuple(logits.shape)} {logits.dtype} like logits",
                f"{tuple(bias.shape)} {bias.dtype}",
                "Score the same tokens in the same dtype.",
            )
        checks.check_device(op, "bias_logits", bias, logits.device)
        checks.check_constant(op, "bias_logits", bias)
        checks.check_number(op, "bias_scale", o.bias_scale, -math.inf)


def check_options(op: str, tokens: int, device: torch.device, o: LogitOptions) -> None:
    """Temperature, softcap, scale and mask."""
    rows = checks.Rows(tokens, "the tokens", device)
    if isinstance(o.temperature, torch.Tensor):
        checks.check_constant_vector(op, "temperature", o.temperature, rows)
    else:
        checks.check_positive(op, "temperature", o.temperature)
    if o.softcap is not None:
        checks.check_positive(op, "softcap", o.softcap)
    checks.check_positive(op, "logit_scale", o.logit_scale)
    checks.check_optional(op, "mask", o.mask, rows, checks.BOOL)
