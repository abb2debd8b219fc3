"""LESS in a fine-tuning run: train on the samples whose Adam update points where the target task needs it.

The pool has three kinds of samples: sums with right answers, sums with wrong answers, and another task. A short warm-up
on random samples gives the second moments of Adam. `influence.capture(optimizer=)` takes the features of the whole pool
with these moments, and plain features of a few right sums. LESS chooses a third of the pool, and the run goes on from
the warm-up with this third only.

    python examples/select_less.py             # a few minutes on two cores
    python examples/select_less.py --steps 12 --seed 1

The example compares the choice with a random third, on held-out sums. The paper fine-tunes LoRA weights of larger
models, and projects all layers at once.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo_demo.chains import Responses, Writer, direct, main, optimizer_of, sums
from torch import Tensor

from tokfuse import algorithms, influence

KINDS = ("right sums", "wrong sums", "other task")


@dataclass(frozen=True)
class Settings:
    """Settings of a run. The paper keeps 5% of the samples; here it is a third."""

    per_kind: int = 16
    validation: int = 8
    held_out: int = 32
    warm_steps: int = 4
    batch: int = 8
    fraction: float = 1 / 3
    lr: float = 5e-5


@dataclass(frozen=True)
class Sample:
    """A prompt and the response to learn."""

    kind: str
    prompt: str
    response: str


def sum_samples(seed: int, start: int, count: int, wrong: int = 0) -> list[Sample]:
    """Return sums whose answers are wrong by a number."""
    return [
        Sample(KINDS[int(wrong > 0)], direct(q), f" {q.answer + wrong}\n") for q in sums(seed, start, count, terms=2)
    ]


def pool_of(seed: int, s: Settings) -> list[Sample]:
    """Return equal numbers of each kind. The other task is to repeat three digits."""
    n = s.per_kind
    texts = [" ".join(map(str, q.terms)) for q in sums(seed, 2 * n, n, terms=3)]
    others = [Sample(KINDS[2], f"repeat: {text}\nrepeat:", f" {text}\n") for text in texts]
    return sum_samples(seed, 0, n) + sum_samples(seed, n, n, wrong=3) + others


def encoded(writer: Writer, data: list[Sample]) -> Responses:
    return writer.encode([x.prompt for x in data], [x.response for x in data])


def losses(writer: Writer, responses: Responses) -> Tensor:
    """Return the mean negative log-prob of a token of each response, (samples,)."""
    logp = writer.stats(responses).logp
    return torch.stack([-part.mean() for part in logp.split(responses.cu_seqlens.diff().tolist())])


def features(writer: Writer, data: list[Sample], s: Settings, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Return the captured features of every sample, (samples, numbers). optimizer: divide by its second moments."""
    with influence.capture(writer.model, optimizer=optimizer) as captured:
        for start in range(0, len(data), s.batch):
            responses = encoded(writer, data[start : start + s.batch])
            # The fused lm_head reads the positions of the responses only.
            captured.batch(head_cu_seqlens=responses.cu_seqlens)
            losses(writer, responses).sum().backward()
            writer.model.zero_grad(set_to_none=True)
    return captured.features


def train(writer: Writer, data: list[Sample], optimizer: torch.optim.Optimizer, steps: int, s: Settings) -> None:
    """Take optimizer steps on shuffled epochs of the data."""
    generator, queue = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        while len(queue) < s.batch:
            queue += torch.randperm(len(data), generator=generator).tolist()
        batch, queue = queue[: s.batch], queue[s.batch :]
        optimizer.zero_grad(set_to_none=True)
        losses(writer, encoded(writer, [data[i] for i in batch])).mean().backward()
        optimizer.step()


@torch.no_grad()
def measure(writer: Writer, data: list[Sample]) -> str:
    """Return the loss, and the share of samples whose response greedy decoding gives, as text."""
    responses = encoded(writer, data)
    stats, sizes = writer.stats(responses), responses.cu_seqlens.diff().tolist()
    hits = [bool(part.bool().all()) for part in stats.top1.split(sizes)]
    loss = torch.stack([-part.mean() for part in stats.logp.split(sizes)]).mean()
    return f"accuracy {sum(hits) / len(hits):.3f}, loss {loss:.3f}"


def run(writer: Writer, steps: int, seed: int, settings: Settings | None = None) -> None:
    """Print what LESS chooses, and the held-out accuracy after each training."""
    s = settings or Settings()
    pool, wanted = pool_of(seed, s), sum_samples(seed, 10_000, s.validation)
    known = {x.prompt for x in pool + wanted}
    held_out = [x for x in sum_samples(seed, 20_000, 4 * s.held_out) if x.prompt not in known][: s.held_out]
    print(f"before: {measure(writer, held_out)}", flush=True)
    optimizer = optimizer_of(writer.model, s.lr)
    train(writer, pool, optimizer, s.warm_steps, s)
    print(f"after {s.warm_steps} steps on random samples: {measure(writer, held_out)}", flush=True)
    start = copy.deepcopy((writer.model.state_dict(), optimizer.state_dict()))
    less = algorithms.make("less", fraction=s.fraction)
    ids = less.select([features(writer, pool, s, optimizer)], [features(writer, wanted, s)]).tolist()
    for name, chosen in (("LESS", ids), ("random", torch.randperm(len(pool)).tolist()[: len(ids)])):
        writer.model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
        train(writer, [pool[i] for i in chosen], optimizer, steps, s)
        counts = ", ".join(f"{sum(pool[i].kind == kind for i in chosen)} {kind}" for kind in KINDS)
        print(f"{steps} more steps on {name}'s choice ({counts}): {measure(writer, held_out)}", flush=True)


if __name__ == "__main__":
    sys.exit(main(run, steps=6))
