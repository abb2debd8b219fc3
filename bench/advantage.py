"""Case `advantage`: the ops between rewards and the loss, on packed sequences of different lengths.

A shape is "sequences x longest". Lengths are uniform in [longest / 64, longest], in groups of 16.
Variants: `gae`, `vtrace`, `group_advantage`, `whiten`, `offpolicy_weights` (token-level truncation
and a geometric filter), `segment_moments` (by sequence).

`torch_eager` computes the same result in vectorised torch. For the two scans this is the loop over time
steps on padded rows that trainers use. Its inputs are padded, time-major and created before the timing,
so each step is contiguous. Its results are compared with float64 once, outside the timing. They are
padded, and the time to pack them would be unfair to the peer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokfuse.bench import ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Factory, Problem, Unsupported, on_device
from tokfuse.runtime.ops.gae import gae
from tokfuse.runtime.ops.group_advantage import group_advantage
from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights
from tokfuse.runtime.ops.segment_moments import segment_moments
from tokfuse.runtime.ops.vtrace import vtrace
from tokfuse.runtime.ops.whiten import whiten
from tokfuse.runtime.policy.keep_rule import KeepRule

OP = "advantage"
SHAPES = ("4096x1024",)
QUICK_SHAPES = ("256x128",)
DTYPES = ("float32",)
VARIANTS = ("gae", "vtrace", "group_advantage", "whiten", "offpolicy_weights", "segment_moments")
CASES = tuple(("forward", variant) for variant in VARIANTS)

GAMMA, LAM = 0.99, 0.95
GROUP = 16
CAP, GEO_LOW, GEO_HIGH = 2.0, 0.99, 1.01
# Least bytes per token, read and written.
BYTES = {"gae": 16, "vtrace": 24, "group_advantage": 0, "whiten": 8, "offpolicy_weights": 13, "segment_moments": 4}
GROUP_BYTES = 16  # reward, id and advantage of one sequence


class _Inputs:
    """Packed vectors of one batch, and their time-major padded form."""

    def __init__(self, config: Config) -> None:
        gen = torch.Generator().manual_seed(config.seed)  # a few vectors, so they are drawn on the CPU and moved
        longest = config.vocab
        shortest = max(1, longest // 64)
        self.seqs = config.tokens
        self.lengths = torch.randint(shortest, longest + 1, (self.seqs,), generator=gen)
        self.cu = torch.zeros(self.seqs + 1, dtype=torch.int32)
        self.cu[1:] = self.lengths.cumsum(0)
        self.tokens = int(self.cu[-1])
        self.value, self.reward, noise = (torch.randn(self.tokens, generator=gen) for _ in range(3))
        self.log_ratio = 0.02 * noise
        self.zero = torch.zeros(self.tokens)
        self.seq = torch.repeat_interleave(torch.arange(self.seqs), self.lengths)
        self.score = torch.randn(self.seqs, generator=gen)
        self.group = torch.arange(self.seqs) // GROUP
        self.present = torch.arange(longest)[:, None] < self.lengths  # (time, seqs)

    def padded(self, packed: torch.Tensor) -> torch.Tensor:
        """Return a packed vector as (time, seqs), with zeros after the end of a sequence."""
        by_seq = packed.new_zeros(self.present.T.shape)
        by_seq[self.present.T] = packed
        return by_seq.T.contiguous()

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.T[self.present.T]


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    data = _Inputs(config)
    on_device(data, config.device)
    case = _CASES[config.variant]
    per_token = BYTES[config.variant]
    moved = per_token * data.tokens or GROUP_BYTES * data.seqs

    def limit() -> Provider:
        return probes.copy_probe(torch.zeros(max(1, moved // 8), device=config.device))

    return Problem(
        config,
        ours={"tokfuse": lambda: ours.provider(lambda: case.ours(data))},
        peers={name: _peer_factory(name, data, case) for name in peer_names},
        limits={"limit_copy": limit},
        exact=lambda: case.exact(data),
        bounds=("copy",),
        bytes_moved=moved,
        bytes_formula=f"{per_token} per token" if per_token else f"{GROUP_BYTES} per sequence",
    )


@dataclass(frozen=True)
class _Case:
    """One variant.

    Args:
        ours: the tokfuse call.
        exact: returns the float64 answer.
        torch_form: prepares the torch call.
        is_padded: True if the outputs of the torch call are padded.
    """

    ours: Callable[[_Inputs], Outputs]
    exact: Callable[[_Inputs], Outputs]
    torch_form: Callable[[_Inputs], Callable[[], Outputs]]
    is_padded: bool = False


def _peer_factory(name: str, data: _Inputs, case: _Case) -> Factory:
    def factory() -> Provider:
        if name != "torch_eager":
            raise Unsupported("this case has only the peer torch_eager")
        run = case.torch_form(data)
        found, wanted = run(), case.exact(data)
        for key, value in found.items():
            flat = data.packed(value) if case.is_padded else value
            torch.testing.assert_close(flat.double(), wanted[key], rtol=1e-4, atol=1e-3)
        if case.is_padded:
            return peers.provider(name, lambda: _dropped(run()), note="time loop, padded")
        return peers.provider(name, run, note="vectorised torch")

    return factory


def _dropped(outputs: Outputs) -> Outputs:
    """Discard the outputs. They are padded, and they were compared when the provider was created."""
    del outputs
    return {}


def _gae_torch(data: _Inputs) -> Callable[[], Outputs]:
    reward, value = data.padded(data.reward), data.padded(data.value)
    present = data.present.float()

    def run() -> Outputs:
        carried = torch.zeros(data.seqs, device=data.reward.device)
        following = torch.zeros(data.seqs, device=data.reward.device)
        advantage = torch.empty_like(reward)
        for t in reversed(range(reward.shape[0])):
            delta = reward[t] + GAMMA * following - value[t]
            carried = (delta + GAMMA * LAM * carried) * present[t]
            following = value[t]
            advantage[t] = carried
        return {"advantage": advantage, "returns": advantage + value}

    return run


def _vtrace_torch(data: _Inputs) -> Callable[[], Outputs]:
    reward, value = data.padded(data.reward), data.padded(data.value)
    log_ratio, present = data.padded(data.log_ratio), data.present.float()

    def run() -> Outputs:
        ratio = log_ratio.clamp(-20.0, 20.0).exp().clamp(max=1.0)
        carried = torch.zeros(data.seqs, device=data.reward.device)
        following = torch.zeros(data.seqs, device=data.reward.device)
        target, advantage = torch.empty_like(reward), torch.empty_like(reward)
        for t in reversed(range(reward.shape[0])):
            ahead = reward[t] + GAMMA * following - value[t]
            advantage[t] = ahead + GAMMA * carried
            carried = (ratio[t] * ahead + GAMMA * LAM * ratio[t] * carried) * present[t]
            following = value[t]
            target[t] = value[t] + carried
        return {"target": target, "advantage": advantage}

    return run


def _group_torch(data: _Inputs) -> Callable[[], Outputs]:
    def run() -> Outputs:
        _, index, count = data.group.unique(return_inverse=True, return_counts=True)
        zero = data.score.new_zeros(count.shape[0])
        mean = zero.index_add(0, index, data.score) / count
        centred = data.score - mean[index]
        var = zero.index_add(0, index, centred**2) / (count - 1)
        return {"advantage": centred / (var.sqrt()[index] + 1e-6)}

    return run


def _whiten_torch(data: _Inputs) -> Callable[[], Outputs]:
    def run() -> Outputs:
        var, mean = torch.var_mean(data.value)
        return {"advantage": (data.value - mean) * torch.rsqrt(var + 1e-8)}

    return run


def _offpolicy_torch(data: _Inputs) -> Callable[[], Outputs]:
    def run() -> Outputs:
        d = (data.log_ratio - data.zero).clamp(-20.0, 20.0)
        mean = data.reward.new_zeros(data.seqs).index_add(0, data.seq, d) / data.lengths
        ratio = mean.exp()
        kept = ((ratio >= GEO_LOW) & (ratio <= GEO_HIGH))[data.seq]
        weight = d.exp().clamp(max=CAP) * kept
        ess = weight.sum() ** 2 / (weight**2).sum()
        return {"weight": weight, "ess": ess}

    return run


def _moments_torch(data: _Inputs) -> Callable[[], Outputs]:
    def run() -> Outputs:
        x, zero = data.value, torch.zeros(data.seqs, device=data.reward.device)
        return {
            "sum": zero.index_add(0, data.seq, x),
            "sum_sq": zero.index_add(0, data.seq, x * x),
            "min": (zero + float("inf")).scatter_reduce(0, data.seq, x, "amin"),
            "max": (zero - float("inf")).scatter_reduce(0, data.seq, x, "amax"),
        }

    return run


def _gae(data: _Inputs, wide: bool = False) -> Outputs:
    cast = _cast(wide)
    out = gae(cast(data.reward), cast(data.value), data.cu, gamma=GAMMA, lam=LAM)
    return dict(zip(("advantage", "returns"), out, strict=True))


def _vtrace(data: _Inputs, wide: bool = False) -> Outputs:
    inputs = map(_cast(wide), (data.log_ratio, data.reward, data.value))
    out = vtrace(*inputs, data.cu, gamma=GAMMA, lam=LAM)
    return {"target": out.target, "advantage": out.advantage}


def _group(data: _Inputs, wide: bool = False) -> Outputs:
    return {"advantage": group_advantage(_cast(wide)(data.score), data.group)}


def _whiten(data: _Inputs, wide: bool = False) -> Outputs:
    return {"advantage": whiten(_cast(wide)(data.value))}


def _offpolicy(data: _Inputs, wide: bool = False) -> Outputs:
    cast = _cast(wide)
    out = offpolicy_weights(
        cast(data.log_ratio),
        cast(data.zero),
        mode="truncate",
        high=CAP,
        rules=(KeepRule("ratio", "mean", GEO_LOW, GEO_HIGH),),
        cu_seqlens=data.cu,
    )
    return {"weight": out.weight, "ess": out.ess}


def _moments(data: _Inputs, wide: bool = False) -> Outputs:
    return segment_moments(_cast(wide)(data.value), cu_seqlens=data.cu)._asdict()


def _cast(wide: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    return (lambda x: x.double()) if wide else (lambda x: x)


def _case(
    call: Callable[..., Outputs], torch_form: Callable[[_Inputs], Callable[[], Outputs]], is_padded: bool = False
) -> _Case:
    return _Case(call, lambda data: call(data, wide=True), torch_form, is_padded)


_CASES = {
    "gae": _case(_gae, _gae_torch, is_padded=True),
    "vtrace": _case(_vtrace, _vtrace_torch, is_padded=True),
    "group_advantage": _case(_group, _group_torch),
    "whiten": _case(_whiten, _whiten_torch),
    "offpolicy_weights": _case(_offpolicy, _offpolicy_torch),
    "segment_moments": _case(_moments, _moments_torch),
}
