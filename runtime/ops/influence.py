"""Gradient norms per token and gradient sketches per sequence, computed along with the loss.

A norm is the magnitude of a token's gradient; it has no direction. Influence is an inner product of
gradients. The sketches estimate these inner products.
"""

import functools
from dataclasses import dataclass

import torch

from tokfuse.runtime.backends import cpu_packed, cuda_packed, triton_packed
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.checks import Rows, check_vector
from tokfuse.runtime.core.dispatch import ALL_DTYPES, FLOAT_DTYPES, select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.forward_gradients import Gradients
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import ExtendedTokenStats, TokenStats
from tokfuse.runtime.lm_head.problem import HeadProblem
from tokfuse.runtime.policy.results import Influence
from tokfuse.runtime.reference import influence as reference
from tokfuse.runtime.reference.token_stats import result_dtype

OP = "influence"


@dataclass(frozen=True)
class InfluenceSpec:
    """Options of the sketches that `policy_step(hidden=..., influence=InfluenceSpec())` computes.

    Args:
        rank: size of the sketches, (rank, rank) per sequence. None: no projection, so the size is
            (hidden, hidden).
        seed: seed of the two random projections. Only sketches with the same rank and seed are
            comparable.
    """

    rank: int | None = 64
    seed: int = 0


def squared_gradient_norm(logp: torch.Tensor, sum_sq: torch.Tensor) -> torch.Tensor:
    """Return 1 - 2 p + sum_sq, the squared norm of d logp / d logits at T = 1, without cancellation.

    It equals (1 - p)^2 + r, where r is the sum of the squares of all other probabilities. Near p = 1,
    r = sum_sq - p^2 loses all digits, so it is clamped to its exact bounds 0 <= r <= (1 - p)^2.
    """
    rest = -torch.expm1(logp)
    others = torch.minimum((sum_sq - logp.exp() ** 2).clamp_min(0.0), rest * rest)
    return rest * rest + others


@ranged("influence.logit_norms.fwd")
def logit_norms(
    stats: TokenStats | ExtendedTokenStats,
    coefficient: torch.Tensor,
    *,
    entropy_coefficient: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the gradient norm ||d loss / d logits_t|| of every token, from its statistics only.

    With c = d loss / d logp, b = d loss / d entropy, s = logit_scale / temperature, p = exp(logp):
    norm^2 = s^2 ( c^2 (1 - 2 p + sum_sq) + 2 c b (T1 + H sum_sq - p (logp + H))
                   + b^2 (T2 + 2 H T1 + H^2 sum_sq) ),
    T1 = sum p^2 log p, T2 = sum p^2 log^2 p, H = entropy. With c = 1 and b = 0 this is EL2N, the
    norm of softmax minus one-hot. The norm is a magnitude only: it does not tell whether a token helps.

    Args:
        stats: result of `token_stats` or `linear_token_stats`. With entropy_coefficient it must come
            from `token_stats(..., moments=True)`.
        coefficient: (tokens,), d loss / d logp, e.g. `logp.grad` after the backward of
            `policy_loss(...)`. A clipped token has coefficient 0 and therefore norm 0.
        entropy_coefficient: (tokens,), d loss / d entropy. None: no entropy bonus.
        temperature: the temperature that `token_stats` got; a number, or (tokens,) one per row; > 0.
        logit_scale: the logit_scale that `token_stats` got; > 0.
        softcap: must be None. The slope of a soft-capped logit, 1 - tanh^2, differs from entry to
            entry, so the formula does not apply. `policy_step(hidden=..., influence=...)` measures the
            norm of the gradient itself and supports a softcap.

    Returns:
        (tokens,) float32 (float64 for float64 stats); 0 in masked rows. Detached.

    Numerics: 1 - 2 p + sum_sq is computed as (1 - p)^2 + r with 0 <= r <= (1 - p)^2. So the norm of a
        confident token is correct within a factor sqrt(2). For other tokens |error| <= 1e-7 / (1 - p),
        relative to c s. The entropy terms cancel near p = 1, with an error of 4e-4 b s.

    Raises:
        ValueError: wrong shape, a softcap, an entropy coefficient without moments.

    Source: softmax calculus, checked numerically; EL2N (Paul et al., arXiv 2107.07075).
    """
    op = "influence.logit_norms"
    rows = Rows(stats.logp.shape[0], "stats", stats.logp.device)
    check_vector(op, "coefficient", coefficient, rows)
    if softcap is not None:
        raise refuse(
            op,
            "softcap",
            "None (the formula does not hold for soft-capped logits)",
            repr(softcap),
            "Use policy_step(hidden=..., influence=...).",
        )
    checks.check_positive(op, "logit_scale", logit_scale)
    if isinstance(temperature, torch.Tensor):
        check_vector(op, "temperature", temperature, rows)
    else:
        checks.check_positive(op, "temperature", temperature)
    c = coefficient.detach().double()
    logp, entropy, sum_sq = (x.detach().double() for x in (stats.logp, stats.entropy, stats.sum_sq))
    square = c * c * squared_gradient_norm(logp, sum_sq)
    if entropy_coefficient is not None:
        check_vector(op, "entropy_coefficient", entropy_coefficient, rows)
        b = entropy_coefficient.detach().double()
        t1, t2 = _moments(op, stats)
        p = logp.exp()
        at_target = torch.where(p == 0, 0.0, p * (logp + entropy))
        square = square + 2 * c * b * (t1 + entropy * sum_sq - at_target)
        square = square + b * b * (t2 + 2 * entropy * t1 + entropy * entropy * sum_sq)
    norm = square.clamp_min(0.0).sqrt() * logit_scale / temperature
    return torch.where(square == 0, 0.0, norm).to(stats.logp.dtype)


def _moments(op: str, stats: TokenStats | ExtendedTokenStats) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(stats, TokenStats) or stats.sum_p2_logp is None or stats.sum_p2_logp2 is None:
        raise refuse(
            op,
            "stats",
            "computed with moments if entropy_coefficient is given",
            "statistics without moments",
            "Call token_stats(..., moments=True).",
        )
    return stats.sum_p2_logp.double(), stats.sum_p2_logp2.double()


@ranged("influence.head_norms.fwd")
def head_norms(logit_norms: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the norm of each token's term in the weight gradient of the lm_head: logit_norms_t * ||h_t||.

    The term is an outer product, so its Frobenius norm is the product of the two norms. The norms
    of the tokens of a sequence do not add up to the norm of its gradient, because the terms have
    different directions. The norm is a magnitude only.

    Args:
        logit_norms: (tokens,), from `logit_norms` or `policy_step(...).influence.token_norms`.
        hidden: (tokens, hidden), the hidden states that are the input of the lm_head.

    Returns:
        (tokens,) float32 (float64 for float64 hidden). Detached.

    Raises:
        ValueError: wrong shape.

    Source: ||u v^T||_F = ||u|| ||v||, the ghost norm of one token. Exact.
    """
    op = "influence.head_norms"
    checks.check_matrix(op, "hidden", hidden, "(tokens, hidden)")
    check_vector(op, "logit_norms", logit_norms, Rows(hidden.shape[0], "hidden", hidden.device))
    norms = hidden_norms(hidden)
    return torch.where(logit_norms == 0, 0.0, norms * logit_norms.detach()).to(norms.dtype)


@ranged("influence.hidden_norms.fwd")
def hidden_norms(grad_hidden: torch.Tensor) -> torch.Tensor:
    """Return the norm ||d loss / d hidden_t|| of every token.

    This is the magnitude of the gradient that the token sends into the rest of the model.

    Args:
        grad_hidden: (tokens, hidden), e.g. `policy_step(...).grad_hidden`. If the vocabulary is split
            over ranks, pass the gradient after its all-reduce.

    Returns:
        (tokens,) float32 (float64 for float64 input). Detached.

    Raises:
        ValueError: wrong shape or dtype.

    Source: definition.
    """
    checks.check_matrix("influence.hidden_norms", "grad_hidden", grad_hidden, "(tokens, hidden)")
    dtype = result_dtype(grad_hidden.dtype)
    norms: torch.Tensor = torch.linalg.vector_norm(grad_hidden.detach(), dim=1, dtype=dtype)
    return norms


# ---------------------------------------------------------------------------------------- sketches


@ranged("influence.sketch.fwd")
def sketch(
    grad_hidden: torch.Tensor,
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    rank: int | None = 64,
    seed: int = 0,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Return a small matrix per sequence. Inner products of these matrices estimate inner products of gradients.

    F_s = sum over t in s of (P_out dX_t) (P_in h_t)^T, with dX_t = d loss / d hidden_t. Consider an
    adapter h -> h + M h with M = 0 before the lm_head. The gradient of M is exactly
    G_s = sum dX_t h_t^T, and F_s is its two-sided random projection (LoGra on that adapter).
    E <F_s, F_u> = <G_s, G_u>, with a relative spread of about 1 / sqrt(rank). The sketches contain only
    the last hidden state: a ranking by sketches ranks gradients of the last layer.

    Args:
        grad_hidden: (tokens, hidden), e.g. `policy_step(...).grad_hidden`. Its scale (normaliser,
            gradient accumulation) also scales the sketches. Masked rows must be 0.
        hidden: (tokens, hidden), the hidden states to which grad_hidden belongs.
        cu_seqlens: (seqs + 1,) int32 packing offsets.
        rank: r of the (r, hidden) projections, which have entries +-1 / sqrt(r). None: no projection;
            F_s is the full (hidden, hidden) gradient of the adapter.
        seed: seed of the projections. The same seed gives the same projections on every machine. Only
            sketches with the same rank and seed are comparable.
        max_seqlen: length of the longest sequence. Only the reference uses it, for padding. None:
            computed from cu_seqlens.

    Returns:
        (seqs, rank, rank) float32 (float64 for float64 hidden); 0 for an empty sequence. Detached.

    Numerics: float32 products for every input dtype. grad_hidden of a 16-bit head has been rounded
        once to 16 bits. Bitwise repeatable on one machine.

    Gradients and memory: no gradients. Extra memory: 8 * tokens * rank bytes. The reference needs the
        same amount again per padded token.

    Raises:
        ValueError: wrong shape, dtype or device; invalid cu_seqlens, rank, seed or max_seqlen.

    Source: LoGra (arXiv 2405.13954) on the final-hidden adapter; the identity is exact.
    """
    op = "influence.sketch"
    checks.check_matrix(op, "hidden", hidden, "(tokens, hidden)")
    checks.check_matrix(op, "grad_hidden", grad_hidden, "(tokens, hidden)")
    if grad_hidden.shape != hidden.shape:
        raise refuse(
            op,
            "grad_hidden",
            f"of shape {tuple(hidden.shape)} like hidden",
            f"shape {tuple(grad_hidden.shape)}",
            "Pass the gradient of hidden.",
        )
    checks.check_device(op, "grad_hidden", grad_hidden, hidden.device)
    checks.check_cu_seqlens(op, cu_seqlens, hidden.shape[0], hidden.device)
    check_spec(op, rank, seed)
    if max_seqlen is not None and max_seqlen < 0:
        raise refuse(op, "max_seqlen", ">= 0", max_seqlen, "Omit it to compute it from cu_seqlens.")
    pair = None if rank is None else projections(int(rank), hidden.shape[1], int(seed), hidden.device)
    run = select(OP, hidden.device.type, hidden.dtype).run
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        out: torch.Tensor = run(grad_hidden.detach(), hidden.detach(), cu_seqlens, pair, max_seqlen)
    return out


def sequence_sums(left: torch.Tensor, right: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return the sum over the tokens of each sequence of left_t right_t^T: `sketch` of projected tensors.

    Args:
        left: (tokens, rank) float32 or float64, e.g. from `project`.
        right: (tokens, rank), same dtype and device.
        cu_seqlens: (seqs + 1,) int32 packing offsets. Not checked.

    Returns:
        (seqs, rank, rank). Detached.
    """
    out: torch.Tensor = select(OP, left.device.type, left.dtype).run(left, right, cu_seqlens, None, None)
    return out


def project(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Return x @ projection.T, (rows, rank) float32 (float64 for float64 x).

    On a GPU a 16-bit x is read once, by a GEMM that accumulates and returns float32. Entries +-1 of the projection
    are exact in 16 bits.

    Args:
        x: (rows, size).
        projection: (rank, size), in `projection_dtype(x)`.
    """
    if projection.dtype != x.dtype:
        x = x.to(projection.dtype)
    if x.device.type == "cpu":  # a GEMM with few rows is up to three times faster than one with few columns
        return (projection @ x.t()).t()
    if x.dtype in (torch.float32, torch.float64):
        return x @ projection.t()
    out = torch.empty(x.shape[0], projection.shape[0], dtype=torch.float32, device=x.device)
    torch.ops.aten.mm.dtype_out(x, projection.t(), out.dtype, out=out)
    return out


def projection_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which `project` takes the projection: the dtype of x, but float32 for 16 bits on a CPU."""
    return x.dtype if x.device.type == "cuda" else result_dtype(x.dtype)


def check_spec(op: str, rank: int | None, seed: int) -> None:
    """Raise ValueError unless rank and seed of a sketch are valid."""
    if rank is not None and (isinstance(rank, bool) or not checks.is_integer(rank) or rank < 1):
        raise refuse(op, "rank", "an int >= 1, or None for no projection", repr(rank), "Try 64.")
    if isinstance(seed, bool) or not checks.is_integer(seed):
        raise refuse(op, "seed", "an int", repr(seed), "Pass any fixed int, for example 0.")


@functools.lru_cache(maxsize=8)
def projections(rank: int, hidden_size: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (P_out, P_in), each (rank, hidden_size) float32 with entries +-1 / sqrt(rank)."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, rank, hidden_size), generator=generator, dtype=torch.float32, device="cpu")
    out, inner = ((2 * signs - 1) * rank**-0.5).to(device)
    return out, inner


register_cpu(OP, cpu_packed.sketch, ALL_DTYPES)
register_cuda(OP, cuda_packed.sketch, FLOAT_DTYPES)
register_triton(OP, triton_packed.sketch, FLOAT_DTYPES)
register_reference(OP, reference.sketch)


# ----------------------------------------------------------------------- influence of policy_step


def request(op: str, spec: InfluenceSpec, problem: HeadProblem, cu_seqlens: torch.Tensor | None) -> HeadProblem:
    """Return the problem with two more requests: the gradient of hidden, and the norms of the logits' gradient."""
    if not isinstance(spec, InfluenceSpec):
        raise TypeError(f"{op}: influence must be an InfluenceSpec; got {spec!r}. Pass InfluenceSpec().")
    if cu_seqlens is None:
        raise refuse(
            op, "cu_seqlens", "given with influence= (one sketch per sequence)", "None", "Pass the packing offsets."
        )
    if torch.compiler.is_compiling():
        raise refuse(
            op, "influence", "None inside torch.compile", "a spec", "Call policy_step outside the compiled function."
        )
    checks.check_cu_seqlens(op, cu_seqlens, problem.tokens, problem.hidden.device)
    check_spec(op, spec.rank, spec.seed)
    bias = problem.bias is not None and problem.bias.requires_grad
    dtype = result_dtype(problem.dtype)
    norms = torch.zeros(problem.tokens, dtype=dtype, device=problem.hidden.device)
    return problem._replace(needs=(True, problem.weight.requires_grad, bias), row_norms=norms)


def collect(spec: InfluenceSpec, problem: HeadProblem, gradients: Gradients, cu_seqlens: torch.Tensor) -> Influence:
    """Return norms and sketches from the gradients of a step. Drop grad_hidden if hidden requires no gradient."""
    grad_hidden, norms = gradients["hidden"], problem.row_norms
    assert grad_hidden is not None and norms is not None
    if not problem.hidden.requires_grad:
        gradients["hidden"] = None
    hidden = problem.hidden.detach()
    sketches = sketch(grad_hidden, hidden, cu_seqlens, rank=spec.rank, seed=spec.seed)
    return Influence(norms, head_norms(norms, hidden), hidden_norms(grad_hidden), sketches)
