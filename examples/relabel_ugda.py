"""UGDA's loop on small networks: find rewards that are wrong, relabel a few, refine the rewards, retrain the policy.

The task is one-digit sums; a policy picks one of the answers 0 to 18. Scores of raters train an ensemble of reward
networks, but most raters forget the carry. A policy is trained on the mean reward, and its samples are logged. UGDA
takes the logged samples on which the ensemble disagrees and whose gradients change the loss on a few trusted samples
most. An expert scores them, the ensemble is refined on these scores, and a new policy is trained on it.

    python examples/relabel_ugda.py            # about a minute of one core
    python examples/relabel_ugda.py --seeds 10 --uncertain 0.4

The example compares UGDA with the same number of random samples and with the most uncertain ones. The source states no
training details. The task, the networks and the mixture of old and new labels belong to this example.
"""

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

import tokfuse
from tokfuse import algorithms, influence
from tokfuse.algorithms import Batch

ANSWERS, LEVELS = 19, 5
SUMS = torch.cartesian_prod(torch.arange(10), torch.arange(10))


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    seeds: int = 5
    labels: int = 800  # scores of the raters
    careless: float = 0.6  # share of the raters who forget the carry
    trusted: int = 64  # samples with expert scores, for the influence
    members: int = 5
    fits: int = 300  # steps of each fit of the reward networks
    steps: int = 60  # of each policy
    group: int = 8  # answers to each sum, per step
    uncertain: float = 0.25
    influential: float = 0.25


def samples(count: int) -> Tensor:
    """Return random (a, b, answer) rows."""
    return torch.stack([torch.randint(size, (count,)) for size in (10, 10, ANSWERS)], 1)


def scores(rows: Tensor, carry: Tensor | bool = True) -> Tensor:
    """Return scores 1 to 5: how near the answer is to the sum. Raters without `carry` drop the ten of the sum."""
    total = rows[:, 0] + rows[:, 1]
    wanted = torch.where(torch.as_tensor(carry), total, total % 10)
    return LEVELS - (rows[:, 2] - wanted).abs().clamp(max=LEVELS - 1)


def reward_of(member: nn.Module, rows: Tensor) -> Tensor:
    return member(rows.float() / 10.0 - 0.5).squeeze(1)


class Ensemble:
    """Reward networks, each fitted to a bootstrap of the raters' scores."""

    def __init__(self, rows: Tensor, given: Tensor, s: Settings) -> None:
        sizes = ((3, 64), (64, 64))
        layers = [[x for a, b in sizes for x in (nn.Linear(a, b), nn.ReLU())] for _ in range(s.members)]
        self.members = [nn.Sequential(*some, nn.Linear(64, 1)) for some in layers]
        picks = torch.randint(len(rows), (s.members, len(rows)))
        self.data = [(rows[pick], (given[pick] - 3.0) / 2.0) for pick in picks]
        self.fit(s.fits)

    def rewards(self, rows: Tensor) -> Tensor:
        """Return (members, samples)."""
        return torch.stack([reward_of(member, rows) for member in self.members])

    def fit(self, steps: int, chosen: Tensor | None = None, logged: Tensor | None = None) -> None:
        """Fit the members to their data, and to expert scores of the chosen samples (UGDA's refinement)."""
        refinement = algorithms.make("ugda_refine", levels=LEVELS)
        if chosen is not None:
            target = refinement.targets(self.rewards(logged).detach(), scores(chosen))
        optimizer = torch.optim.Adam([p for m in self.members for p in m.parameters()], lr=3e-3)
        for _ in range(steps):
            pairs = zip(self.members, self.data, strict=True)
            loss = sum((reward_of(m, x) - y).square().mean() for m, (x, y) in pairs)
            if chosen is not None:
                loss = loss + refinement.loss(self.rewards(chosen), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def influence(self, rows: Tensor, trusted: Tensor) -> Tensor:
        """Return the size of each sample's influence on the trusted loss, (samples,).

        The label of a sample is not known yet. It sets only the length and the sign of the gradient of a squared
        error, so the gradient of the reward is taken, and the absolute value of its cosine.
        """
        train, validation = [], []
        for member in self.members:
            with influence.capture(member) as captured:
                reward_of(member, rows).sum().backward()
                (reward_of(member, trusted) - (scores(trusted) - 3.0) / 2.0).square().sum().backward()
            train.append(captured.features[: len(rows)])
            validation.append(captured.features[len(rows) :])
        return influence.less_scores(train, validation, average="gradient").abs()


def train_policy(ensemble: Ensemble, s: Settings) -> tuple[float, Tensor]:
    """Train a table of logits with GRPO on the mean reward. Return its accuracy and the samples of the run."""
    policy, grpo, logged = torch.zeros(100, ANSWERS, requires_grad=True), algorithms.make("grpo", kl=None), []
    optimizer, state = torch.optim.Adam([policy], lr=0.1), grpo.initial_state()
    group = torch.arange(100).repeat_interleave(s.group)
    offsets = torch.arange(len(group) + 1, dtype=torch.int32)
    for _ in range(s.steps):
        answer = torch.multinomial(policy.detach()[group].softmax(-1), 1).squeeze(1)
        logged.append(torch.cat([SUMS[group], answer[:, None]], 1))
        with torch.no_grad():
            reward = ensemble.rewards(logged[-1]).mean(0)
            old = tokfuse.token_stats(policy[group], answer).logp
        batch = Batch(reward=reward, group_ids=group, cu_seqlens=offsets, old_logp=old)
        plan = grpo.objective(grpo.prepare(batch, state), state)
        optimizer.zero_grad()
        tokfuse.policy_step(logits=policy[group], target=answer, **plan.inputs()).loss.backward()
        optimizer.step()
    return float((policy.argmax(1) == SUMS.sum(1)).float().mean()), torch.cat(logged)


def compare(s: Settings, seed: int) -> dict[str, float]:
    """Return the accuracy of the policy of the raters' rewards, and after relabelling what each rule chooses."""
    torch.manual_seed(seed)
    rated, trusted = samples(s.labels), samples(s.trusted)
    first = Ensemble(rated, scores(rated, torch.rand(s.labels) >= s.careless), s)
    before, logged = train_policy(first, s)
    seen = logged.unique(dim=0)
    rewards, score = first.rewards(seen).detach(), first.influence(seen, trusted)
    ugda = influence.ugda_select(rewards, score, uncertain=s.uncertain, influential=s.influential)
    count, found = len(ugda), {"raters only": before}
    rules = {"random": torch.randperm(len(seen)), "most uncertain": rewards.var(0).argsort(descending=True)}
    for name, ids in (rules | {"UGDA": ugda}).items():
        refined = copy.deepcopy(first)
        refined.fit(s.fits, seen[ids[:count]], logged)
        found[name] = train_policy(refined, s)[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the accuracy of each policy by seed, and the means with the standard error of the gain over random."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option in fields(Settings):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    settings, rows = Settings(**vars(parser.parse_args(argv))), []
    for seed in range(settings.seeds):
        rows.append(compare(settings, seed))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()), flush=True)
    for name in rows[0]:
        gain = torch.tensor([row[name] - row["random"] for row in rows])
        error = gain.std(correction=int(len(rows) > 1)) / len(rows) ** 0.5
        mean = sum(row[name] for row in rows) / len(rows)
        print(f"{name:15} {mean:.3f}, above random {gain.mean():+.3f} +- {error:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
