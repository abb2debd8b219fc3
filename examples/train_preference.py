"""Train a small policy from preference pairs with several losses. A run takes seconds.

The task is the one of `compare_algorithms.py`: the prompt is a digit, and the policy must write digits whose sum ends
in it, then stop. An untrained policy generates the answers. Each pair has a correct and a wrong answer to the same
digit; the correct one is chosen. Each loss trains a copy of that policy on these pairs alone. The loss and the margin
of the implicit reward are measured on held-out pairs, and the share of correct answers by sampling.

    python examples/train_preference.py
    python examples/train_preference.py --losses dpo ipo orpo --steps 200 --out runs/preference
"""

import argparse
import copy
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from compare_algorithms import DIGITS, Policy, Rollout, sample, score
from torch import Tensor

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms import PreferenceBatch, PreferenceLoss, PreferenceStep

# loss -> options. The published beta of RPO is for answers with hundreds of tokens.
LOSSES: dict[str, dict[str, Any]] = {"dpo": {}, "simpo": {}, "kto": {}, "rpo": {"beta": 0.1}}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run."""

    steps: int = 100
    pairs: int = 64
    answers: int = 2000
    lr: float = 5e-3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Answers in one rollout. The answers `chosen` and `rejected`, (pairs,) each, form the pairs."""

    rollout: Rollout
    chosen: Tensor
    rejected: Tensor

    def take(self, ids: Tensor) -> "Pairs":
        """Return the pairs `ids`, with the chosen answers first."""
        seqs, count = torch.cat([self.chosen[ids], self.rejected[ids]]), len(ids)
        place = torch.arange(count)
        return Pairs(self.rollout.take(seqs), place, count + place)


def make_pairs(policy: Policy, settings: Settings, generator: torch.Generator) -> Pairs:
    """Pair every correct answer of the policy with a wrong one to the same digit."""
    prompt = torch.arange(DIGITS).repeat_interleave(settings.answers)
    rollout = sample(policy, prompt, generator)
    right = score(rollout) > 0
    chosen, rejected = [], []
    for digit in range(DIGITS):
        good = ((prompt == digit) & right).nonzero().flatten()
        bad = ((prompt == digit) & ~right).nonzero().flatten()
        chosen.append(good)
        rejected.append(bad[torch.randperm(len(bad), generator=generator)[: len(good)]])
    order = torch.randperm(sum(map(len, chosen)), generator=generator)
    return Pairs(rollout, torch.cat(chosen)[order], torch.cat(rejected)[order])


def sums(policy: Policy, rollout: Rollout) -> Tensor:
    """Return the log-probability of each answer, (seqs,), without gradient."""
    with torch.no_grad():
        hidden, head = policy.packed_hidden(rollout), policy.head
        logp = tokfuse.linear_token_stats(hidden, head.weight, rollout.target, bias=head.bias).logp
    return tokfuse.segment_moments(logp, cu_seqlens=borders(rollout)).sum


def borders(rollout: Rollout) -> Tensor:
    """Return the offsets of the answers, (seqs + 1,) int32."""
    return torch.nn.functional.pad(rollout.length.cumsum(0), (1, 0)).to(torch.int32)


class Trainer:
    """A loss, and a policy that starts as a copy of its frozen reference."""

    def __init__(self, loss: PreferenceLoss, reference: Policy, settings: Settings) -> None:
        self.loss, self.reference = loss, reference
        self.policy = copy.deepcopy(reference)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.lr)
        self.state = loss.initial_state()

    def batch(self, pairs: Pairs) -> PreferenceBatch:
        """Return the input of the loss: pairs, or for KTO labelled answers and the divergence of the batch."""
        rollout = pairs.rollout
        given: dict[str, Any] = {}
        if self.loss.needs_reference:
            given["ref_sum"] = sums(self.reference, rollout)
        if self.loss.name == "kto":
            given["desirable"] = torch.arange(len(rollout.prompt)) < len(pairs.chosen)
            given["kl"] = self.divergence(rollout)
        else:
            given["pairs"] = torch.stack([pairs.chosen, pairs.rejected], 1)
        cu_seqlens = borders(rollout)
        return PreferenceBatch(num_tokens=int(cu_seqlens[-1]), cu_seqlens=cu_seqlens, **given)

    def divergence(self, rollout: Rollout) -> Tensor:
        """Return KTO's estimate, from every answer combined with the next prompt."""
        other = algorithms.mismatched(len(rollout.prompt))
        shifted = dataclasses.replace(rollout.take(other), prompt=rollout.prompt)
        return algorithms.kto_kl(sums(self.policy, shifted), sums(self.reference, shifted))

    def evaluate(self, pairs: Pairs) -> PreferenceStep:
        """Return loss and rewards of some pairs. If autograd is on, also the gradient."""
        head = self.policy.head
        return algorithms.preference_step(
            loss=self.loss,
            batch=self.batch(pairs),
            state=self.state,
            normalizer="batch",
            hidden=self.policy.packed_hidden(pairs.rollout),
            weight=head.weight,
            bias=head.bias,
            target=pairs.rollout.target,
        )

    def train(self, pairs: Pairs) -> None:
        """Take one optimizer step."""
        step = self.evaluate(pairs)
        self.optimizer.zero_grad(set_to_none=True)
        step.loss.backward()
        self.optimizer.step()
        self.state = self.loss.update(self.state, step)


@torch.no_grad()
def measure(trainer: Trainer, held_out: Pairs, settings: Settings) -> dict[str, float]:
    """Return loss, margin and accuracy on held-out pairs, and the share of correct samples."""
    step = trainer.evaluate(held_out)
    chosen, rejected = (
        step.rewards
        if len(step.rewards) == 2
        else (step.rewards[0][held_out.chosen], step.rewards[0][held_out.rejected])
    )
    generator = torch.Generator().manual_seed(settings.seed + 1)
    answers = sample(trainer.policy, torch.arange(DIGITS).repeat_interleave(100), generator)
    return {
        "loss": float(step.loss),
        "margin": float((chosen - rejected).mean()),
        "accuracy": float((chosen > rejected).double().mean()),
        "right": float(score(answers).mean()),
    }


def train(name: str, options: dict[str, Any], settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield the rows of one run: one before it, and one after every tenth of its steps."""
    torch.manual_seed(settings.seed)
    reference = Policy()
    generator = torch.Generator().manual_seed(settings.seed)
    pairs = make_pairs(reference, settings, generator)
    count = len(pairs.chosen)
    held_out = pairs.take(torch.arange(count // 5))
    trainer = Trainer(algorithms.make(name, **options), reference, settings)
    for step in range(settings.steps + 1):
        if step % max(1, settings.steps // 10) == 0:
            yield {"loss_name": name, "step": step, **measure(trainer, held_out, settings)}
        ids = torch.randint(count // 5, count, (settings.pairs,), generator=generator)
        trainer.train(pairs.take(ids))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--losses", nargs="+", default=list(LOSSES), metavar="NAME", choices=algorithms.list("preference")
    )
    for field in dataclasses.fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    parser.add_argument("--out", type=Path, help="folder for rows.jsonl; without it, no file is written")
    options = vars(parser.parse_args(argv))
    out, losses = options.pop("out"), options.pop("losses")
    settings = Settings(**options)
    rows = []
    for name in losses:
        own = list(train(name, LOSSES.get(name, {}), settings))
        rows += own
        first, last = own[0], own[-1]
        changes = "  ".join(
            f"{key} {first[key]:.3f} -> {last[key]:.3f}"
            for key in first
            if key in ("loss", "margin", "accuracy", "right")
        )
        print(f"{name:8} {changes}", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
