"""CausalRM on a small network: learn a reward from feedback that is rare, selective and sometimes wrong.

Every sample has features and a hidden label. Users rate the samples that they like more often, and their ratings are
flipped at two rates. Nobody tells the rates or who rates when. Three heads are learned: the propensity (who rates), a
proxy of the noisy label (its most certain samples give the two noise rates), and the reward itself. Its loss is
corrected for the noise and weighted by 1 / propensity ("snips"), or doubly robust ("dr") with a fourth head, which
imputes the label of every sample.

    python examples/learn_causalrm.py          # seconds
    python examples/learn_causalrm.py --seeds 10 --false_negative 0.4

The example compares these rewards on clean labels of all samples: with none of the corrections, with one of them, with
both, and with the true rates and propensities. The reward is linear while the truth is not, so it matters on which
samples it is right. The data is made by this script; no result of the paper is reproduced.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

from tokfuse import algorithms
from tokfuse.algorithms.reward.correction import anchor_noise_rates, imputation_loss

SIZE = 6


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    seeds: int = 5
    samples: int = 4000
    steps: int = 300
    false_negative: float = 0.3  # P(rated 0 | label 1)
    false_positive: float = 0.1  # P(rated 1 | label 0)
    clip: float = 0.05  # smallest propensity


class Data(NamedTuple):
    """Samples. `rating` and `observed` are seen by the learner; `label` and `propensity` are not."""

    x: Tensor
    rating: Tensor
    observed: Tensor
    label: Tensor
    propensity: Tensor


def draw(s: Settings) -> Data:
    """Return samples whose label is a curved function of the first two features."""
    x = torch.randn(s.samples, SIZE)
    label = torch.rand(s.samples) < (4.0 * (x[:, 0] + x[:, 1].square() - 1.0)).sigmoid()
    propensity = (2.0 * x[:, 1] - 1.0).sigmoid().clamp(0.03, 0.97)
    flip = torch.rand(s.samples) < torch.where(label, s.false_negative, s.false_positive)
    return Data(x, label ^ flip, torch.rand(s.samples) < propensity, label, propensity)


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(SIZE, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))


def fit(heads: Sequence[nn.Module], steps: int, loss: Callable[[], Tensor]) -> None:
    """Minimise a loss over the parameters of some heads."""
    optimizer = torch.optim.AdamW([p for head in heads for p in head.parameters()], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def learned_propensity(data: Data, steps: int) -> Tensor:
    """Return P(observed) of every sample, by a network that is trained on who rated."""
    head, bce = deep(), nn.functional.binary_cross_entropy_with_logits
    fit([head], steps, lambda: bce(head(data.x), data.observed.float()))
    return head(data.x).detach().sigmoid()


def learned_noise(data: Data, steps: int) -> tuple[float, float]:
    """Return both noise rates, from the most certain predictions of a network that is trained on the ratings.

    It predicts ratings that it has not seen, and the outer twentieths are left out: the largest of many noisy
    predictions is too large.
    """
    head, bce = deep(), nn.functional.binary_cross_entropy_with_logits
    x, rating = data.x[data.observed], data.rating[data.observed].float()
    half = len(x) // 2
    fit([head], steps // 3, lambda: bce(head(x[:half]), rating[:half]))
    probability = head(x[half:]).detach().sigmoid().sort().values
    cut = len(probability) // 20
    return anchor_noise_rates(probability[cut : len(probability) - cut])


def train_reward(
    data: Data, s: Settings, propensity: Tensor, noise: tuple[float, float], form: str = "snips"
) -> nn.Module:
    """Return a linear reward, trained with a propensity, noise rates and a form of `causalrm`."""
    reward, imputation = nn.Sequential(nn.Linear(SIZE, 1), nn.Flatten(0)), deep()
    corrected = algorithms.make("causalrm_noise", rho01=noise[0], rho10=noise[1])
    causal = algorithms.make("causalrm", form=form, clip=s.clip)

    def expected(label: Tensor, predicted: Tensor) -> Tensor:
        """Return the loss of a prediction if the label is 1 with a probability."""
        return label * (1 - predicted).square() + (1 - label) * predicted.square()

    def loss() -> Tensor:
        predicted = reward(data.x).sigmoid()
        each = corrected.loss((1 - predicted).square(), predicted.square(), data.rating)
        if form != "dr":
            return causal.loss(each, data.observed, propensity)
        label = imputation(data.x).sigmoid()
        own = imputation_loss(each, expected(label, predicted.detach()), data.observed, propensity.clamp(min=s.clip))
        imputed = expected(label.detach(), predicted)
        return causal.loss(each, data.observed, propensity, imputed=imputed) + own.mean()

    fit([reward, imputation] if form == "dr" else [reward], s.steps, loss)
    return reward


def compare(s: Settings, seed: int) -> dict[str, tuple[float, float]]:
    """Return (accuracy, squared error) of each reward on clean labels of new samples, all of them observed."""
    torch.manual_seed(seed)
    data, test = draw(s), draw(s)
    propensity, noise = learned_propensity(data, s.steps), learned_noise(data, s.steps)
    everyone, clean = torch.ones(s.samples), (0.0, 0.0)
    rewards = {
        "no correction": train_reward(data, s, everyone, clean),
        "propensity": train_reward(data, s, propensity, clean),
        "noise": train_reward(data, s, everyone, noise),
        "both": train_reward(data, s, propensity, noise),
        "both, doubly robust": train_reward(data, s, propensity, noise, "dr"),
        "both, true values": train_reward(data, s, data.propensity, (s.false_negative, s.false_positive)),
    }
    error = (propensity - data.propensity).abs().mean()
    print(f"seed {seed}: learned noise rates {noise[0]:.2f} and {noise[1]:.2f}, error of the propensity {error:.3f}")
    found = {}
    for name, reward in rewards.items():
        predicted = reward(test.x).detach().sigmoid()
        right = ((predicted > 0.5) == test.label).float().mean()
        found[name] = (float(right), float((predicted - test.label.float()).square().mean()))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the learned rates of each seed, and the means of all rewards with standard errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option in fields(Settings):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    settings = Settings(**vars(parser.parse_args(argv)))
    rows = [compare(settings, seed) for seed in range(settings.seeds)]
    print("corrections           accuracy            squared error")
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows])
        mean, error = values.mean(0), values.std(0, correction=int(len(rows) > 1)) / len(rows) ** 0.5
        print(f"{name:20}  {mean[0]:.3f} +- {error[0]:.3f}    {mean[1]:.4f} +- {error[1]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
