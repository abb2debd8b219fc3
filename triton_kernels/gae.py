"""gae: generalised advantage estimation over packed sequences, in one launch.

    delta_t = r_t + gamma V_next - V_t,   A_t = delta_t + gamma lam A_next,   returns_t = A_t + V_t

One program per sequence goes from its end to its start in steps of BLOCK tokens. A step is one
associative scan; A of its first token is passed to the next step. A masked token is the identity of
the scan. A second scan, over the positions of valid tokens, finds V of the next valid token. Steps
are counted from the end of the sequence. So the result of a sequence does not depend, bit for bit,
on the sequences that it is packed with.

Bytes per token at float32: 8 read (1 more with a mask; V is read a second time from L1), 8 written.
Legend: T tokens, S sequences.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.packed import first_lane, is_valid, joined, pair, reverse_minimum, reverse_recurrence


@triton.jit
def _valid_tokens(mask_ptr, first, stop, BLOCK: tl.constexpr):
    """Return the number of tokens of the sequence with mask true, int64."""
    count = stop - first
    if mask_ptr is not None:
        kept = tl.zeros((BLOCK,), tl.int64)
        for start in range(first, stop, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            kept += tl.load(mask_ptr + offs, mask=offs < stop, other=0).to(tl.int64)
        count = tl.sum(kept, axis=0)
    return count


@triton.jit
def gae_kernel(
    reward_ptr,  # (T,) float
    value_ptr,  # (T,) float
    cu_seqlens_ptr,  # (S + 1,) int32
    mask_ptr,  # (T,) bool; None: all tokens count
    finished_ptr,  # (S,) bool; None: all sequences are finished
    lam_ptr,  # (S,) float, lam_per_seq; None: one lam for all
    advantage_ptr,  # (T,) float
    returns_ptr,  # (T,) float
    gamma,  # split by `pair`; the same for the next two
    lam,
    alpha,  # length_adaptive_alpha
    ADAPTIVE: tl.constexpr,  # lam = 1 - 1 / max(alpha n, 1)
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64)
    gamma = joined(gamma)
    lam = joined(lam)
    if lam_ptr is not None:
        lam = tl.load(lam_ptr + seq).to(tl.float64)
    if ADAPTIVE:
        length = _valid_tokens(mask_ptr, first, stop, BLOCK).to(tl.float64)
        lam = 1.0 - 1.0 / tl.maximum(joined(alpha) * length, 1.0)
    decay = gamma * lam
    ends = True
    if finished_ptr is not None:
        ends = tl.load(finished_ptr + seq) != 0

    lanes = tl.arange(0, BLOCK)
    nearest = stop  # position of the next valid token; `stop` if there is none
    carried = tl.zeros((), tl.float64)  # its advantage
    for step in range(0, tl.cdiv(stop - first, BLOCK)):
        offs = stop - (step + 1) * BLOCK + lanes
        valid = offs >= first
        following = offs + 1
        if mask_ptr is not None:
            later = is_valid(mask_ptr, following, valid & (following < stop))
            valid = is_valid(mask_ptr, offs, valid)
            following = reverse_minimum(tl.where(later, following, stop), nearest)
            nearest = first_lane(following, lanes)
        r = tl.load(reward_ptr + offs, mask=valid, other=0.0).to(tl.float64)
        v = tl.load(value_ptr + offs, mask=valid, other=0.0).to(tl.float64)
        has_next = following < stop
        v_next = tl.load(value_ptr + following, mask=valid & has_next, other=0.0).to(tl.float64)
        if finished_ptr is not None:
            v_next = tl.where(has_next | ends, v_next, v)
        delta = r + gamma * v_next - v  # 0 if not valid
        scan = reverse_recurrence(tl.where(valid, decay, 1.0), delta, carried)
        carried = first_lane(scan, lanes)
        inside = offs >= first
        advantage = tl.where(valid, scan, 0.0)
        tl.store(advantage_ptr + offs, advantage.to(advantage_ptr.dtype.element_ty), mask=inside)
        tl.store(returns_ptr + offs, (advantage + v).to(returns_ptr.dtype.element_ty), mask=inside)


declare("gae", {80: LaunchConfig(block_t=512, num_warps=4)})


def gae(
    reward: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
    length_adaptive_alpha: float | None,
    mask: torch.Tensor | None,
    finished: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (advantage, returns), each (tokens,) in the dtype of `reward`.

    The caller has checked all arguments.
    """
    advantage, returns = torch.empty_like(reward), torch.empty_like(reward)
    num_seqs = cu_seqlens.shape[0] - 1
    config = choose("gae", reward)
    if reward.shape[0] and num_seqs:
        per_seq = lam if isinstance(lam, torch.Tensor) else None
        gae_kernel[(num_seqs,)](
            reward,
            value,
            cu_seqlens,
            mask,
            finished,
            per_seq,
            advantage,
            returns,
            pair(gamma),
            pair(1.0 if per_seq is not None else lam),
            pair(length_adaptive_alpha),
            ADAPTIVE=length_adaptive_alpha is not None,
            BLOCK=config.block_t,
            **config.options,
        )
    return advantage, returns


@compile_case("gae", dtypes=(torch.float32,), streams=3)  # reward, value and next value
def _(dtype: torch.dtype) -> None:
    tokens = meta(1 << 20, dtype=dtype)
    options = {"lam": 0.95, "length_adaptive_alpha": None, "mask": None, "finished": None}
    gae(tokens, tokens, borders(1024, 1 << 20), gamma=0.99, **options)


@compile_case("gae/masked", dtypes=(torch.float32, torch.float64), streams=3)
def _(dtype: torch.dtype) -> None:
    tokens, flags = meta(1 << 20, dtype=dtype), meta(1 << 20, dtype=torch.bool)
    options = {"lam": 1.0, "length_adaptive_alpha": 0.05, "mask": flags, "finished": flags[:1024]}
    gae(tokens, tokens, borders(1024, 1 << 20), gamma=0.99, **options)
