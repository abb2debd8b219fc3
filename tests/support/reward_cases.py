"""Random numbers for the reward tests, and the check of a Monte Carlo mean."""

import math

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_mean(samples: Tensor, expected: float) -> None:
    """Check that the mean of independent samples is within five standard errors of `expected`."""
    error = float(samples.std()) / math.sqrt(samples.shape[0])
    assert abs(float(samples.mean()) - expected) < 5 * error + 1e-12, (samples.mean(), expected)


def differs(samples: Tensor, other: float) -> bool:
    error = float(samples.std()) / math.sqrt(samples.shape[0])
    return abs(float(samples.mean()) - other) > 5 * error
