"""The options that turn logits into a distribution, and the checks that do not read values."""

import math
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse


class LogitOptions(NamedTuple):
    """Options of the distribution softmax((softcap(logit_scale z) - bias_scale b) / T) of logits z."""

    temperature: float | torch.Tensor
    softcap: float | None
    logit_scale: float
    mask: torch.Tensor | None
    bias_logits: torch.Tensor | None = None
    bias_scale: float = 1.0

    def floats(self) -> "LogitOptions":
        """Return the options with numbers of numpy as floats: not every kernel takes them."""
        number = checks.number
        first = number(self.temperature), number(self.softcap), number(self.logit_scale)
        return LogitOptions(*first, self.mask, self.bias_logits, number(self.bias_scale))

    def features(self) -> frozenset[str]:
        """Return the names of the optional behaviours that this call uses."""
        if self.bias_logits is None and self.softcap is None:
            return _NO_FEATURES
        names = {"softcap"} if self.softcap is not None else set()
        return frozenset(names | ({"bias_logits"} if self.bias_logits is not None else set()))

    def without_bias(self) -> dict[str, Any]:
        """Return the options as keywords of an op without bias logits."""
        return {name: getattr(self, name) for name in ("temperature", "softcap", "logit_scale", "mask")}

    def per_temperature(self, scale: float) -> float | torch.Tensor:
        """Return scale / temperature, for a temperature per row as a (tokens,) float64 tensor."""
        if isinstance(self.temperature, torch.Tensor):
            return scale / self.temperature.double()
        return scale / self.temperature

    def split(self) -> tuple["LogitOptions", "Tensors"]:
        """Return (the options without their tensors, the tensors), to save both for a backward."""
        vector, scalar = None, self.temperature
        if isinstance(scalar, torch.Tensor) and scalar.dim() > 0:  # else a graph_ops.Number
            vector, scalar = scalar, 1.0
        return self._replace(temperature=scalar, mask=None, bias_logits=None), (vector, self.mask, self.bias_logits)

    def joined(
        self, vector: torch.Tensor | None, mask: torch.Tensor | None, bias_logits: torch.Tensor | None
    ) -> "LogitOptions":
        """Return the options with the tensors that `split` separated. The inverse of `split`."""
        temperature = self.temperature if vector is None else vector
        return self._replace(temperature=temperature, mask=mask, bias_logits=bias_logits)

    def flat(self) -> tuple[Any, ...]:
        """Return the values of `FLAT_SCHEMA`."""
        scalars, (vector, mask, bias_logits) = self.split()
        return vector, *scalars[:3], mask, bias_logits, scalars.bias_scale

    @classmethod
    def from_flat(
        cls,
        vector: torch.Tensor | None,
        scalar: float,
        softcap: float | None,
        logit_scale: float,
        mask: torch.Tensor | None,
        bias_logits: torch.Tensor | None = None,
        bias_scale: float = 1.0,
    ) -> "LogitOptions":
        """Return the options from the values of `flat`. Without a bias, the first five are enough."""
        temperature = scalar if vector is None else vector
        return cls(temperature, softcap, logit_scale, mask, bias_logits, bias_scale)


_NO_FEATURES: frozenset[str] = frozenset()

Tensors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
FLAT_SCHEMA = (
    "Tensor? temperature, float scalar_temperature, float? softcap, float logit_scale, Tensor? mask"
    ", Tensor? bias_logits, float bias_scale"
)
"""The options in the schema of a custom op, which supports no unions; see `LogitOptions.flat`."""
FLAT_SCHEMA_WITHOUT_MASK = FLAT_SCHEMA.partition(", Tensor? mask")[0]
FLAT_SCHEMA_WITHOUT_BIAS = FLAT_SCHEMA.partition(", Tensor? bias_logits")[0]


def check_logits(op: str, logits: torch.Tensor, target: torch.Tensor, o: LogitOptions) -> None:
    """Raise an error if logits, target or options are invalid. Reads no values."""
    checks.check_matrix(op, "logits", logits, "(tokens, vocab)")
    tokens, vocab = logits.shape
    if vocab < 1:
        raise refuse(
            op, "logits", "at least one column wide", f"shape {tuple(logits.shape)}", "Pass the full vocabulary."
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


def check_options(op: str, tokens: int, device: torch.device, o: LogitOptions, prefix: str = "") -> None:
    """Temperature, softcap, scale and mask; `prefix` begins their names in errors."""
    rows = checks.Rows(tokens, "the tokens", device)
    if isinstance(o.temperature, torch.Tensor):
        checks.check_constant_vector(op, f"{prefix}temperature", o.temperature, rows)
    else:
        checks.check_divisor(op, f"{prefix}temperature", o.temperature)
    if o.softcap is not None:
        checks.check_divisor(op, f"{prefix}softcap", o.softcap)
    checks.check_divisor(op, f"{prefix}logit_scale", o.logit_scale)
    checks.check_optional(op, f"{prefix}mask", o.mask, rows, checks.BOOL)


def check_values(
    op: str, target: torch.Tensor, vocab: int, mask: torch.Tensor | None, temperature: float | torch.Tensor
) -> None:
    """Raise ValueError if a target or temperature is out of range in a row where mask is True."""
    bad = (target < 0) | (target >= vocab)
    if isinstance(temperature, torch.Tensor):
        bad = bad | ~(temperature > 0)
    if mask is not None:
        bad = bad & mask
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise bad_row(op, row, target, vocab, temperature)


def bad_row(op: str, row: int, target: torch.Tensor, vocab: int, temperature: float | torch.Tensor) -> ValueError:
    """Return the error for the first row whose target or temperature is out of range."""
    y = int(target[row])
    if 0 <= y < vocab:
        assert isinstance(temperature, torch.Tensor)
        return refuse(
            op,
            "temperature",
            "> 0 in every row where mask is True",
            f"{float(temperature[row])} in row {row}",
            "Mask the row or fix its temperature.",
        )
    return refuse(
        op,
        "target",
        f"in [0, {vocab}) in every row where mask is True",
        f"{y} in row {row}",
        "Leave these rows out by mask=(target != -100), or by ignore_index=-100 if the op has this argument."
        if y == -100
        else "Set mask to False on prompt and padding rows.",
    )
