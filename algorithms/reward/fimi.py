"""FiMi-RM: a probe predicts the reward from the length, and the reward learns to differ from the probe."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.batch import World
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.reward.pairwise import bradley_terry
from tokfuse.algorithms.stateful import State, Stateful
from tokfuse.runtime.core.checks import FLOATS, INTS, Rows, check_integer, check_number, check_values, check_vector
from tokfuse.runtime.core.errors import refuse

OP = "algorithms.fimi_rm"


def length_encoding(length: torch.Tensor, dim: int) -> torch.Tensor:
    """Return sin and cos of length / 10000^(2 j / dim), j = 0 .. dim / 2 - 1, (samples, dim).

    `length` is (samples,), finite and >= 0. `dim` is even and >= 2.
    """
    _check_dim(dim)
    check_vector(OP, "length", length, None, FLOATS | INTS)
    check_values(OP, "length", length, 0)
    rate = torch.arange(0, dim, 2, device=length.device, dtype=torch.float64) / dim
    angle = length.double().unsqueeze(1) / 10000.0**rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


def _check_dim(dim: int) -> None:
    if check_integer(OP, "dim", dim, 2) % 2:
        raise refuse(OP, "dim", "even", dim, "It counts sines and cosines, which come in pairs.")


class LengthProbe(torch.nn.Module):
    """reward ~ w'x + b, x = e + W2 relu(W1 e), where e is the length encoding. 6441 parameters at dim 56.

    Args:
        dim: size of the encoding, even, >= 2.
    """

    def __init__(self, dim: int = 56) -> None:
        super().__init__()
        _check_dim(dim)
        self.dim = dim
        self.first, self.second = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)
        self.out = torch.nn.Linear(dim, 1)

    def forward(self, length: torch.Tensor) -> torch.Tensor:
        """Return the predicted rewards of lengths, both (samples,)."""
        x = length_encoding(length, self.dim).to(self.out.weight.dtype)
        x = x + self.second(torch.relu(self.first(x)))
        out: torch.Tensor = self.out(x).squeeze(1)
        return out


def pearson(x: torch.Tensor, y: torch.Tensor, world: World | None = None) -> torch.Tensor:
    """Return the Pearson correlation over all ranks, () float64, differentiable in this rank's values.

    It is 0 with gradient 0 if x or y is constant. Every rank returns the same value. Its gradient is with
    respect to the rank's own entries, so *sum* the gradients of the ranks.

    Args:
        x, y: (samples,), float.
        world: the ranks that share the batch. None: this process alone.
    """
    check_vector(OP, "x", x)
    check_vector(OP, "y", y, Rows(x.shape[0], "x", x.device))
    x, y = x.double(), y.double()
    first = torch.stack([torch.full_like(x.sum(), x.shape[0]), x.sum(), y.sum()]).detach()
    first = first if world is None else world.sum(first)
    # The means need no gradient: the derivative of the global sums with respect to them is 0.
    mean = first[1:] / first[0].clamp(min=1)
    a, b = x - mean[0], y - mean[1]
    moments = _global(torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]), world)
    spread = moments[1] * moments[2]
    # If all values are equal, rounding leaves a spread of about eps^2.
    floor = 1e-24 * first[0] ** 2 * (1 + mean**2).prod()
    flat = spread.detach() <= floor
    return torch.where(flat, 0.0, moments[0]) / torch.where(flat, 1.0, spread).sqrt()


def _global(local: torch.Tensor, world: World | None) -> torch.Tensor:
    """Return the sums over ranks, differentiable in the local part."""
    if world is None:
        return local
    return local + (world.sum(local.detach()) - local.detach())


@register(
    "fimi_rm",
    kind="reward",
    system="FiMi-RM",
    label="recon",
    required=("warmup",),
    source="arXiv 2505.12843 v1, v2 (three agreeing notes)",
    summary="Bradley-Terry plus |Pearson| with a length probe, trained alternately",
    differs="mse_weight=1 is v1, 0 (default) is v2. The width of the probe gives the stated 6.4 K "
    "parameters. The length of the warm-up was not found and must be given.",
)
@dataclass(frozen=True, kw_only=True)
class FiMi(Stateful):
    """Probe: -|Pearson(sg r, p)| + mse_weight MSE. Reward: Bradley-Terry + |Pearson(r, sg p)|. Reconstructed.

    p is the probe's prediction and sg stops the gradient. The two are trained alternately, after a warm-up with
    Bradley-Terry alone.

    Args:
        warmup: number of steps with Bradley-Terry alone, >= 0.
        period: number of steps between two swaps, >= 1; the probe is first.
        mse_weight: weight of the mean squared error in the probe's loss, >= 0.

    State: {"step": int}.
    """

    warmup: int
    period: int = 8
    mse_weight: float = 0.0

    def __post_init__(self) -> None:
        check_number(OP, "mse_weight", self.mse_weight, 0.0)
        check_integer(OP, "warmup", self.warmup, 0)
        check_integer(OP, "period", self.period, 1)

    def initial_state(self) -> State:
        return {"step": 0}

    def phase(self, state: State) -> str:
        """Return what the next step trains: "warmup" (the reward, without penalty), "probe" or "reward"."""
        step = state["step"] - self.warmup
        if step < 0:
            return "warmup"
        return "probe" if step // self.period % 2 == 0 else "reward"

    def advance(self, state: State) -> State:
        """Return the state after an optimizer step."""
        return {"step": state["step"] + 1}

    def probe_loss(self, reward: torch.Tensor, predicted: torch.Tensor, world: World | None = None) -> torch.Tensor:
        """Return the probe's loss, (), differentiable in `predicted`. Pass both sides of all pairs.

        Args:
            reward: (samples,), rewards of the model; detached.
            predicted: (samples,), predictions of the probe.
            world: the ranks. The squared error is this rank's share of the global mean. None: this process alone.
        """
        target = reward.detach().double()
        loss = -pearson(predicted, target, world).abs()
        if self.mse_weight:
            count = _global(torch.full_like(target.sum(), target.shape[0]), world).clamp(min=1)
            loss = loss + self.mse_weight * ((predicted.double() - target) ** 2).sum() / count
        return loss

    def reward_loss(
        self,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        predicted_chosen: torch.Tensor,
        predicted_rejected: torch.Tensor,
        world: World | None = None,
    ) -> torch.Tensor:
        """Return mean Bradley-Terry + |Pearson| over both sides, (), differentiable in the rewards.

        Args:
            chosen, rejected: (pairs,), rewards.
            predicted_chosen, predicted_rejected: (pairs,), predictions of the probe; detached.
            world: the ranks. Bradley-Terry is this rank's share of the global mean. None: this process alone.
        """
        pairs = bradley_terry(chosen, rejected).double()
        count = _global(torch.full_like(pairs.sum().detach(), pairs.shape[0]), world).clamp(min=1)
        rewards = torch.cat([chosen, rejected])
        predicted = torch.cat([predicted_chosen, predicted_rejected]).detach()
        return pairs.sum() / count + pearson(rewards, predicted.to(rewards.dtype), world).abs()
