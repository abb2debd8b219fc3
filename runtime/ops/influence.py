"""Per-token gradient norms and per-sequence gradient sketches: by-products of the loss's pass.

A norm says how hard a token pulls (magnitude), not where to. What is called influence here is an
inner product of gradients, and for that the sketches are made.
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
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import ExtendedTokenStats, TokenStats
from tokfuse.runtime.lm_head.problem import HeadProblem
from tokfuse.runtime.policy.results import Gradients, Influence
from tokfuse.runtime.reference import influence as reference
from tokfuse.runtime.reference.token_stats import result_dtype

OP = "influence"


@dataclass(frozen=True)
class InfluenceSpec:
    """What `policy_step(hidden=..., influence=InfluenceSpec())` computes besides the loss.

    Args:
        rank: size of the sketches, (rank, rank) per sequence. None: no projection, then
            (hidden, hidden).
        seed: of the two random projections. Sketches compare only under one rank and seed.
    """

    rank: int | None = 64
    seed: int = 0


def squared_gradient_norm(logp: torch.Tensor, sum_sq: torch.Tensor) -> torch.Tensor:
    """1 - 2 p + sum_sq, the squared norm of d logp / d logits at T = 1, without its cancellation.

    It is (1 - p)^2 and the sum r of the squares of all other probabilities, of which sum_sq - p^2
    keeps no digit near p = 1; 0 <= r <= (1 - p)^2 always holds.
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
    """||d loss / d logits_t|| of every token, from its statistics alone.

    With c = d loss / d logp, b = d loss / d entropy, s = logit_scale / temperature, p = exp(logp):
    norm^2 = s^2 ( c^2 (1 - 2 p + sum_sq) + 2 c b (T1 + H sum_sq - p (logp + H))
                   + b^2 (T2 + 2 H T1 + H^2 sum_sq) ),
    T1 = sum p^2 log p, T2 = sum p^2 log^2 p, H = entropy. With c = 1 and b = 0 this is EL2N, the
    norm of softmax minus one-hot. Magnitude only: it does not say whether a token helps.

    Args:
        stats: of `token_stats` or `linear_token_stats`; with `moments=True` where
            entropy_coefficient is given.
        coefficient: (tokens,), d loss / d logp, e.g. `logp.grad` after `policy_loss(...)` and its
            backward. A clipped token has coefficient 0 and so norm 0.
        entropy_coefficient: (tokens,), d loss / d entropy. None: no entropy bonus.
        temperature, logit_scale: as they were given to `token_stats`.
        softcap: must be None. A soft-capped logit has the slope 1 - tanh^2, which differs from
            entry to entry: no identity in p holds. `policy_step(hidden=..., influence=...)`
            measures the norm of the gradient itself and takes a softcap.

    Returns:
        (tokens,) float32 (float64 for float64 stats); 0 in masked rows.

    Numerics: 1 - 2 p + sum_sq is formed as (1 - p)^2 + r with 0 <= r <= (1 - p)^2, so that a
        confident token keeps its norm within a factor sqrt 2, and |error| <= 1e-7 / (1 - p)
        elsewhere (relative to c s). The entropy terms cancel near p = 1 with an error of 4e-4 b s.
        Detached.

    Raises:
        ValueError: shapes, a softcap, an entropy coefficient without moments.

    Source: softmax calculus, checked numerically; EL2N (Paul et al., arXiv 2107.07075).
    """
    op = "influence.logit_norms"
    rows = Rows(stats.logp.shape[0], "stats", stats.logp.device)
    check_vector(op, "coefficient", coefficient, rows)
    if softcap is not None:
        raise refuse(
            op,
            "softcap",
            "None (the identity needs logits that are linear in p's)",
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
            "with moments where entropy_coefficient is given",
            "none",
            "Call token_stats(..., moments=True).",
        )
    return stats.sum_p2_logp.double(), stats.sum_p2_logp2.double()


@ranged("influence.head_norms.fwd")
def head_norms(logit_norms: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Norm of each token's term of the lm_head's weight gradient: logit_norms_t * ||h_t||.

    The term is an outer product, so its Frobenius norm is the product of the two norms. The norms
    of a sequence's tokens do not add up to the norm of its gradient: the terms point in different
    directions. Magnitude only.

    Args:
        logit_norms: (tokens,), from `logit_norms`, or `policy_step(...).influence.token_norms`.
        hidden: (tokens, hidden), what the lm_head multiplies.

    Returns:
        (tokens,) float32 (float64 for float64 hidden).

    Raises:
        ValueError: shapes.

    Source: ||u v^T||_F = ||u|| ||v||, as the ghost norm of one token. Exact.
    """
    op = "influence.head_norms"
    checks.check_matrix(op, "hidden", hidden, "(tokens, hidden)")
    check_vector(op, "logit_norms", logit_norms, Rows(hidden.shape[0], "hidden", hidden.device))
    norms = hidden_norms(hidden)
    return torch.where(logit_norms == 0, 0.0, norms * logit_norms.detach()).to(norms.dtype)


@ranged("influence.hidden_norms.fwd")
def hidden_norms(grad_hidden: torch.Tensor) -> torch.Tensor:
    """Row norms ||d loss / d hidden_t|| of the gradient that the backward of the lm_head writes.

    What the token sends into the rest of the model. Magnitude only.

    Args:
        grad_hidden: (tokens, hidden), e.g. `policy_step(...).grad_hidden`. Under a vocabulary split
            over ranks, after its all-reduce.

    Returns:
        (tokens,) float32 (float64 for float64 input).

    Raises:
        ValueError: shape or dtype.

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
    """A small matrix per sequence whose inner products estimate those of the sequences' gradients.

    F_s = sum over t in s of (P_out dX_t) (P_in h_t)^T, dX_t = d loss / d hidden_t. Insert an
    adapter h -> h + M h with M = 0 before the lm_head: sum dX_t h_t^T is exactly the gradient of M,
    and F_s its two-sided random projection (LoGra on that adapter). E <F_s, F_u> = <G_s, G_u>, with
    a relative spread of about 1 / sqrt(rank). What lies below the last hidden state is not seen: a
    ranking by sketches is one of the last layer's gradients.

    Args:
        grad_hidden: (tokens, hidden), e.g. `policy_step(...).grad_hidden`. What it was scaled by
            (normaliser, gradient accumulation) scales the sketches; masked rows must be 0.
        hidden: (tokens, hidden), the hidden states that it is the gradient of.
        cu_seqlens: (seqs + 1,) int32 packing offsets.
        rank: r of the (r, hidden) projections, entries +-1 / sqrt(r). None: no projection, F_s is
            the adapter's whole (hidden, hidden) gradient.
        seed: of the projections, equal on every machine. Compare sketches of one rank and seed.
        max_seqlen: longest sequence, which only the reference pads to. None: from cu_seqlens.

    Returns:
        (seqs, rank, rank) float32 (float64 for float64 hidden); 0 for an empty sequence. Detached.

    Numerics: float32 products whatever the input dtype; grad_hidden of a 16-bit head was rounded
        once to 16 bits. Repeatable bitwise on one machine.

    Gradients and memory: none is differentiated. Extra memory 8 * tokens * rank bytes; in
        the reference as much again per padded token.

    Raises:
        ValueError: shapes, dtypes, devices, cu_seqlens, rank, max_seqlen.

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
        raise refuse(op, "max_seqlen", ">= 0", max_seqlen, "Omit it to have it computed.")
    pair = None if rank is None else projections(rank, hidden.shape[1], seed, hidden.device)
    run = select(OP, hidden.device.type, hidden.dtype).run
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        out: torch.Tensor = run(grad_hidden.detach(), hidden.detach(), cu_seqlens, pair, max_seqlen)
    return out


def check_spec(op: str, rank: int | None, seed: int) -> None:
    """Rank and seed of a sketch."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise refuse(op, "rank", "an int >= 1, or None for no projection", repr(rank), "Try 64.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise refuse(op, "seed", "an int", repr(seed), "Any fixed one does.")


@functools.lru_cache(maxsize=8)
def projections(rank: int, hidden_size: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(P_out, P_in), each (rank, hidden_size) float32 with entries +-1 / sqrt(rank)."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, rank, hidden_size), generator=generator, dtype=torch.float32)
    out, inner = ((2 * signs - 1) * rank**-0.5).to(device)
    return out, inner


register_cpu(OP, cpu_packed.sketch, ALL_DTYPES)
register_cuda(OP, cuda_packed.sketch, FLOAT_DTYPES)
register_triton(OP, triton_packed.sketch, FLOAT_DTYPES)
register_reference(OP, reference.sketch)


# ---------------------------------------------------------------------- by-product of policy_step


def request(op: str, spec: InfluenceSpec, problem: HeadProblem, cu_seqlens: torch.Tensor | None) -> HeadProblem:
    """The problem, asking for the gradient of the hidden states and the norms of the logits'."""
    if not isinstance(spec, InfluenceSpec):
        raise TypeError(f"{op}: influence must be an InfluenceSpec; got {spec!r}. Build one.")
    if cu_seqlens is None:
        raise refuse(
            op, "cu_seqlens", "given with influence= (one sketch per sequence)", "None", "Pass the packing offsets."
        )
    if torch.compiler.is_compiling():
        raise refuse(
            op, "influence", "None inside torch.compile", "a spec", "Call policy_step outside of the compiled function."
        )
    checks.check_cu_seqlens(op, cu_seqlens, problem.tokens, problem.hidden.device)
    check_spec(op, spec.rank, spec.seed)
    bias = problem.bias is not None and problem.bias.requires_grad
    dtype = result_dtype(problem.hidden.dtype)
    norms = torch.zeros(problem.tokens, dtype=dtype, device=problem.hidden.device)
    return problem._replace(needs=(True, problem.weight.requires_grad, bias), row_norms=norms)


def collect(spec: InfluenceSpec, problem: HeadProblem, gradients: Gradients, cu_seqlens: torch.Tensor) -> Influence:
    """Norms and sketches from what the step holds; lets go of a grad_hidden nobody asked for."""
    grad_hidden, norms = gradients["hidden"], problem.row_norms
    assert grad_hidden is not None and norms is not None
    if not problem.hidden.requires_grad:
        gradients["hidden"] = None
    hidden = problem.hidden.detach()
    sketches = sketch(grad_hidden, hidden, cu_seqlens, rank=spec.rank, seed=spec.seed)
    return Influence(norms, head_norms(norms, hidden), hidden_norms(grad_hidden), sketches)
