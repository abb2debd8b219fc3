"""The result row: one flat, JSON-able record per op, shape, dtype, mode, variant and provider.

The field names and their meanings are a contract. Adding a field keeps `SCHEMA_VERSION`. Renaming or
removing a field, or changing its meaning, increases it.
"""

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

SCHEMA_VERSION = 1

# pass         ran, and its results are finite and close to the float64 values
# oom          needs more memory than the machine has
# unsupported  the provider does not support this machine, shape, dtype or variant; `note` has the reason
# fallback     tokfuse ran on the pure-torch reference or in Triton's interpreter, not in a fused kernel
# error        ran and failed, or returned wrong results; `note` has the message
# predicted    nothing ran: the time is computed from bytes, instructions and the data sheet of a GPU
STATUSES = ("pass", "oom", "unsupported", "fallback", "error", "predicted")

ROLES = ("ours", "peer", "limit")

# Outputs and gradients that are compared with float64; the row stores them as `error_<name>`.
ERROR_NAMES = ("logp", "entropy", "lse", "sum_sq", "top1", "loss", "grad_logits", "grad_hidden", "grad_weight")


@dataclass(frozen=True)
class Row:
    """One measurement. Times are milliseconds, sizes are bytes; None means "not measured".

    Args:
        schema: `SCHEMA_VERSION` of the writer.
        op, mode, variant: the measured case. `variant` names what varies besides shape and dtype.
        shape: "tokens x vocab", or "tokens x hidden x vocab" for ops that include the lm_head. The op
            `advantage` has no vocabulary; its columns contain "sequences x longest".
        provider, role, backend: the implementation that ran. `role` is one of `ROLES`. `backend` is the
            dispatched backend for tokfuse ("cpu", "reference", ...), otherwise the library that did the work.
        status, note: one of `STATUSES`, and the reason or a remark.
        median_ms, p20_ms, p80_ms, best_ms, rounds: statistics over `rounds` interleaved rounds.
        cpu_ms: median CPU time of a call over all threads. Other load on the machine affects it less than
            the wall time.
        baseline, ratio: median of this provider / median of `baseline` (tokfuse) in the same rounds; above
            1 means slower than tokfuse. ratio_p20, ratio_p80: spread of the ratio per round.
        limit, limit_ms, limit_share: the slowest probe that bounds this work, its median in the same
            rounds, and limit_ms / median_ms (1 = as fast as the limit).
        read_ms, copy_ms, exp_ms, gemm_ms: medians of the probes that ran.
        bytes_moved, flops: the least bytes and operations of this work, with the formula as text.
        peak_extra_bytes: peak resident memory of one call minus the resident memory before it. It includes
            the results. `peak_method` states how it was read.
        result_bytes: bytes of the tensors that one call returned. For an in-place op these are the bytes
            of its input.
        error_*: error relative to float64 on the same inputs. Outputs: largest absolute error. Gradients:
            largest absolute error / largest absolute value. error_output: the largest error of the
            outputs without their own column, for example advantages.
        load_average: load average of the machine at the start of the rounds. It shows other load.
        energy_mj, power_w, sm_clock_mhz, throttle: GPU readings while only this provider was repeated:
            millijoules per call, mean watts, lowest clock, and the reasons for lowered clocks.
            `telemetry` is "nvml", or "unavailable: " and the reason.
        gpu, driver: name of the GPU and version of its driver if `device` is "cuda".
        sweep: the axis that varies in a growth table, see growth.py.
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
        """Return the row as one JSON line. An infinite or NaN error becomes a string, so that the JSON is valid."""
        values = {key: plain(value) for key, value in asdict(self).items()}
        return json.dumps(values, allow_nan=False)

    @property
    def workspace_bytes(self) -> int | None:
        """Peak memory without the returned tensors. An in-place op returns tensors that existed before."""
        if self.peak_extra_bytes is None or self.result_bytes is None:
            return None
        returned = 0 if self.provider.endswith("_") else self.result_bytes
        return max(0, self.peak_extra_bytes - returned)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second at the median; None for ops without a vocabulary."""
        return None if self.op == "advantage" else self._rate(self.tokens, 1.0)

    @property
    def gb_per_s(self) -> float | None:
        """`bytes_moved` / median, in 1e9 bytes per second.

        It counts the least traffic of the work, not the real traffic of this provider.
        """
        return self._rate(self.bytes_moved, 1e9) if self.bytes_moved else None

    @property
    def gflop_per_s(self) -> float | None:
        """`flops` / median, in 1e9 operations per second.

        It counts the least work, not the real work of this provider.
        """
        return self._rate(self.flops, 1e9) if self.flops else None

    def _rate(self, amount: float, unit: float) -> float | None:
        return amount / unit / (self.median_ms * 1e-3) if self.median_ms else None

    @property
    def machine_key(self) -> tuple[str, ...]:
        """The facts that must be equal before two rows may be compared: system, processor, level of the kernels."""
        return (self.machine, self.cpu_model, self.isa)

    @classmethod
    def from_json(cls, line: str) -> "Row":
        """Read a row that `to_json` wrote. Unknown fields of a newer writer are dropped.

        Raises:
            ValueError: the line is no row.
        """
        whole = json.loads(line)
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if not isinstance(whole, dict) or not needed <= whole.keys():
            raise ValueError(f"a row must have the fields {', '.join(sorted(needed))}; got {line[:60]!r}")
        values = {f.name: whole[f.name] for f in fields(cls) if f.name in whole}
        for key, value in values.items():
            if key.startswith("error_") and isinstance(value, str):
                values[key] = float(value)
        return cls(**values)


def plain(value: Any) -> Any:
    """Return the value, or its name as a string if JSON cannot represent it (inf, nan)."""

    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if finite else str(value)


def check_one_machine(rows: Iterable[Row], where: str) -> None:
    """Raise an error if the rows come from different machines, because their times cannot be compared.

    Predicted rows belong to no machine and are always accepted.

    Raises:
        ValueError: rows of two machines; the message names them.
    """
    measured = [row for row in rows if row.status != "predicted" and row.machine]
    keys = list(dict.fromkeys(row.machine_key for row in measured))
    if len(keys) < 2:  # CPU rows and rows of one GPU of the same machine may be mixed
        keys = list(dict.fromkeys((row.gpu,) for row in measured if row.gpu))
    if len(keys) > 1:
        names = "; ".join(" / ".join(key) for key in keys)
        raise ValueError(
            f"bench: {where} must be rows of one machine; got {len(keys)}: {names}. "
            "Keep one file per machine, or measure all rows again on one machine."
        )
