"""The result row: one flat, JSON-able record per op, shape, dtype, mode, variant and provider.

The field names and meanings are a contract. Adding a field keeps `SCHEMA_VERSION`; renaming one,
removing one or changing its meaning raises it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

SCHEMA_VERSION = 1

# pass         ran, and what it returned is finite and near the float64 values
# oom          needs more memory than there is
# unsupported  this provider cannot run here, or not this shape, dtype or variant; `note` says why
# fallback     ours ran, but on the pure-torch reference or in Triton's interpreter: never to be
#              read as a fused kernel
# error        ran and failed, or returned wrong numbers; `note` has the message
# predicted    nothing ran: computed from bytes, instructions and a GPU's data sheet
STATUSES = ("pass", "oom", "unsupported", "fallback", "error", "predicted")

ROLES = ("ours", "peer", "limit")

# every output and gradient that can be compared with float64; `error_<name>` in the row
ERROR_NAMES = ("logp", "entropy", "lse", "sum_sq", "top1", "loss", "grad_logits", "grad_hidden", "grad_weight")


@dataclass(frozen=True)
class Row:
    """One measurement. Times are milliseconds, sizes are bytes; None means "not measured".

    Args:
        schema: `SCHEMA_VERSION` of the writer.
        op, mode, variant: what was run; `variant` names what varies beside shape and dtype.
        shape: "tokens x vocab", or "tokens x hidden x vocab" for ops that hold the lm_head; for
            `advantage`, which sees no vocabulary, "sequences x longest" in the same columns.
        provider, role, backend: who ran it; `role` is one of `ROLES`; `backend` is the dispatched
            one for ours ("cpu", "reference", ...), else the library that did the work.
        status, note: one of `STATUSES`, and the reason or a remark.
        median_ms, p20_ms, p80_ms, best_ms, rounds: over `rounds` interleaved rounds.
        cpu_ms: median CPU time of a call, all threads; a busy neighbour inflates it least.
        baseline, ratio: median of this provider / median of `baseline` (ours) in the same rounds;
            above 1 means slower than ours. ratio_p20, ratio_p80: spread of the per-round ratio.
        limit, limit_ms, limit_share: the slowest probe that bounds this work, its median in the
            same rounds, and limit_ms / median_ms (1 = at the limit).
        read_ms, copy_ms, exp_ms, gemm_ms: medians of the probes that were run.
        bytes_moved, flops: the least this work must move and compute, with the formula as text.
        peak_extra_bytes: peak resident memory of one call above what was resident before it, its
            results included (`peak_method` says how it was read).
        result_bytes: of the tensors that one call returned; for an op that writes over its input,
            that input.
        error_*: against float64 on the same inputs; largest absolute error for outputs, largest
            absolute error over largest absolute value for gradients. error_output: the worst of
            what has no column of its own, e.g. advantages.
        load_average: of the machine when the rounds began: a busy neighbour is visible.
        energy_mj, power_w, sm_clock_mhz, throttle: of the GPU while this provider alone was
            repeated: millijoules per call, mean watts, lowest clock, and why clocks were lowered;
            `telemetry` is "nvml", or "unavailable: " and the reason.
        gpu, driver: name of the GPU and version of its driver where `device` is "cuda".
        sweep: the axis that varies in a table of growth, see growth.py.
    """

    schema: int
    op: str
    mode: str
    variant: str
    shape: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    device: str
    provider: str
    role: str
    backend: str
    status: str
    note: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    best_ms: float | None = None
    cpu_ms: float | None = None
    rounds: int = 0
    baseline: str = ""
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    limit: str = ""
    limit_ms: float | None = None
    limit_share: float | None = None
    read_ms: float | None = None
    copy_ms: float | None = None
    exp_ms: float | None = None
    gemm_ms: float | None = None
    bytes_moved: int = 0
    bytes_formula: str = ""
    flops: int = 0
    flops_formula: str = ""
    peak_extra_bytes: int | None = None
    peak_method: str = ""
    result_bytes: int | None = None
    error_logp: float | None = None
    error_entropy: float | None = None
    error_lse: float | None = None
    error_sum_sq: float | None = None
    error_top1: float | None = None
    error_loss: float | None = None
    error_grad_logits: float | None = None
    error_grad_hidden: float | None = None
    error_grad_weight: float | None = None
    error_output: float | None = None
    threads: int = 0
    omp_wait_policy: str = ""
    load_average: float | None = None
    energy_mj: float | None = None
    power_w: float | None = None
    sm_clock_mhz: int | None = None
    throttle: str = ""
    telemetry: str = ""
    sweep: str = ""
    machine: str = ""
    cpu_model: str = ""
    gpu: str = ""
    driver: str = ""
    isa: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    tokfuse: str = ""
    provider_version: str = ""
    commit: str = ""
    command: str = ""
    timestamp: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"Row: status must be one of {', '.join(STATUSES)}; got {self.status!r}.")
        if self.role not in ROLES:
            raise ValueError(f"Row: role must be one of {', '.join(ROLES)}; got {self.role!r}.")

    def to_json(self) -> str:
        """The row as one JSON line; an infinite or NaN error becomes a string, so it stays JSON."""
        values = {key: plain(value) for key, value in asdict(self).items()}
        return json.dumps(values, allow_nan=False)

    @property
    def workspace_bytes(self) -> int | None:
        """Peak memory beyond what the call returned; an op in place returned what was there."""
        if self.peak_extra_bytes is None or self.result_bytes is None:
            return None
        returned = 0 if self.provider.endswith("_") else self.result_bytes
        return max(0, self.peak_extra_bytes - returned)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second at the median; None for ops that see no vocabulary."""
        return None if self.op == "advantage" else self._rate(self.tokens, 1.0)

    @property
    def gb_per_s(self) -> float | None:
        """`bytes_moved` over the median, 1e9 bytes per second: of the least traffic, not of what
        this provider really moved."""
        return self._rate(self.bytes_moved, 1e9) if self.bytes_moved else None

    @property
    def gflop_per_s(self) -> float | None:
        """`flops` over the median, 1e9 per second: of the least work, as `gb_per_s`."""
        return self._rate(self.flops, 1e9) if self.flops else None

    def _rate(self, amount: float, unit: float) -> float | None:
        return amount / unit / (self.median_ms * 1e-3) if self.median_ms else None

    @property
    def machine_key(self) -> tuple[str, ...]:
        """What must agree before two rows may be compared: system, processor, kernels' level."""
        return (self.machine, self.cpu_model, self.isa)

    @classmethod
    def from_json(cls, line: str) -> "Row":
        """Read `to_json` back; fields of a newer writer that are unknown here are dropped."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in json.loads(line).items() if k in known}
        for key, value in values.items():
            if key.startswith("error_") and isinstance(value, str):
                values[key] = float(value)
        return cls(**values)


def plain(value: Any) -> Any:
    """The value, or its name where JSON has none (inf, nan)."""
    """The value, or its name where JSON has none (inf, nan)."""
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if finite else str(value)


def check_one_machine(rows: Iterable[Row], where: str) -> None:
    """Refuse rows of different machines: times of two machines in one table compare nothing.

    Predicted rows belong to no machine and are let through.

    Raises:
        ValueError: two machines; the message names them.
    """
    measured = [row for row in rows if row.status != "predicted" and row.machine]
    keys = list(dict.fromkeys(row.machine_key for row in measured))
    if len(keys) < 2:  # rows of the CPU and of one GPU of the same machine may stand together
        keys = list(dict.fromkeys((row.gpu,) for row in measured if row.gpu))
    if len(keys) > 1:
        names = "; ".join(" / ".join(key) for key in keys)
        raise ValueError(
            f"bench: {where} must be rows of one machine; got {len(keys)}: {names}. "
            "Keep a file per machine, or measure again on one."
        )
