"""MetaTuner's joint loop on a small pair of networks. A run takes seconds.

The prompt network reads a question and writes one prompt token. The actor reads the prompt and a part of the question,
and writes the answer: for the question (a, b) it sees b and the prompt, and must answer (a + b) mod 10. Both decoders
share an encoder. The loss is the cross-entropy of the actor on D1 (questions and answers) plus `alpha` times that of
the prompt network on D2 (questions and good prompts). The actor's prompts are samples of a frozen copy of the prompt
decoder, which is renewed every `every` steps; sampling has no gradient, so D2 alone trains the prompt decoder.

    python examples/joint_metatuner.py
    python examples/joint_metatuner.py --every 100

The example shows that the actor learns only as far as the copy is up to date, and compares the joint form with the
alternating one. alpha and the period have no published value.
"""

import argparse
import copy
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

import tokfuse
from tokfuse import algorithms

DIGITS, WIDTH = 10, 64


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    steps: int = 300
    batch: int = 64
    lr: float = 1e-2
    alpha: float = 1.0
    every: int = 20
    seed: int = 0


class Decoder(nn.Module):
    """One hidden layer and a head over the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, DIGITS, bias=False)

    def nll(self, state: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy, without logits."""
        return -tokfuse.linear_token_stats(self.body(state), self.head.weight, target).logp.mean()

    @torch.no_grad()
    def sample(self, state: Tensor) -> Tensor:
        """Return one sampled token per row."""
        probabilities = self.head(self.body(state)).softmax(-1)
        return torch.multinomial(probabilities, 1).squeeze(1)


class Pair(nn.Module):
    """The prompt network and the actor, with a shared encoder of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(DIGITS, WIDTH)
        self.prompt, self.actor = Decoder(), Decoder()

    def state(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the encoding of two digits, (rows, 2 * WIDTH)."""
        return torch.cat([self.encoder(first), self.encoder(second)], 1)

    @torch.no_grad()
    def accuracy(self) -> tuple[float, float]:
        """Return the share of right prompts and of right answers over all questions."""
        a, b = (x.flatten() for x in torch.meshgrid(torch.arange(DIGITS), torch.arange(DIGITS), indexing="ij"))
        prompt = self.prompt.sample(self.state(a, b))
        answer = self.actor.sample(self.state(prompt, b))
        return float((prompt == a).float().mean()), float((answer == (a + b) % DIGITS).float().mean())


def train(form: str, settings: Settings) -> Iterator[dict[str, float]]:
    """Yield the losses and accuracies after every tenth of the steps."""
    torch.manual_seed(settings.seed)
    pair, tuner = Pair(), algorithms.make("metatuner", alpha=settings.alpha, every=settings.every, form=form)
    optimizer = torch.optim.Adam(pair.parameters(), lr=settings.lr)
    frozen = copy.deepcopy(pair.prompt)
    for step in range(settings.steps):
        if tuner.copy_due(step):
            frozen = copy.deepcopy(pair.prompt)
        a, b = torch.randint(DIGITS, (2, settings.batch))
        weights, loss = tuner.weights(step), torch.zeros(())
        if weights[0] > 0:  # D1: the prompt is a sample of the frozen copy
            with torch.no_grad():
                prompt = frozen.sample(pair.state(a, b))
            loss = loss + weights[0] * pair.actor.nll(pair.state(prompt, b), (a + b) % DIGITS)
        if weights[1] > 0:  # D2: the good prompt names a
            loss = loss + weights[1] * pair.prompt.nll(pair.state(a, b), a)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, settings.steps // 10) == 0:
            prompts, answers = pair.accuracy()
            yield {"step": step + 1, "loss": loss.item(), "prompts": prompts, "answers": answers}


def main(argv: Sequence[str] | None = None) -> int:
    """Train both forms and print their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option in fields(Settings):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    settings = Settings(**vars(parser.parse_args(argv)))
    print("form         step  loss   right prompts  right answers")
    for form in ("joint", "alternating"):
        for row in train(form, settings):
            print(f"{form:12} {{step:4}}  {{loss:.3f}}  {{prompts:13.2f}}  {{answers:13.2f}}".format(**row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
