"""R2VPO with a replay buffer: train on stale rollouts, with a bound on the variance of the ratio instead of a clip.

Each step samples one fresh rollout and trains on it and on older ones. Every rollout keeps the log-probabilities of the
policy that sampled it, so the ratio of an old rollout is its true importance weight. A Lagrange multiplier (`penalty`)
rises while the mean of (ratio - 1)^2 is above its bound, and falls to 0 while it is below.

    python examples/replay_r2vpo.py            # a few minutes on two cores
    python examples/replay_r2vpo.py --steps 40 --seed 1

The example shows how the divergence grows with the age of a rollout, how the multiplier answers, and what one sampled
rollout is worth if it is used several times. It does not reproduce a result of the paper.
"""

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo_demo.chains import Responses, Sum, Writer, direct, main, optimizer_of, sums

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms import Batch, Plan, train_step


@dataclass(frozen=True)
class Settings:
    """Settings of a run. delta, step_size and penalty have no published value."""

    prompts: int = 8
    group_size: int = 4
    new_tokens: int = 4
    terms: int = 2
    kept: int = 4  # rollouts in the buffer
    replays: int = 2  # stale rollouts per step
    lr: float = 5e-6
    delta: float = 0.05
    step_size: float = 1.0
    penalty: float = 0.04


@dataclass(frozen=True)
class Stored:
    """A rollout and everything that its loss needs later."""

    step: int
    responses: Responses
    batch: Batch


@dataclass
class Replay:
    """A policy, the method with its multiplier, and the last rollouts."""

    writer: Writer
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        s = self.settings
        self.method = algorithms.make("r2vpo", delta=s.delta, step_size=s.step_size, penalty=s.penalty)
        self.state = self.method.initial_state()
        self.optimizer = optimizer_of(self.writer.model, s.lr)
        self.buffer: deque[Stored] = deque(maxlen=s.kept)
        self.done = 0

    def collect(self, questions: list[Sum]) -> Stored:
        """Sample a group of answers to each question. Keep their log-probabilities and advantages."""
        asked = [q for q in questions for _ in range(self.settings.group_size)]
        responses = self.writer.sample([direct(q) for q in asked], self.settings.new_tokens)
        right = [float(q.right(text)) for q, text in zip(asked, self.writer.texts(responses), strict=True)]
        with torch.no_grad():
            stats = self.writer.stats(responses)
        batch = Batch(
            reward=torch.tensor(right),
            group_ids=torch.arange(len(asked)) // self.settings.group_size,
            cu_seqlens=responses.cu_seqlens,
            old_logp=stats.logp,
            entropy=stats.entropy,
        )
        return Stored(self.done, responses, self.method.prepare(batch, self.state))

    def train(self, stored: Stored) -> float:
        """Take one optimizer step on a rollout of any age. Return the mean of (ratio - 1)^2 before it."""
        squares: list[float] = []

        def watch(plan: Plan, inputs: Mapping[str, Any], step: tokfuse.PolicyStep) -> None:
            measured = self.method.measure(plan, step.stats.logp)
            squares.append(float(measured["square"] / measured["tokens"]))

        forward = self.writer.reader(stored.responses)
        done = train_step(self.method, self.state, stored.batch, forward, self.optimizer, on_step=watch)
        self.state = done.state
        return squares[0]

    def step(self, questions: list[Sum]) -> dict[str, float]:
        """Sample a rollout; train on it and on some older ones. Return the figures of the step."""
        fresh = self.collect(questions)
        ages = torch.randperm(len(self.buffer))[: self.settings.replays].tolist()
        stale = [self.buffer[i] for i in ages]
        self.buffer.append(fresh)
        first = self.train(fresh)
        squares = [self.train(old) for old in stale]
        self.done += 1
        return {
            "reward": float(fresh.batch.reward.mean()),
            "age": sum(fresh.step - old.step for old in stale) / max(1, len(stale)),
            "fresh": first,
            "stale": sum(squares) / max(1, len(squares)),
            "penalty": self.state["penalty"],
        }


def run(writer: Writer, steps: int, seed: int, settings: Settings | None = None) -> None:
    """Print one row per step, and the mean reward at both ends."""
    replay = Replay(writer, settings or Settings())
    s, rewards = replay.settings, []
    print("step  reward  age of stale  (r-1)^2 fresh  (r-1)^2 stale  penalty")
    for i in range(steps):
        row = replay.step(sums(seed, i * s.prompts, s.prompts, s.terms))
        rewards.append(row["reward"])
        print(
            f"{i:4}  {row['reward']:6.3f}  {row['age']:12.1f}  {row['fresh']:13.4f}  {row['stale']:13.4f}  "
            f"{row['penalty']:7.3f}",
            flush=True,
        )
    tail = max(1, steps // 5)
    print(f"mean reward: first fifth {sum(rewards[:tail]) / tail:.3f}, last fifth {sum(rewards[-tail:]) / tail:.3f}")


if __name__ == "__main__":
    sys.exit(main(run, steps=20))
