"""Three scenarios for which published methods were designed, on the small policy of compare_algorithms.py.

    python examples/compare_scenarios.py                         # all; minutes on one core
    python examples/compare_scenarios.py shortcut --seeds 5 --out runs/shortcut

shortcut  The answer is the last digit of a + b. A hint in the prompt gives it, correctly in nine of ten prompts. First
          a bias model learns from the hint alone. Then a policy is trained with GRPO, and with CDPO, which moves away
          from that frozen model. Measured on prompts with a wrong hint: the accuracy, and the share of answers that
          follow the hint.
replay    GRPO trains until three answers in ten are correct. From then on, every step uses answers that the policy
          sampled eight steps (16 updates) ago, and the first batch is used nine times. The advantage is 1 or -1, so at
          first most of the weight is negative. BAPO is compared with a PPO clip and with its own starting bounds by
          reward, entropy, and the positive share of the loss.
harm      Every fifth batch rewards wrong answers: advantage -1 for a correct answer, 1 for a wrong one. PIPO measures
          the effect of an update and reverses harmful ones. It is compared with GRPO by the change of the reward
          right after the harmful updates, and two steps later.

The run folder contains `rows.jsonl`, `summary.md` and `curves.png`.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from compare_algorithms import DIGITS, LENGTH, STOP, Policy, Rollout, Settings, Trainer, sample
from torch import Tensor

import tokfuse
from tokfuse.algorithms import Algorithm, Batch, make
from tokfuse.algorithms.base import Plan

Row = dict[str, Any]
one_hot = torch.nn.functional.one_hot


# ---------------------------------------------------------------------------------------- shortcut

HINT_RIGHT = 0.9
UNKNOWN = 100  # the pair of a prompt that contains only a hint
MAX_GRADIENT = 20.0  # gradient clip of CDPO's trainer; part of the method, see docs/paper_index.md


class HintedPolicy(Policy):
    """Logits from the pair (a, b), the hint, the sum written so far and the position.

    A prompt is the number 10 * pair + hint.
    """

    inputs = UNKNOWN + 1 + 2 * DIGITS + LENGTH

    def hidden(self, prompt: Tensor, total: Tensor, position: Tensor) -> Tensor:
        """Return the input of the head."""
        pair, hint = prompt // DIGITS, prompt % DIGITS
        parts = (one_hot(pair, UNKNOWN + 1), one_hot(hint, DIGITS), one_hot(total, DIGITS), one_hot(position, LENGTH))
        return torch.tanh(self.body(torch.cat(parts, -1).float()))


def asked(prompt: Tensor) -> Tensor:
    """Return the correct digit: the one of the pair, or of the hint if there is no pair."""
    pair = prompt // DIGITS
    return torch.where(pair == UNKNOWN, prompt % DIGITS, (pair // 10 + pair % 10) % DIGITS)


def answers_with(rollout: Rollout, digit: Tensor) -> Tensor:
    """Return 1.0 where the answer is exactly this digit and STOP, (seqs,)."""
    first, second = rollout.tokens[:, 0], rollout.tokens[:, 1]
    return ((first == digit) & (second == STOP)).float()


class HintedTrainer(Trainer):
    """Trains on prompts with hints. `bias` is the frozen model that CDPO moves away from."""

    make_policy = HintedPolicy
    max_gradient = MAX_GRADIENT

    def __init__(self, algorithm: Algorithm, seed: int, settings: Settings, bias: Policy | None) -> None:
        super().__init__(algorithm, seed, settings)
        self.bias = bias

    def prompts(self) -> Tensor:
        """Return pairs with hints. To train the bias model itself: hints alone."""
        count = self.settings.prompts
        hint = torch.randint(DIGITS, (count,), generator=self.generator)
        if self.bias is None:
            return UNKNOWN * DIGITS + hint
        pair = torch.randint(UNKNOWN, (count,), generator=self.generator)
        right = torch.rand(count, generator=self.generator) < HINT_RIGHT
        return pair * DIGITS + torch.where(right, asked(pair * DIGITS), hint)

    def score(self, rollout: Rollout) -> Tensor:
        """Return 1.0 for the correct digit."""
        return answers_with(rollout, asked(rollout.prompt))

    def measured(self, rollout: Rollout) -> Batch:
        """Return the batch, with the bias model's log-probabilities as the reference."""
        batch = super().measured(rollout)
        if self.bias is None:
            return batch
        with torch.no_grad():
            logits = self.bias.packed_logits(rollout)
        reference = tokfuse.token_stats(logits, rollout.target).logp
        return dataclasses.replace(batch, ref_logp=reference)

    @torch.no_grad()
    def examine(self) -> Row:
        """Return the accuracy on prompts with a wrong hint, and the share of answers that follow it."""
        pair = torch.arange(UNKNOWN).repeat_interleave(DIGITS)
        hint = torch.arange(DIGITS).repeat(UNKNOWN)
        prompt = pair * DIGITS + hint
        prompt = prompt[asked(prompt) != hint]
        rollout = sample(self.policy, prompt, torch.Generator().manual_seed(0))
        return {
            "accuracy": float(answers_with(rollout, asked(prompt)).mean()),
            "follows_hint": float(answers_with(rollout, prompt % DIGITS).mean()),
        }


SHORTCUT = {
    "grpo": {"kl": None},
    "cdpo": {"preset": "authors"},
    "cdpo, clip 0.2": {"preset": "authors", "shape": tokfuse.PPOClip()},
    "cdpo / 3": {"kl": tokfuse.KL(coef=-0.01 / 3, clamp=11.0)},
    "cdpo / 10": {"kl": tokfuse.KL(coef=-0.001, clamp=11.0)},
}


def shortcut(seed: int, steps: int) -> Iterator[Row]:
    """Train the bias model, then every method from the same start. Yield the rows of the methods."""
    settings = Settings(steps=steps)
    stage_1 = HintedTrainer(make("cdpo", kl=None), seed + 100, settings, None)
    for _ in range(100):
        stage_1.step()
    bias = stage_1.policy.requires_grad_(False)
    for label, options in SHORTCUT.items():
        trainer = HintedTrainer(make("cdpo", **options), seed, settings, bias)
        for step in range(steps):
            yield {"method": label, "seed": seed, "step": step, **trainer.step(), **trainer.examine()}


# ------------------------------------------------------------------------------------------ replay

LAG, WARM_REWARD = 8, 0.3


class ReplayTrainer(Trainer):
    """Trains on samples of an earlier policy. Rewards are 1 and -1, without a baseline."""

    def __init__(self, algorithm: Algorithm, seed: int, settings: Settings, start: dict[str, Tensor]) -> None:
        super().__init__(algorithm, seed, settings)
        self.policy.load_state_dict(start)
        self.waiting: deque[tuple[Rollout, Batch]] = deque()
        self.shares: list[float] = []
        self.fresh: dict[str, float] = {}

    def collect(self) -> tuple[Rollout, Batch]:
        """Return the oldest waiting batch. The queue is as long as the lag between the policies."""
        rollout, batch = super().collect()
        self.fresh = {
            "reward": float((batch.reward > 0).float().mean()),
            "entropy": float(batch.global_mean(batch.entropy)),
        }
        self.waiting.append((rollout, batch))
        return self.waiting.popleft() if len(self.waiting) > LAG else self.waiting[0]

    def score(self, rollout: Rollout) -> Tensor:
        """Return 1 or -1."""
        return 2 * super().score(rollout) - 1

    def record(self, plan: Plan, inputs: Mapping[str, Any], step: tokfuse.PolicyStep) -> None:
        """Record the positive share of the loss too."""
        self.shares.append(positive_share(plan))
        super().record(plan, inputs, step)

    def step(self) -> Row:
        """Return a row with reward and entropy of the current policy."""
        self.shares.clear()
        row = super().step()
        return row | self.fresh | {"positive_share": statistics.fmean(self.shares)}


def positive_share(plan: Plan) -> float:
    """Return P / (P + N) of the clipped ratio times the advantage, as BAPO defines it."""
    batch = plan.batch
    if batch.logp is None:
        return float("nan")
    advantage = batch.advantage if batch.advantage_level == "token" else batch.spread(batch.advantage)
    low, high = plan.objective.shape.bounds
    ratio = (batch.logp.double() - batch.old_logp.double()).exp()
    up = (ratio.clamp(max=high) * advantage.clamp(min=0)).sum()
    down = (ratio.clamp(min=low) * (-advantage).clamp(min=0)).sum()
    return float(up / (up + down).clamp(min=1e-12))


FIXED = {"low": (0.6, 0.6), "high": (1.2, 1.2)}
REPLAY: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo clip 0.8 - 1.2": ("bapo", {"low": (0.8, 0.8), "high": (1.2, 1.2)}),
    "fixed 0.6 - 1.2": ("bapo", FIXED),
    "bapo": ("bapo", {}),
    "bapo, authors": ("bapo", {"preset": "authors"}),
    "bapo, authors' script": ("bapo", {"preset": "authors_script"}),
}


def replay(seed: int, steps: int) -> Iterator[Row]:
    """Train every method from the policy that GRPO has reached. Yield the rows."""
    settings = Settings(steps=steps)
    warm = Trainer(make("grpo", kl=None), seed, settings)
    while warm.step()["reward"] < WARM_REWARD:
        pass
    start = warm.policy.state_dict()
    for label, (name, options) in REPLAY.items():
        method = make(name, advantage="reinforce", **options)
        trainer = ReplayTrainer(method, seed, settings, start)
        for step in range(steps):
            yield {"method": label, "seed": seed, "step": step, **trainer.step()}


# -------------------------------------------------------------------------------------------- harm

FIRST_HARM, HARM_EVERY = 10, 5


class HarmedTrainer(Trainer):
    """Rewards wrong answers in some batches, also in groups with equal rewards."""

    def __init__(self, algorithm: Algorithm, seed: int, settings: Settings) -> None:
        super().__init__(algorithm, seed, settings)
        self.count = 0

    def prepared(self, batch: Batch) -> Batch:
        """Return the prepared batch, every fifth time with wrong advantages."""
        batch = super().prepared(batch)
        harmful = is_harmful(self.count)
        self.count += 1
        if not harmful:
            return batch
        return dataclasses.replace(batch, advantage=1 - 2 * batch.reward, advantage_level="sequence")


def is_harmful(step: int) -> bool:
    """Return whether the updates of this step are harmful."""
    return step >= FIRST_HARM and step % HARM_EVERY == 0


HARM: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"kl": None}),
    "pipo": ("pipo", {}),
    "pipo, worsening 1": ("pipo", {"worsening": 1.0}),
    "pipo, worsening 0": ("pipo", {"worsening": 0.0}),
    "pipo, authors": ("pipo", {"preset": "authors", "kl": None}),
    "pipo, authors' DAPO": ("pipo", {"preset": "authors_dapo", "kl": None, "skip_uniform": False}),
}


def harm(seed: int, steps: int) -> Iterator[Row]:
    """Train every method from the same start. Yield the rows."""
    settings = Settings(steps=steps, epochs=4)
    for label, (name, options) in HARM.items():
        trainer = HarmedTrainer(make(name, **options), seed, settings)
        for step in range(steps):
            yield {"method": label, "seed": seed, "step": step, **trainer.step()}


def after_harm(rows: list[Row], later: int) -> float:
    """Return the mean reward `later` steps after a harmful step, minus the reward of that step.

    The reward of a step is measured before its updates, so the next step's reward shows their effect.
    """
    reward = {(row["method"], row["seed"], row["step"]): row["reward"] for row in rows}
    found = [
        reward[m, s, t + later] - value
        for (m, s, t), value in reward.items()
        if is_harmful(t) and (m, s, t + later) in reward
    ]
    return statistics.fmean(found)


# ----------------------------------------------------------------------------------------- reports


def tail(name: str) -> Callable[[list[Row]], float]:
    """Return the function that averages a column over the last sixth of the run."""

    def mean(rows: list[Row]) -> float:
        steps = max(row["step"] for row in rows) + 1
        first = steps - max(1, steps // 6)
        return statistics.fmean(row[name] for row in rows if row["step"] >= first)

    return mean


def whole(name: str) -> Callable[[list[Row]], float]:
    """Return the function that averages a column over the run."""
    return lambda rows: statistics.fmean(row[name] for row in rows)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A scenario: function that yields the rows of a seed, number of steps, columns of its table, curves."""

    """Rows of one seed, how long it runs, and the figures of its table."""

    run: Callable[[int, int], Iterator[Row]]
    steps: int
    figures: dict[str, Callable[[list[Row]], float]]
    curves: tuple[str, str]


SCENARIOS = {
    "shortcut": Scenario(
        shortcut,
        300,
        {
            "training reward, last sixth": tail("reward"),
            "accuracy where the hint is wrong": tail("accuracy"),
            "follows the wrong hint": tail("follows_hint"),
            "entropy": tail("entropy"),
        },
        ("accuracy", "follows_hint"),
    ),
    "replay": Scenario(
        replay,
        120,
        {
            "reward, mean of run": whole("reward"),
            "reward, last sixth": tail("reward"),
            "entropy, mean of run": whole("entropy"),
            "entropy, last sixth": tail("entropy"),
            "positive share": whole("positive_share"),
        },
        ("reward", "entropy"),
    ),
    "harm": Scenario(
        harm,
        60,
        {
            "reward, mean of run": whole("reward"),
            "reward, last sixth": tail("reward"),
            "right after harm": lambda rows: after_harm(rows, 1),
            "two steps later": lambda rows: after_harm(rows, 3),
            "entropy, last sixth": tail("entropy"),
        },
        ("reward", "entropy"),
    ),
}


def summary(rows: list[Row], scenario: Scenario) -> str:
    """Return a Markdown table: the mean over seeds, with the lowest and the highest seed."""
    lines = ["| method | " + " | ".join(scenario.figures) + " |", "| --- |" + " --- |" * len(scenario.figures)]
    for label in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == label]
        cells = []
        for figure in scenario.figures.values():
            seeds = [
                figure([row for row in own if row["seed"] == seed])
                for seed in dict.fromkeys(row["seed"] for row in own)
            ]
            cells.append(f"{statistics.fmean(seeds):.3f} ({min(seeds):.3f} to {max(seeds):.3f})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[str, list[Row]], path: Path) -> None:
    """Plot two curves per scenario, averaged over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(rows), 2, figsize=(11, 3.2 * len(rows)), constrained_layout=True, squeeze=False)
    for axes, (name, own) in zip(grid, rows.items(), strict=True):
        for axis, what in zip(axes, SCENARIOS[name].curves, strict=True):
            for label in dict.fromkeys(row["method"] for row in own):
                steps = sorted({row["step"] for row in own})
                means = [
                    statistics.fmean(r[what] for r in own if r["step"] == step and r["method"] == label)
                    for step in steps
                ]
                axis.plot(steps, means, label=label, linewidth=1.2)
            axis.set(xlabel="step", ylabel=what, title=name)
        axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the scenarios and write the run folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", help=f"any of {', '.join(SCENARIOS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="number of steps (default: depends on the scenario)")
    parser.add_argument("--out", type=Path, default=Path("runs/scenarios"))
    options = parser.parse_args(argv)
    names = options.scenarios or list(SCENARIOS)
    for name in names:
        if name not in SCENARIOS:
            parser.error(f"scenario must be one of {', '.join(SCENARIOS)}; got {name!r}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {name: [] for name in names}
    text = []
    with (options.out / "rows.jsonl").open("w") as log:
        for name in names:
            scenario = SCENARIOS[name]
            for seed in range(options.seeds):
                for row in scenario.run(seed, options.steps or scenario.steps):
                    rows[name].append(row)
                    log.write(json.dumps({"scenario": name, **row}) + "\n")
                log.flush()
            text.append(f"## {name}\n\n{summary(rows[name], scenario)}\n")
            print(text[-1])
    (options.out / "summary.md").write_text("\n".join(text))
    try:
        plot(rows, options.out / "curves.png")
    except ModuleNotFoundError as missing:
        print(f"No plot: {missing.name} is not installed.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
