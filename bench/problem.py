"""The parts of a case: configuration, inputs, the providers that can run it, and the exact answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tokfuse.bench.measure import Outputs, Provider

CLIP = 0.2  # ratio in [1 - CLIP, 1 + CLIP]
LOGIT_SCALE = 3.0  # standard deviation of the random logits
OLD_LOGP_NOISE = 0.02  # ratios stay within 10 standard deviations of 1, so no row is clipped
SEQUENCES = 16


class Unsupported(Exception):
    """The provider does not support this case here. The text becomes the note of the row."""


@dataclass(frozen=True)
class Config:
    """One case. `hidden` is 0 for ops that start from logits."""

    op: str
    mode: str
    variant: str
    dtype: str
    tokens: int
    vocab: int
    hidden: int = 0
    seed: int = 0
    device: str = "cpu"

    @property
    def shape(self) -> str:
        sizes = [self.tokens, self.hidden, self.vocab] if self.hidden else [self.tokens, self.vocab]
        return "x".join(map(str, sizes))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def item_bytes(self) -> int:
        return self.torch_dtype.itemsize


Factory = Callable[[], Provider]


@dataclass
class Problem:
    """A case with its inputs.

    Args:
        config: the configuration.
        ours, peers, limits: provider name -> factory. A factory may raise `Unsupported`.
        exact: returns the float64 outputs by name.
        bounds: names in `limits` that bound the work. The slowest of them is the limit of the row.
        bytes_moved, bytes_formula, flops, flops_formula: the least bytes and operations of this work.
        cold: evict the caches before each call.
        bounds_peers: False if `bounds` does not apply to the algorithm of the peers.
    """

    config: Config
    ours: dict[str, Factory]
    peers: dict[str, Factory]
    limits: dict[str, Factory] = field(default_factory=dict)
    exact: Callable[[], Outputs] = dict
    bounds: tuple[str, ...] = ()
    bytes_moved: int = 0
    bytes_formula: str = ""
    flops: int = 0
    flops_formula: str = ""
    cold: bool = True
    bounds_peers: bool = True
    _answer: Outputs | None = None

    def answer(self) -> Outputs:
        """Return the float64 outputs. They are computed once."""
        if self._answer is None:
            self._answer = self.exact()
        return self._answer

    def forget(self) -> None:
        """Free the float64 outputs."""
        self._answer = None


@dataclass
class Batch:
    """Inputs per token of a policy update. The sequences are concatenated and have the same length."""

    target: torch.Tensor
    old_logp: torch.Tensor
    advantage: torch.Tensor
    num_seqs: int

    @property
    def num_tokens(self) -> int:
        return self.target.numel()

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """View (tokens, ...) as (seqs, length, ...), the layout of most peers."""
        return tensor.view(self.num_seqs, -1, *tensor.shape[1:])


def on_device(inputs: Any, device: str) -> None:
    """Move every tensor of a record of inputs to the device, including nested records."""
    if device == "cpu":
        return
    for name, value in vars(inputs).items():
        if isinstance(value, torch.Tensor):
            moved = value.detach().to(device).requires_grad_(value.requires_grad)
            setattr(inputs, name, moved)
        elif isinstance(value, Batch):
            on_device(value, device)


def generator(config: Config) -> torch.Generator:
    """Return a generator on the device of the case. At GPU shapes, drawing on the CPU takes minutes."""
    return torch.Generator(config.device).manual_seed(config.seed)


def make_logits(config: Config, gen: torch.Generator) -> torch.Tensor:
    """Draw normal logits of shape (tokens, vocab) in the dtype of the case."""
    out = torch.empty(config.tokens, config.vocab, device=gen.device)
    out.normal_(0.0, LOGIT_SCALE, generator=gen)
    return out.to(config.torch_dtype)


def make_head(config: Config, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw hidden states (tokens, hidden) and a weight (vocab, hidden).

    Their logits are distributed as the logits of `make_logits`.
    """
    hidden = torch.randn(config.tokens, config.hidden, generator=gen, device=gen.device)
    weight = torch.empty(config.vocab, config.hidden, device=gen.device)
    weight.normal_(0.0, LOGIT_SCALE / config.hidden**0.5, generator=gen)
    return hidden.to(config.torch_dtype), weight.to(config.torch_dtype)


def sample_target(logits: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
    """Sample tokens from the policy, as in a rollout."""
    rows = [
        torch.multinomial(torch.softmax(part.float(), -1), 1, generator=gen).squeeze(-1) for part in logits.split(64)
    ]
    return torch.cat(rows)


def make_batch(target: torch.Tensor, logp: torch.Tensor, gen: torch.Generator, grad_rows: float = 1.0) -> Batch:
    """Draw old log-probabilities close to `logp`, and one advantage per sequence.

    `grad_rows` is the share of the sequences with a non-zero advantage. The other sequences represent groups
    in which every answer got the same reward. Their rows have no gradient.
    """
    num_tokens = target.numel()
    num_seqs = SEQUENCES if num_tokens % SEQUENCES == 0 else 1
    noise = torch.randn(num_tokens, generator=gen, device=gen.device) * OLD_LOGP_NOISE
    advantage = torch.randn(num_seqs, generator=gen, device=gen.device)
    live = max(1, round(num_seqs * grad_rows))
    advantage[torch.randperm(num_seqs, generator=gen, device=gen.device)[live:]] = 0.0
    per_token = advantage.repeat_interleave(num_tokens // num_seqs)
    return Batch(target, logp.float() + noise, per_token, num_seqs)
