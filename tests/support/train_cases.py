"""A small policy with one shared matrix, for tests that train with `train_step`."""

import dataclasses

import torch
from algorithm_cases import rollout

import tokfuse
from tokfuse.algorithms import Batch

VOCAB, WIDTH = 19, 6


class Model:
    """Logits of every token from fixed features and one shared matrix, so that gradients add up over tokens."""

    def __init__(self, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        tokens = rollout().num_tokens
        self.features = torch.randn(tokens, WIDTH, generator=gen, dtype=torch.float64)
        self.target = torch.randint(VOCAB, (tokens,), generator=gen)
        self.weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH, generator=gen, dtype=torch.float64) * 0.5)
        self.optimizer = torch.optim.SGD([self.weight], lr=0.5)
        self.asked: list[tuple[str, list[int]]] = []
        self.all = rollout()

    def batch(self, **replaced) -> Batch:
        """Return the rollout with the statistics of this model."""
        with torch.no_grad():
            old = tokfuse.token_stats(self.features @ self.weight.t(), self.target)
        shift = 0.3 * (self.all.ref_logp - self.all.old_logp)
        fields = {"old_logp": old.logp, "entropy": old.entropy, "ref_logp": old.logp + shift, "logp": old.logp}
        fields["sampler_logp"] = old.logp + 1e-3 * shift
        return dataclasses.replace(self.all, **fields, second_logp=old.logp - 0.01, sum_sq=old.sum_sq, **replaced)

    def forward(self, seqs: torch.Tensor, source: str) -> dict[str, torch.Tensor]:
        self.asked.append((source, seqs.tolist()))
        rows = self.all.rows(seqs)
        return {"hidden": self.features[rows], "weight": self.weight, "target": self.target[rows]}
