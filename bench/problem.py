"""What a case is: a configuration, its inputs, the providers that can do it, the exact answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tokfuse.bench.measure import Outputs, Provider

CLIP = 0.2  # ratio in [1 - CLIP, 1 + CLIP]
LOGIT_SCALE = 3.0  # standard deviation of the made-up logits
OLD_LOGP_NOISE = 0.02  # ratios stay within 10 of these of 1, so no row is clipped
SEQUENCES = 16


class Unsupported(Exception):
    """This provider cannot do this case here; the text becomes the row's note."""


@dataclass(frozen=True)
class Config:
    """One case: `hidden` is 0 for ops that start from logits."""

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
    """A case with its inputs made.

    Args:
        config: what it is.
        ours, peers, limits: provider name -> factory; a factory may raise `Unsupported`.
        exact: float64 outputs by name.
        bounds: names in `limits` that bound the work; the slowest of them is the row's limit.
        bytes_moved, bytes_formula, flops, flops_formula: the least this work must move and compute.
        cold: evict the caches before each call.
        bounds_peers: False where `bounds` says nothing about the peers' own way.
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
        """The float64 outputs, computed once."""
        if self._answer is None:
            self._answer = self.exact()
        return self._answer

    def forget(self) -> None:
        """Free the float64 outputs."""
        self._answer = None


@dataclass
class Batch:
    """Per-token inputs of a policy update; sequences lie one after another, all of one length."""

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
    """Move every tensor that a record of inputs holds, nested records included."""
    if device == "cpu":
        return
    for name, value in vars(inputs).items():
        if isinstance(value, torch.Tensor):
            moved = value.detach().to(device).requires_grad_(value.requires_grad)
            setattr(inputs, name, moved)
        elif isinstance(value, Batch):
            on_device(value, device)


def generator(config: Config) -> torch.Generator:
    """Draws on the device of the case: at the shapes of a GPU, drawing on the CPU takes minutes."""
    return torch.Generator(config.device).manual_seed(config.seed)


def make_logits(config: Config, gen: torch.Generator) -> torch.Tensor:
    """Normal logits, (tokens, vocab) in the case's dtype."""
    out = torch.empty(config.tokens, config.vocab, device=gen.device)
    out.normal_(0.0, LOGIT_SCALE, generator=gen)
    return out.to(config.torch_dtype)


def make_head(config: Config, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (tokens, hidden) and weight (vocab, hidden); logits as of `make_logits`."""
    hidden = torch.randn(config.tokens, config.hidden, generator=gen, device=gen.device)
    weight = torch.empty(config.vocab, config.hidden, device=gen.device)
    weight.normal_(0.0, LOGIT_SCALE / config.hidden**0.5, generator=gen)
    return hidden.to(config.torch_dtype), weight.to(config.torch_dtype)


def sample_target(logits: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
    """Tokens drawn from the policy itself, as a rollout would."""
    rows = [
        torch.multinomial(torch.softmax(part.float(), -1), 1, generator=gen).squeeze(-1) for part in logits.split(64)
    ]
    return torch.cat(rows)


def make_batch(target: torch.Tensor, logp: torch.Tensor, gen: torch.Generator, grad_rows: float = 1.0) -> Batch:
    """Old log-probabilities near `logp`, and one advantage per sequence.

    `grad_rows`: share of the sequences with a non-zero advantage; the others are those of groups in
    which every answer got the same reward, and their rows carry no gradient.
    """
    num_tokens = target.numel()
    num_seqs = SEQUENCES if num_tokens % SEQUENCES == 0 else 1
    noise = torch.randn(num_tokens, generator=gen, device=gen.device) * OLD_LOGP_NOISE
    advantage = torch.randn(num_seqs, generator=gen, device=gen.device)
    live = max(1, round(num_seqs * grad_rows))
    advantage[torch.randperm(num_seqs, generator=gen, device=gen.device)[live:]] = 0.0
    per_token = advantage.repeat_interleave(num_tokens // num_seqs)
    return Batch(target, logp.float() + noise, per_token, num_seqs)
