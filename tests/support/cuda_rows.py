"""The CUDA row kernels on CPU tensors: the records of csrc/cuda/kernels.h, filled by hand."""

import ctypes
import functools
from typing import Any

import torch
from cuda_host import CUDA, HOST, library
from torch import Tensor

from tokfuse.runtime.native import DTYPE_CODE

POINTER, INT64, INT32, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _record(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


LogitsArgs: Any = _record(
    "LogitsArgs", logits=POINTER, stride=INT64, dtype=INT32, rows=INT64, vocab=INT64,
    index=POINTER, target=POINTER, mask=POINTER, temperatures=POINTER, temperature=FLOAT,
    softcap=FLOAT, logit_scale=FLOAT, bias_logits=POINTER, bias_stride=INT64, bias_scale=FLOAT,
)  # fmt: skip
STATS = ("logp", "entropy", "lse", "sum_sq", "top1", "row_max", "inv_sum", "second_logp",
         "p2_logp", "p2_logp2")  # fmt: skip
TokenStatsOut: Any = _record(
    "TokenStatsOut", **dict.fromkeys(STATS, POINTER), second_temperature=FLOAT
)
TokenStatsGrad: Any = _record(
    "TokenStatsGrad", row_max=POINTER, inv_sum=POINTER, entropy=POINTER, grad_logp=POINTER,
    grad_entropy=POINTER, grad_logits=POINTER, grad_stride=INT64, grad_dtype=INT32,
)  # fmt: skip
ObjectiveParams: Any = _record(
    "ObjectiveParams", shape=INT32, level=INT32, kl=INT32, seq_mean=INT32, p=FLOAT * 6,
    kl_coef=FLOAT, kl_clamp=FLOAT, entropy_coef=FLOAT, log_ratio_clamp=FLOAT,
)  # fmt: skip
TOKEN_INPUTS = ("old_logp", "advantage", "agg_weight", "weight", "signal", "ref_logp",
                "kl_weight", "entropy_weight")  # fmt: skip
RESULTS = ("token_loss", "d_logp", "d_entropy", "ratio", "flags")
TokenObjective: Any = _record(
    "TokenObjective", params=ObjectiveParams, **dict.fromkeys(TOKEN_INPUTS, POINTER), scale=POINTER,
    scale_value=FLOAT, **dict.fromkeys(RESULTS, POINTER),
)  # fmt: skip
KeptArgs: Any = _record("KeptArgs", logits=LogitsArgs, ids=POINTER, offsets=POINTER, kept=INT64)
DivergenceArgs: Any = _record(
    "DivergenceArgs", p=POINTER, q=POINTER, p_stride=INT64, q_stride=INT64, dtype=INT32,
    tokens=INT64, vocab=INT64, mask=POINTER, temperatures=POINTER, temperature=FLOAT, softcap=FLOAT,
    logit_scale=FLOAT, beta=FLOAT, kind=INT32,
)  # fmt: skip
KINDS = {"jsd": 0, "kl_forward": 1, "kl_reverse": 2}


@functools.cache
def _library() -> ctypes.CDLL:
    kernels = [path for path in sorted(CUDA.glob("*.cu")) if path.stem in OPS]
    return ctypes.CDLL(str(library("rows", [*kernels, HOST / "rows_c.cpp"])))


OPS = ("token_stats", "policy_step", "kept_token_stats", "paired_divergence")


def _launch(name: str, *arguments: Any) -> None:
    given = [ctypes.byref(x) if isinstance(x, ctypes.Structure) else x for x in arguments]
    error = getattr(_library(), f"rows_{name}")(*given)
    assert error == 0, f"{name}: CUDA error {error}"


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _unit(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def logits_record(
    logits: Tensor,
    target: Tensor,
    *,
    index: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    bias_logits: Tensor | None = None,
    bias_scale: float = 1.0,
) -> Any:
    """The record; it keeps its tensors alive."""
    given, bias = _unit(logits), _unit(bias_logits)
    vector = temperature.float() if isinstance(temperature, Tensor) else None
    record = LogitsArgs(
        _pointer(given), given.stride(0), DTYPE_CODE[logits.dtype], *given.shape, _pointer(index),
        _pointer(target), _pointer(mask), _pointer(vector),
        1.0 if vector is not None else temperature, softcap or 0.0, logit_scale, _pointer(bias),
        0 if bias is None else bias.stride(0), bias_scale,
    )  # fmt: skip
    record.alive = (given, bias, vector, index, target, mask)
    return record


def _stats_record(tokens: int, second: float | None, moments: bool) -> tuple[Any, list[Tensor]]:
    out = [torch.full((tokens,), float("nan")) for _ in STATS]
    wanted = [True] * 7 + [second is not None, moments, moments]
    pointers = [_pointer(x) if yes else None for x, yes in zip(out, wanted, strict=True)]
    return TokenStatsOut(*pointers, 1.0 if second is None else second), out


def token_stats_fwd(
    logits: Tensor,
    target: Tensor,
    second_temperature: float | None = None,
    moments: bool = False,
    **options: Any,
) -> list[Tensor]:
    """logp, entropy, lse, sum_sq, top1, row_max, inv_sum, second_logp, p2_logp, p2_logp2."""
    record, out = _stats_record(target.shape[0], second_temperature, moments)
    _launch("token_stats_fwd", logits_record(logits, target, **options), record)
    return out


def token_stats_bwd(
    logits: Tensor,
    target: Tensor,
    stats: list[Tensor],
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The gradient, from what token_stats_fwd returned; `out` may be the logits."""
    grad = torch.full(logits.shape, float("nan"), dtype=logits.dtype) if out is None else out
    record = TokenStatsGrad(
        _pointer(stats[5]), _pointer(stats[6]), _pointer(stats[1]), _pointer(grad_logp),
        _pointer(grad_entropy), _pointer(grad), grad.stride(0), DTYPE_CODE[grad.dtype],
    )  # fmt: skip
    _launch("token_stats_bwd", logits_record(logits, target, **options), record)
    return grad


def policy_step(
    logits: Tensor,
    target: Tensor,
    objective: tuple[Any, ...],
    inputs: dict[str, Tensor],
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """(statistics, results by name, gradient); `objective` is `Objective.record`."""
    tokens = target.shape[0]
    grad = torch.full(logits.shape, float("nan"), dtype=logits.dtype) if out is None else out
    stats_record, stats = _stats_record(tokens, None, False)
    results = {name: torch.full((tokens,), float("nan")) for name in RESULTS}
    results["flags"] = torch.full((tokens,), -1, dtype=torch.int32)
    shape, level, kl, seq_mean, p, *numbers = objective
    params = ObjectiveParams(shape, level, kl, seq_mean, (FLOAT * 6)(*p), *numbers)
    vectors = {name: inputs.get(name) for name in TOKEN_INPUTS}
    kept = {name: None if x is None else x.float() for name, x in vectors.items()}
    vector = scale if isinstance(scale, Tensor) else None
    record = TokenObjective(
        params, *map(_pointer, kept.values()), _pointer(vector),
        0.0 if vector is not None else scale, *map(_pointer, results.values()),
    )  # fmt: skip
    _launch(
        "policy_step", logits_record(logits, target, **options), stats_record, record,
        POINTER(_pointer(grad)), INT64(grad.stride(0)), INT32(DTYPE_CODE[grad.dtype]),
    )  # fmt: skip
    del kept
    return stats[:5], results, grad


def kept_token_stats(
    logits: Tensor,
    target: Tensor,
    ids: Tensor,
    offsets: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
    **options: Any,
) -> tuple[list[Tensor], Tensor]:
    """(logp, entropy and lse; gradient)."""
    tokens, nan = target.shape[0], float("nan")
    rows = logits_record(logits, target, **options)
    args = KeptArgs(rows, _pointer(ids), _pointer(offsets), ids.shape[0])
    logp, entropy, lse, row_max, inv_sum = (torch.full((tokens,), nan) for _ in range(5))
    out = TokenStatsOut(
        _pointer(logp), _pointer(entropy), _pointer(lse), None, None, _pointer(row_max),
        _pointer(inv_sum),
    )  # fmt: skip
    _launch("kept_token_stats_fwd", args, out)
    grad = torch.full(logits.shape, nan, dtype=logits.dtype)
    record = TokenStatsGrad(
        _pointer(row_max), _pointer(inv_sum), _pointer(entropy), _pointer(grad_logp),
        _pointer(grad_entropy), _pointer(grad), grad.stride(0), DTYPE_CODE[grad.dtype],
    )  # fmt: skip
    _launch("kept_token_stats_bwd", args, record)
    return [logp, entropy, lse], grad


def paired_divergence(
    p: Tensor, q: Tensor, grad: Tensor, kind: str, beta: float = 0.5, **options: Any
) -> tuple[Tensor, Tensor]:
    """(divergence, gradient of p)."""
    rows = logits_record(p, p, **options)
    other = _unit(q)
    assert other is not None
    args = DivergenceArgs(
        rows.logits, _pointer(other), rows.stride, other.stride(0), rows.dtype, rows.rows,
        rows.vocab, rows.mask, rows.temperatures, rows.temperature, rows.softcap, rows.logit_scale,
        beta, KINDS[kind],
    )  # fmt: skip
    out, state = torch.full((len(p),), float("nan")), torch.full((len(p), 6), float("nan"))
    _launch("paired_divergence_fwd", args, POINTER(_pointer(out)), POINTER(_pointer(state)))
    grad_p = torch.full(p.shape, float("nan"), dtype=p.dtype)
    _launch(
        "paired_divergence_bwd", args, POINTER(_pointer(state)), POINTER(_pointer(grad)),
        POINTER(_pointer(grad_p)), INT64(grad_p.stride(0)),
    )  # fmt: skip
    return out, grad_p
