"""Train one small policy with many algorithms and compare reward, entropy, and the number of trained tokens.

The policy is a two-layer network, trained from scratch in seconds on a verifiable task: the prompt is a digit, and the
policy must write digits whose sum ends in it, and then stop. At first, one answer in forty is correct. There are
hundreds of correct answers, so exploration pays off.

    python examples/compare_algorithms.py                          # one update per rollout
    python examples/compare_algorithms.py --epochs 8 --out runs/stale     # eight updates: stale data

The run folder contains `rows.jsonl` (one row per method, seed and step, written immediately), `summary.md` and
`curves.png`.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

import tokfuse
from tokfuse.algorithms import Algorithm, Batch, Plan, State, train_step

DIGITS, STOP, VOCAB, LENGTH = 10, 10, 12, 5

# label -> (name, options that this task needs in addition to the published ones). "_authors" is the authors' preset,
# without its KL to a reference; this task has no critic either.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"kl": None}),
    "dapo": ("dapo", {"overlong": None}),
    "gspo": ("gspo", {}),
    "gbpo": ("gbpo", {}),
    "r2vpo": ("r2vpo", {"delta": 0.02, "step_size": 1.0, "penalty": 0.1}),
    "bapo": ("bapo", {}),
    "bapo_authors": ("bapo", {"preset": "authors"}),
    "d3s": ("d3s", {"rollouts": (4, 8), "tokens": (0.3, 0.6), "total_steps": 60}),
    "high_entropy": ("high_entropy", {}),
    "kl_cov": ("kl_cov", {"rules": (tokfuse.algorithms.KLCov(fraction=0.02),)}),
    "clip_cov": ("clip_cov", {"rules": (tokfuse.algorithms.ClipCov(fraction=0.02),)}),
    "clip_cov_authors": ("clip_cov", {"preset": "authors"}),
    "dcpo_dist": ("dcpo_dist", {"target_entropy": 0.5}),
    "epo": ("epo", {"kl": None, "max_turns": 1, "total_steps": 60, "entropy_coef": 0.01}),
    "epo_authors": ("epo", {"preset": "authors", "advantage": "grpo", "kl": None, "total_steps": 60}),
    "lopti": ("lopti", {}),
    "lopti_minibatch": ("lopti", {"form": "minibatch"}),
    "lopti_authors": ("lopti", {"preset": "authors", "kl": None}),
    "nft": ("nft", {"constant": 100.0}),
    "nft_authors": ("nft", {"preset": "authors"}),
    "nft_normalize_2": ("nft", {"constant": 100.0, "normalize": 2}),
    "nft_positive": ("nft", {"constant": 100.0, "neg_weight": 0.0}),
    "pipo": ("pipo", {}),
    "pipo_authors": ("pipo", {"preset": "authors", "kl": None}),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one comparison."""

    steps: int = 80
    prompts: int = 16
    group_size: int = 8
    epochs: int = 1
    minibatches: int = 2
    lr: float = 1e-2


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Padded answers. `prompt` and `length` are (seqs,); `tokens` is (seqs, LENGTH)."""

    prompt: Tensor
    tokens: Tensor
    length: Tensor

    @property
    def kept(self) -> Tensor:
        """(seqs, LENGTH) bool, True on the tokens of an answer; indexing with it packs."""
        return torch.arange(LENGTH) < self.length[:, None]

    @property
    def target(self) -> Tensor:
        """(tokens,) int64."""
        return self.tokens[self.kept]

    def take(self, seqs: Tensor) -> "Rollout":
        """Return only these sequences."""
        return Rollout(self.prompt[seqs], self.tokens[seqs], self.length[seqs])


class Policy(torch.nn.Module):
    """Logits of the next token, from the digit in the prompt, the sum so far, and the position."""

    inputs = 2 * DIGITS + LENGTH

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(self.inputs, 64)
        self.head = torch.nn.Linear(64, VOCAB)

    def forward(self, prompt: Tensor, total: Tensor, position: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(prompt, total, position))
        return logits

    def hidden(self, prompt: Tensor, total: Tensor, position: Tensor) -> Tensor:
        """Return the input of the head."""
        one_hot = torch.nn.functional.one_hot
        parts = (one_hot(prompt, DIGITS), one_hot(total, DIGITS), one_hot(position, LENGTH))
        return torch.tanh(self.body(torch.cat(parts, -1).float()))

    def packed_logits(self, rollout: Rollout) -> Tensor:
        """Return logits, (tokens, VOCAB). Row t predicts rollout.target[t]."""
        logits: Tensor = self.head(self.packed_hidden(rollout))
        return logits

    def packed_hidden(self, rollout: Rollout) -> Tensor:
        """Return the hidden states of `packed_logits`, (tokens, 64)."""
        digit = torch.where(rollout.tokens < DIGITS, rollout.tokens, 0)
        total = (digit.cumsum(1) - digit) % DIGITS
        position = torch.arange(LENGTH).expand_as(total)
        prompt = rollout.prompt[:, None].expand_as(total)
        kept = rollout.kept
        return self.hidden(prompt[kept], total[kept], position[kept])


@torch.no_grad()
def sample(policy: Policy, prompt: Tensor, generator: torch.Generator) -> Rollout:
    """Return one answer per prompt. An answer ends with its first STOP, or at LENGTH."""
    total, tokens = torch.zeros_like(prompt), []
    for position in range(LENGTH):
        logits = policy(prompt, total, torch.full_like(prompt, position))
        token = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
        total = (total + torch.where(token < DIGITS, token, 0)) % DIGITS
        tokens.append(token)
    out = torch.stack(tokens, 1)
    stops = out == STOP
    length = torch.where(stops.any(1), stops.int().argmax(1) + 1, LENGTH)
    return Rollout(prompt, out, length)


def score(rollout: Rollout) -> Tensor:
    """Return 1.0 for one or more digits whose sum ends in the digit of the prompt, then STOP; (seqs,)."""
    kept = rollout.kept
    ends = rollout.tokens.gather(1, (rollout.length - 1)[:, None]).flatten() == STOP
    digit = kept & (rollout.tokens < DIGITS)
    clean = digit.sum(1) == rollout.length - 1
    total = torch.where(digit, rollout.tokens, 0).sum(1) % DIGITS
    return (ends & clean & (rollout.length > 1) & (total == rollout.prompt)).float()


class Trainer:
    """A policy, an algorithm and its state. compare_scenarios.py overrides the prompts and the scoring."""

    make_policy: type[Policy] = Policy
    max_gradient: float | None = None

    def __init__(self, algorithm: Algorithm, seed: int, settings: Settings) -> None:
        torch.manual_seed(seed)
        self.policy = self.make_policy()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=settings.lr)
        self.algorithm, self.settings = algorithm, settings
        self.state: State = algorithm.initial_state()
        self.generator = torch.Generator().manual_seed(seed)
        self.previous: Rollout | None = None
        self.loss_s, self.backward_tokens = 0.0, 0.0

    def step(self) -> dict[str, float]:
        """Sample, score and update. Return the values of a result row."""
        s = self.settings
        self.loss_s = self.backward_tokens = 0.0
        rollout, batch = self.collect()
        entropy = float(batch.global_mean(batch.entropy)) if batch.entropy is not None else 0.0
        done = train_step(
            self.algorithm,
            self.state,
            self.prepared(batch),
            lambda seqs, source: self.forward(rollout if source == "current" else self.previous, seqs),
            self.optimizer,
            minibatches=list(self._minibatches()),
            max_gradient=self.max_gradient,
            on_step=self.record,
        )
        self.state, self.previous = done.state, rollout
        self.loss_s += done.seconds
        return {
            "reward": float(batch.reward.mean()),
            "entropy": entropy,
            "tokens": float(rollout.length.sum()) * s.epochs,
            "backward_tokens": self.backward_tokens,
            "loss_ms": self.loss_s * 1e3,
        }

    def prompts(self) -> Tensor:
        """Return the prompts of this step."""
        return torch.randint(DIGITS, (self.settings.prompts,), generator=self.generator)

    def score(self, rollout: Rollout) -> Tensor:
        """Return the reward of every answer."""
        return score(rollout)

    def collect(self) -> tuple[Rollout, Batch]:
        """Return answers to train on, and their statistics."""
        prompt = self.prompts().repeat_interleave(self.settings.group_size)
        rollout = sample(self.policy, prompt, self.generator)
        return rollout, self.measured(rollout)

    def prepared(self, batch: Batch) -> Batch:
        """Return the batch with its advantages."""
        start = time.perf_counter()
        batch = self.algorithm.prepare(batch, self.state)
        self.loss_s += time.perf_counter() - start
        return batch

    def measured(self, rollout: Rollout) -> Batch:
        """Return the rollout as a batch, with its statistics under the policy that sampled it."""
        with torch.no_grad():
            logits = self.policy.packed_logits(rollout)
        temperature = getattr(self.algorithm, "temperature", lambda state: 1.0)(self.state)
        old = tokfuse.token_stats(logits, rollout.target, second_temperature=temperature)
        reward = self.score(rollout)
        groups = torch.arange(self.settings.prompts)
        return Batch(
            reward=reward,
            correct=reward > 0,
            group_ids=groups.repeat_interleave(self.settings.group_size),
            turn=torch.zeros(len(reward), dtype=torch.int64),
            cu_seqlens=torch.nn.functional.pad(rollout.length.cumsum(0), (1, 0)).to(torch.int32),
            old_logp=old.logp,
            entropy=old.entropy,
            second_logp=old.second_logp,
        )

    def _minibatches(self) -> Iterator[Tensor]:
        s = self.settings
        rows = torch.arange(s.prompts * s.group_size).view(s.prompts, s.group_size)
        for _ in range(s.epochs):
            order = torch.randperm(s.prompts, generator=self.generator)
            yield from (rows[groups].flatten() for groups in order.chunk(s.minibatches))

    def forward(self, rollout: Rollout, seqs: Tensor) -> dict[str, Tensor]:
        """Return the logits and the target of some answers, for `train_step`."""
        part = rollout.take(seqs)
        return {"logits": self.policy.packed_logits(part), "target": part.target}

    def record(self, plan: Plan, inputs: Mapping[str, Any], step: tokfuse.PolicyStep) -> None:
        """Count the tokens that get a gradient in one optimizer step."""
        figures = step.metrics.mean()
        self.backward_tokens += figures["grad_rows"] * figures["tokens"]


def train(label: str, seed: int, settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield the rows of one run."""
    name, options = METHODS[label]
    if "total_steps" in options:
        options = options | {"total_steps": settings.steps}
    trainer = Trainer(tokfuse.algorithms.make(name, **options), seed, settings)
    for step in range(settings.steps):
        yield {"method": label, "seed": seed, "step": step, **trainer.step()}


def summary(rows: list[dict[str, Any]], settings: Settings) -> str:
    """Return a Markdown table: means over seeds, and the lowest final reward of a seed."""
    last = max(1, settings.steps // 6)
    lines = [
        "| method | reward, mean of run | reward, last sixth | lowest seed | entropy, last sixth | "
        "backward tokens | loss side ms/step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == label]
        end = [row for row in own if row["step"] >= settings.steps - last]
        seeds = [
            statistics.fmean(row["reward"] for row in end if row["seed"] == seed)
            for seed in dict.fromkeys(row["seed"] for row in own)
        ]
        share = sum(row["backward_tokens"] for row in own) / sum(row["tokens"] for row in own)
        lines.append(
            f"| {label} | {statistics.fmean(row['reward'] for row in own):.3f} "
            f"| {statistics.fmean(seeds):.3f} | {min(seeds):.3f} "
            f"| {statistics.fmean(row['entropy'] for row in end):.2f} | {share:.0%} "
            f"| {statistics.median(row['loss_ms'] for row in own):.1f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot reward and entropy over steps, averaged over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    colors = plt.get_cmap("tab20")
    for index, label in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == label]
        steps = sorted({row["step"] for row in own})
        for axis, what in zip(axes, ("reward", "entropy"), strict=True):
            means = [statistics.fmean(r[what] for r in own if r["step"] == step) for step in steps]
            axis.plot(steps, means, label=label, color=colors(index % 20))
            axis.set(xlabel="step", ylabel=what)
    axes[1].legend(fontsize=8, ncol=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    for field in dataclasses.fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    options = vars(parser.parse_args(argv))
    out, methods, seeds = (options.pop(name) for name in ("out", "methods", "seeds"))
    settings = Settings(**options)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with (out / "rows.jsonl").open("w") as log:
        for label in methods:
            start = time.perf_counter()
            for seed in range(seeds):
                for row in train(label, seed, settings):
                    rows.append(row)
                    log.write(json.dumps(row) + "\n")
                log.flush()
            print(f"{label}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    text = summary(rows, settings)
    (out / "summary.md").write_text(text + "\n")
    print(text)
    try:
        plot(rows, out / "curves.png")
    except ModuleNotFoundError as missing:
        print(f"No plot: {missing.name} is not installed.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
